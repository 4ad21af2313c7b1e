"""From an order of records to the micro-batches of a step.

A step is the next `global_batch` usable records. They are drafted first, which tells their sizes; one that is left
out is replaced by the record after it. The drafts are packed into micro-batches by a planner that knows neither ranks
nor workers; then the pixels of a rank's own micro-batches are made. So a step is a function of the cursor's position,
and the position after it is all that a checkpoint needs of the data.

Steps are made ahead in a thread. It runs numpy, Pillow and the tokenizer, never a framework: MindSpore's engine must
be touched by one thread only.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from duetvl.core.batch import Batch, Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Dropped, Encoder, MediaTally, NotItsFault, Unread
from duetvl.data.loading.order import Cursor
from duetvl.data.loading.packing import assign, pack
from duetvl.data.loading.workers import Pool
from duetvl.data.sources.records import Ref, with_line

FEW_MEDIA = 3  # records whose media are missing that say something of a whole epoch
_SOME_MEDIA = 16  # and that say something of the rest of it


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimizer step sees.

    `batches` are the micro-batches of this rank and `numbers` their numbers among those of all ranks (by default: there
    are no others), `sample_ids` the samples of all ranks. `end` is the data position after the step. `counts` says how
    many records were "dropped" by a rule, "bad" and left out, or kept with a note ("truncated", "shrunk"); `left_out`
    is what was said about the first two, `unread` about keys that are not read.
    """

    batches: tuple[Batch, ...]
    sample_ids: tuple[str, ...]
    end: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    unread: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def packs(self) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of this rank with their numbers."""
        return zip(self.numbers or range(len(self.batches)), self.batches, strict=True)

    @property
    def tokens(self) -> int:
        """Real tokens of all micro-batches."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss is summed over."""
        return sum(batch.trained_tokens for batch in self.batches)


