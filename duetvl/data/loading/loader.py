"""From an order of records to the micro-batches of a step.

A step is the next `global_batch` usable records. They are drafted first, which tells their sizes; one that is left
out is replaced by the record after it. The drafts are packed into micro-batches by a planner that knows neither ranks
nor workers; then pixels are made. So a step is a function of the cursor's position, and the position after it is all
that a checkpoint needs of the data.

Of many ranks each drafts a share of the records and makes the pixels of a share of the packs (`Peers`). What goes wrong
there is sent to all as a value, so that they leave out the same records, or raise the same error.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from duetvl.core.batch import Batch, Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Dropped, Encoder, MediaTally, NotItsFault, Outline, Unread
from duetvl.data.loading.order import Cursor
from duetvl.data.loading.packing import pack
from duetvl.data.loading.peers import Deal, Peers
from duetvl.data.loading.workers import Pool
from duetvl.data.sources.records import Ref, with_line

FEW_MEDIA = 3  # records whose media are missing that say something of a whole epoch
_SOME_MEDIA = 16  # and that say something of the rest of it


class Totals(NamedTuple):
    """Sums over the micro-batches of all ranks: real tokens, those that the loss is summed over, how many there are."""

    tokens: int
    trained_tokens: int
    packs: int


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimizer step sees, the same on all ranks but for `batches` and `numbers`.

    `batches` are the micro-batches of this rank and `numbers` their numbers among those of all ranks; ranks of one
    place of data parallelism have the same ones. `totals` are of all ranks (by default: there are no others), and so
    are `sample_ids`. `end` is the data position after the step. `counts` says how many records were "dropped" by a
    rule, "bad" and left out, or kept with a note ("truncated", "shrunk"); `left_out` is the messages about the first
    two, `unread` those about keys that are not read.
    """

    batches: tuple[Batch, ...]
    sample_ids: tuple[str, ...]
    end: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    unread: Mapping[tuple[str, str], str] = field(default_factory=dict)
    of_all: Totals | None = None

    def packs(self) -> Iterator[tuple[int, Batch]]:
        """The micro-batches of this rank with their numbers."""
        return zip(self.numbers or range(len(self.batches)), self.batches, strict=True)

    @property
    def totals(self) -> Totals:
        """Sums over the micro-batches of all ranks."""
        own = self.batches
        return self.of_all or Totals(sum(b.tokens for b in own), sum(b.trained_tokens for b in own), len(own))

    @property
    def tokens(self) -> int:
        """Real tokens of all ranks' micro-batches."""
        return self.totals.tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens of all ranks' micro-batches that the loss is summed over."""
        return self.totals.trained_tokens


@dataclass(frozen=True)
class Packing:
    """What bounds a micro-batch: tokens, patches; without `several` each sample is one."""

    tokens: int
    patches: int | None = None
    several: bool = True

    def packs(self, drafts: Sequence[Draft | Outline]) -> list[list[int]]:
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

    def ends_run(self, error: DataError) -> bool:
        """Whether a record with this error cannot be left out."""
        return isinstance(error, NotItsFault) or not (self.skip_bad or isinstance(error, Dropped))

    def leave_out(self, error: DataError) -> None:
        """Count a record that gives no sample. Raises the error of a bad one, unless those are skipped."""
        if self.ends_run(error):
            raise DataError(with_line(str(error)))
        kind = "dropped" if isinstance(error, Dropped) else "bad"
        self.counts[kind] += 1
        self.left_out.append(f"{kind}: {error}")

    def for_others(self, error: DataError) -> DataError:
        """The error as other ranks get it. One that ends the run has its final message, as that takes a look into the
        file."""
        return NotItsFault(with_line(str(error))) if self.ends_run(error) else error


class _Share(NamedTuple):
    """What a rank sends of some records: a checksum of which they are, the outcomes of its share, why it gives up."""

    records: int
    outcomes: Sequence[Outline | DataError]
    failure: DataError | None


class _Known(NamedTuple):
    """A draft as all ranks know it, and itself where this rank made it."""

    outline: Outline
    draft: Draft | None


