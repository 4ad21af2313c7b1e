"""From records to the micro-batches of a step.

A step is a function of the position alone, which is why a checkpoint needs nothing else to go on exactly, and why
the next step can be made in a thread while the device is busy with this one. The thread runs numpy, Pillow and the
tokenizer, never a framework: MindSpore's engine must be touched by one thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import DataError
from duetvl.data.packing import Order, Position, pack
from duetvl.data.records import Record, Records

Encode = Callable[[Record], Sample]
Pack = Callable[[Sequence[Sample]], Batch]


@dataclass(frozen=True, eq=False)
class Step:
    """What one optimizer step sees. `end` is the position after it."""

    batches: tuple[Batch, ...]
    sample_ids: tuple[str, ...]
    end: Position

    @property
    def tokens(self) -> int:
        """Real tokens of all micro-batches."""
        return sum(batch.tokens for batch in self.batches)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss is summed over."""
        return sum(batch.trained_tokens for batch in self.batches)


@dataclass(frozen=True)
class Batcher:
    """Encodes records and lays them into micro-batches of at most `pack_tokens` tokens."""

    records: Records
    encode: Encode
    pack: Pack
    pack_tokens: int
    longest: int

    def batches(self, chosen: Sequence[int]) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
        """Micro-batches of the chosen records, and the names of all their samples in order."""
        samples = [self.encode(self.records[number]) for number in chosen]
        for sample in samples:
            check_length(sample, self.longest)
        packs = pack([len(sample) for sample in samples], self.pack_tokens)
        made = tuple(self.pack([samples[i] for i in members]) for members in packs)
        return made, tuple(sample.id for sample in samples)


def check_length(sample: Sample, longest: int) -> None:
    """Raise DataError for a sample of more tokens than are allowed."""
    if len(sample) > longest:
        raise DataError(
            f"sample {sample.id} has {len(sample)} tokens, the longest may have {longest}; raise data.cutoff_len (such "
            f"a sample is a micro-batch of its own where it exceeds data.pack_tokens), or say with data.too_long what "
            f"becomes of it"
        )


class StepLoader:
    """The steps of a run, from a position on; the next one is made while the last one is used."""

    def __init__(self, batcher: Batcher, order: Order, global_batch: int, position: Position | None = None):
        """Start making the step at `position`, by default the first."""
        self.batcher = batcher
        self.order = order
        self.global_batch = global_batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duetvl-data")
        self._next: Future[Step] = self._thread.submit(self.make, position or Position())

    def make(self, position: Position) -> Step:
        """The step that starts at `position`."""
        chosen, end = self.order.take(position, self.global_batch)
        batches, ids = self.batcher.batches(chosen)
        return Step(batches, ids, end)

    def next_step(self, *, last: bool = False) -> Step:
        """The next step; starts making the one after it, unless this is the last."""
        step = self._next.result()
        if not last:
            self._next = self._thread.submit(self.make, step.end)
        return step

    def wait(self) -> None:
        """Wait until the next step is made; what is wrong with its records is raised here."""
        self._next.result()

    def close(self) -> None:
        """Stop the thread."""
        self._next.cancel()
        self._thread.shutdown(wait=True)


def passes(batcher: Batcher, group: int) -> Iterator[Batch]:
    """All records once in file order, planned `group` at a time: what an evaluation sees."""
    for start in range(0, len(batcher.records), group):
        yield from batcher.batches(range(start, min(start + group, len(batcher.records))))[0]