@dataclass(frozen=True)
class Packing:
    """What bounds a micro-batch: tokens, patches; without `several` each sample is one."""

    tokens: int
    patches: int | None = None
    several: bool = True

    def packs(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The samples of each micro-batch."""
        if not self.several:
            return [[i] for i in range(len(drafts))]
        return pack([d.tokens for d in drafts], self.tokens, [d.patches for d in drafts], self.patches)


@dataclass
class Findings:
    """What has become of records: numbers by kind, and words about those that were left out."""

    skip_bad: bool
    counts: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    unread: Unread = field(default_factory=Unread)

    def take_in(self, step: Step) -> None:
        """Add what a step has found."""
        self.counts.update(step.counts)
        self.left_out += step.left_out
        for (file, key), words in step.unread.items():
            self.unread.name(file, key, words)

    def leave_out(self, error: DataError) -> None:
        """Count a record that gives no sample. Raises the error of a bad one, unless those are skipped."""
        kind = "dropped" if isinstance(error, Dropped) else "bad"
        if isinstance(error, NotItsFault) or (kind == "bad" and not self.skip_bad):
            raise DataError(with_line(str(error)))
        self.counts[kind] += 1
        self.left_out.append(f"{kind}: {error}")


@dataclass(frozen=True)
class BatchMaker:
    """Makes micro-batches of records, for one rank of `dp`."""

    pool: Pool
    encoder: Encoder
    packing: Packing
    skip_bad: bool = False
    rank: int = 0
    dp: int = 1
    tally: MediaTally = field(default_factory=MediaTally)

    def begin(self, cursor: Cursor, count: int) -> Planned:
        """Plan the step that starts at the cursor, and have its pixels made. The cursor moves behind it."""
        findings = Findings(self.skip_bad)
        drafts: list[Draft] = []
        begun = epoch = cursor.epoch
        while len(drafts) < count:
            refs = cursor.take(count - len(drafts))
            drafts += self._usable(refs, findings)
            self.tally.check(FEW_MEDIA if cursor.epoch > begun else _SOME_MEDIA)
            if drafts:
                epoch = cursor.epoch
            elif cursor.epoch > epoch + 1:
                raise DataError(f"a whole epoch has no usable record; the last one: {findings.left_out[-1]}")
        return self._planned(drafts, findings, cursor.position())

    def begin_all(self, refs: Sequence[Ref]) -> Planned:
        """Plan just these records."""
        findings = Findings(self.skip_bad)
        return self._planned(self._usable(refs, findings), findings, {})

    def _usable(self, refs: Sequence[Ref], findings: Findings) -> list[Draft]:
        drafts = []
        for draft in self.pool.drafts(refs):
            self.tally.add(draft)
            if isinstance(draft, DataError):
                findings.leave_out(draft)
            else:
                findings.counts.update(draft.notes)
                findings.unread.add(draft)
                drafts.append(draft)
        return drafts

    def _planned(self, drafts: list[Draft], findings: Findings, end: Mapping[str, Any]) -> Planned:
        packs = self.packing.packs(drafts)
        costs = [(sum(drafts[i].tokens for i in p), sum(drafts[i].patches for i in p)) for p in packs]
        own = {number: packs[number] for number in assign(costs, self.dp)[self.rank]}
        loads = [[self.pool.load(drafts[i]) for i in members] for members in own.values()]
        return Planned(self.encoder, drafts, own, loads, findings, end)


@dataclass(frozen=True)
class Planned:
    """A step whose pixels are being made."""

    encoder: Encoder
    drafts: list[Draft]
    own: Mapping[int, list[int]]  # number of a pack -> its samples
    loads: list[list[Future[Sample | Pair | DataError]]]
    findings: Findings
    end: Mapping[str, Any]

    def finish(self) -> Step:
        """Wait for the pixels. A sample whose media are bad leaves its micro-batch, where that is allowed."""
        lost: set[int] = set()
        batches: dict[int, Batch] = {}
        for (number, members), loads in zip(self.own.items(), self.loads, strict=True):
            samples: list[Sample | Pair] = []
            for i, load in zip(members, loads, strict=True):
                made = load.result()
                if isinstance(made, DataError):
                    self.findings.leave_out(made)
                    lost.add(i)
                else:
                    samples.append(made)
            if samples:
                batches[number] = self.encoder.pack(samples)
            loads.clear()
        names = tuple(draft.id for i, draft in enumerate(self.drafts) if i not in lost)
        found = self.findings
        return Step(
            batches=tuple(batches.values()),
            sample_ids=names,
            end=self.end,
            counts=dict(found.counts),
            left_out=tuple(found.left_out),
            numbers=tuple(batches),
            unread=dict(found.unread),
        )


class StepLoader:
    """The steps of a run from the cursor on, made ahead in a thread."""

    def __init__(
        self, maker: BatchMaker, cursor: Cursor, global_batch: int, *, steps: int | None = None, prefetch: int = 1
    ):
        """Start making steps: `steps` of them, by default without end; at most `prefetch` lie ready or in work."""
        self._maker, self._cursor, self._global_batch = maker, cursor, global_batch
        self._steps = steps
        self._ready: queue.SimpleQueue[Step | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(prefetch)
        self._closed = False
        self._first: Step | None = None
        self._thread = threading.Thread(target=self._work, name="duetvl-data", daemon=True)
        self._thread.start()

    def next_step(self) -> Step:
        """The next step. What is wrong with its records is raised here."""
        self.wait()
        step, self._first = self._first, None
        assert step is not None
        self._room.release()
        return step

    def wait(self) -> None:
        """Wait until the next step is made; what is wrong with its records is raised here."""
        if self._first is None:
            made = self._ready.get()
            if isinstance(made, BaseException):
                self._ready.put(made)  # raised again to the next one who asks
                raise made
            self._first = made

    def close(self) -> None:
        """Stop the thread, after what it is at."""
        self._closed = True
        self._room.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            for step in self._made():
                self._ready.put(step)
        except BaseException as error:  # raised where the step is asked for
            self._ready.put(error)

    def _made(self) -> Iterator[Step]:
        """Steps in order: the next ones are planned, and their pixels begun, before the first is waited for."""
        planned: deque[Planned] = deque()
        error: BaseException | None = None
        left = self._steps
        while not self._closed:
            while left != 0 and error is None and self._room.acquire(blocking=not planned):
                if self._closed:
                    return
                try:
                    planned.append(self._maker.begin(self._cursor, self._global_batch))
                except DataError as problem:  # the steps before it come first
                    error = problem
                left = None if left is None else left - 1
            if not planned:
                if error is not None:
                    raise error
                return
            yield planned.popleft().finish()


def passes(maker: BatchMaker, refs: Iterable[Ref], group: int, findings: Findings | None = None) -> Iterator[Batch]:
    """These records once in their order, planned `group` at a time: what an evaluation sees.

    What was left out is added to `findings`.
    """
    rest = iter(refs)
    while some := list(islice(rest, group)):
        step = maker.begin_all(some).finish()
        if findings is not None:
            findings.take_in(step)
        yield from step.batches
    maker.tally.check(FEW_MEDIA)