@dataclass(frozen=True)
class BatchMaker:
    """Makes micro-batches of records, together with the `peers`, which all make the same calls."""

    pool: Pool
    encoder: Encoder
    packing: Packing
    skip_bad: bool = False
    peers: Peers = field(default_factory=Peers)
    tally: MediaTally = field(default_factory=MediaTally)

    def begin(self, cursor: Cursor, count: int) -> Planned:
        """Plan the step that starts at the cursor, and have its pixels made. The cursor moves behind it."""
        findings = Findings(self.skip_bad)
        known: list[_Known] = []
        begun = epoch = cursor.epoch
        while len(known) < count:
            known += self._usable(partial(cursor.take, count - len(known)), findings)
            self.tally.check(FEW_MEDIA if cursor.epoch > begun else _SOME_MEDIA)
            if known:
                epoch = cursor.epoch
            elif cursor.epoch > epoch + 1:
                raise DataError(f"a whole epoch has no usable record; the last one: {findings.left_out[-1]}")
        return self._planned(known, findings, cursor.position())

    def begin_some(self, refs: Iterator[Ref], count: int) -> Planned | None:
        """Plan just the next `count` of these records; None at their end."""
        findings, taken = Findings(self.skip_bad), list[Ref]()

        def take() -> Sequence[Ref]:
            taken.extend(islice(refs, count))
            return taken

        known = self._usable(take, findings)
        return self._planned(known, findings, {}) if taken else None

    def _usable(self, take: Callable[[], Sequence[Ref]], findings: Findings) -> list[_Known]:
        """Those of some records that give a sample. Raises what any rank has found that ends the run."""
        drafts, share = self._drafted(take, findings)
        channel = self.peers.plans
        shares = channel.gather(share)
        _check(shares)
        outcomes = channel.whole([share.outcomes for share in shares])
        own = dict(zip(channel.share(range(len(outcomes))), drafts, strict=True))
        known = []
        for number, outcome in enumerate(outcomes):
            self.tally.add(outcome)
            if isinstance(outcome, DataError):
                findings.leave_out(outcome)
            else:
                findings.counts.update(outcome.notes)
                findings.unread.add(outcome)
                known.append(_Known(outcome, own.get(number)))
        return known

    def _drafted(self, take: Callable[[], Sequence[Ref]], findings: Findings) -> tuple[list[Draft | None], _Share]:
        """The drafts of this rank's share of some records, and what it sends of them."""
        try:
            refs = take()
            outcomes = self.pool.drafts(self.peers.plans.share(refs))
        except DataError as error:
            return [], _Share(0, (), error)
        sent = [findings.for_others(o) if isinstance(o, DataError) else Outline.of(o) for o in outcomes]
        own = [None if isinstance(o, DataError) else o for o in outcomes]
        return own, _Share(zlib.crc32(np.array(refs, np.int64).tobytes()), sent, None)

    def _planned(self, known: Sequence[_Known], findings: Findings, end: Mapping[str, Any]) -> Planned:
        packs = self.packing.packs([outline for outline, _ in known])
        costs = [(sum(known[i].outline.tokens for i in p), sum(known[i].outline.patches for i in p)) for p in packs]
        deal = self.peers.deal(costs)
        drafts = self._sent(known, packs, deal)
        loads = {
            number: [self.pool.load(drafts[i]) for i in packs[number]]
            for number, maker in enumerate(deal.makers)
            if maker == self.peers.rank
        }
        return Planned(self, [outline.id for outline, _ in known], packs, deal, loads, findings, end)

    def _sent(self, known: Sequence[_Known], packs: Sequence[Sequence[int]], deal: Deal) -> dict[int, Draft]:
        """The drafts that this rank makes pixels of, from the ranks that made them."""
        parcels: list[dict[int, Draft]] = [{} for _ in range(self.peers.plans.size)]
        for number, members in enumerate(packs):
            for i in members:
                if (draft := known[i].draft) is not None:
                    parcels[deal.makers[number]][i] = draft
        return {i: draft for parcel in self.peers.plans.route(parcels) for i, draft in parcel.items()}


def _check(shares: Sequence[_Share]) -> None:
    """Raise DataError where a rank has to give up, or where the ranks have not taken the same records."""
    for share in shares:
        if share.failure is not None:
            raise DataError(str(share.failure))
    other = next((rank for rank, share in enumerate(shares) if share.records != shares[0].records), None)
    if other is not None:
        raise DataError(
            f"ranks 0 and {other} have read different records: a data file is not the same for both; give every "
            f"node the same files, and start again"
        )


class _Verdict(NamedTuple):
    """What a pack holds in the end, nothing if it has no tokens, and which of its samples were lost, and why."""

    tokens: int
    trained_tokens: int
    lost: Sequence[tuple[int, DataError]]


@dataclass(frozen=True)
class Planned:
    """A step whose pixels are being made. `loads` are the samples of the packs that this rank makes."""

    maker: BatchMaker
    names: Sequence[str]
    packs: Sequence[Sequence[int]]
    deal: Deal
    loads: Mapping[int, list[Future[Sample | Pair | DataError]]]
    findings: Findings
    end: Mapping[str, Any]

    def finish(self) -> Step:
        """Wait for the pixels. A sample whose media are bad leaves its micro-batch, where that is allowed."""
        verdicts, batches = self._exchanged()
        lost: set[int] = set()
        for number in sorted(verdicts):
            for i, error in verdicts[number].lost:
                self.findings.leave_out(error)
                lost.add(i)
        numbers = tuple(number for number in self.deal.own if number in batches)
        left = [verdict for verdict in verdicts.values() if verdict.tokens]
        return Step(
            batches=tuple(batches[number] for number in numbers),
            sample_ids=tuple(name for i, name in enumerate(self.names) if i not in lost),
            end=self.end,
            counts=dict(self.findings.counts),
            left_out=tuple(self.findings.left_out),
            numbers=numbers,
            unread=dict(self.findings.unread),
            of_all=Totals(sum(v.tokens for v in left), sum(v.trained_tokens for v in left), len(left)),
        )

    def _exchanged(self) -> tuple[dict[int, _Verdict], dict[int, Batch]]:
        """What has become of every pack, and the batches of those that this rank trains on."""
        peers = self.maker.peers
        verdicts, batches = self._made()
        for_team, for_others = (verdicts, batches), (verdicts, dict[int, Batch]())
        parcels = [for_team if rank in peers.team else for_others for rank in range(peers.pixels.size)]
        verdicts, batches = {}, {}
        for some_verdicts, some_batches in peers.pixels.route(parcels):
            verdicts |= some_verdicts
            batches |= some_batches
        return verdicts, batches

    def _made(self) -> tuple[dict[int, _Verdict], dict[int, Batch]]:
        """The packs that this rank makes, up to one with an error that ends the run."""
        verdicts, batches = dict[int, _Verdict](), dict[int, Batch]()
        for number, loads in self.loads.items():
            samples, lost = self._samples(number, loads)
            loads.clear()
            verdicts[number] = _Verdict(0, 0, lost)
            if samples:
                try:
                    batch = batches[number] = self.maker.encoder.pack(samples)
                    verdicts[number] = _Verdict(batch.tokens, batch.trained_tokens, lost)
                except DataError as error:  # an encoder's own; which sample it is, it says itself
                    lost.append((self.packs[number][0], NotItsFault(str(error))))
            if any(self.findings.ends_run(error) for _, error in lost):
                break
        return verdicts, batches

    def _samples(
        self, number: int, loads: Sequence[Future[Sample | Pair | DataError]]
    ) -> tuple[list[Sample | Pair], list[tuple[int, DataError]]]:
        """The samples of a pack, and the errors of those that are lost."""
        samples, lost = list[Sample | Pair](), list[tuple[int, DataError]]()
        for i, load in zip(self.packs[number], loads, strict=True):
            made = _result(load)
            if not isinstance(made, DataError):
                samples.append(made)
                continue
            lost.append((i, self.findings.for_others(made)))
            if self.findings.ends_run(made):
                return [], lost
        return samples, lost


def _result(load: Future[Sample | Pair | DataError]) -> Sample | Pair | DataError:
    try:
        return load.result()
    except DataError as error:  # no worker can be started
        return NotItsFault(str(error))


def passes(
    maker: BatchMaker, refs: Iterable[Ref], group: int, findings: Findings | None = None
) -> Iterator[tuple[Batch, ...]]:
    """These records once in their order, planned `group` at a time: for each group the micro-batches of this rank.

    All ranks ask for as many groups, where there may be nothing for one. What was left out is added to `findings`.
    """
    rest = iter(refs)
    while (planned := maker.begin_some(rest, group)) is not None:
        step = planned.finish()
        if findings is not None:
            findings.take_in(step)
        yield step.batches
    maker.tally.check(FEW_MEDIA)
