"""The data side of a run: a recipe's data sets, and the steps and evaluations made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.batch import Batch, Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Encoder, Outcome
from duetvl.data.loading.ahead import StepLoader
from duetvl.data.loading.cache import CachedEncoder
from duetvl.data.loading.loader import BatchMaker, Findings, Packing, Step, passes
from duetvl.data.loading.order import Cursor, Mixture, RecordCursor, choice
from duetvl.data.loading.peers import Peers
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.stream import StreamCursor, StreamSource
from duetvl.data.loading.workers import Pool, make_pool
from duetvl.data.sources.catalog import Records, RecordSource, open_source, resolve
from duetvl.data.sources.fingerprint import FileFacts, Fingerprint
from duetvl.data.sources.records import Reading, RecordFile, Ref, describe_os_error, with_line
from duetvl.training.recipe.data_section import DataSection, DataSource
from duetvl.training.recipe.sections import Recipe

FIRST = 16  # samples that the estimate of memory is made from
_NAMED = 10  # records left out that are named one by one; the rest is counted


class DataSets:
    """The files of a recipe's data sets, found and looked through, not yet encoded. Raises DataError."""

    def __init__(self, data: DataSection):
        self.data = data
        self.files: list[RecordFile] = []
        if data.streaming:
            self._open_stream()
        else:
            self._open_records()
        if data.val:
            sources = as_sources(data, data.val)
            val = Records(sources, first_file=len(self.files))
            self.files += val.files
            self._val: tuple[Records, np.ndarray] | None = val, _numbers(val, sources, data.seed)
        if self._val is not None:
            records, numbers = self._val
            self._val = records, numbers[choice(data.seed, "val_max_samples", 0, len(numbers), data.val_max_samples)]

    def _open_stream(self) -> None:
        sources = as_sources(self.data, self.data.train)
        limited = next((source.path for source in sources if source.max_samples is not None), None)
        if limited is not None:
            raise DataError(f"{limited}: num_samples does not apply to a stream; set data.streaming to false")
        self._stream = StreamSource([open_source(source) for source in sources])
        self.files += self._stream.files
        self._mixture = self._mix(self._stream.counts)
        self._val = None

    def _open_records(self) -> None:
        sources = as_sources(self.data, self.data.train)
        self._records = Records(sources)
        self.files += self._records.files
        numbers = _numbers(self._records, sources, self.data.seed)[: self.data.max_samples]
        self._val = None
        if self.data.val_rate is not None:
            held = _share(len(numbers), self.data.val_rate, self.data.seed)
            self._val = self._records, numbers[held]
            numbers = np.delete(numbers, held)
        ends = np.searchsorted(numbers, np.cumsum([0, *self._records.counts]))
        self._mixture = self._mix(np.diff(ends).tolist())
        self._chosen = None if len(numbers) == len(self._records) else numbers

    def _mix(self, counts: Sequence[int]) -> Mixture:
        weights = [source.weight for source in self.data.train]
        return Mixture(counts, weights, seed=self.data.seed, shuffle=self.data.shuffle)

    @property
    def per_epoch(self) -> Fraction | None:
        """Records that an epoch sees, on average; None of a stream, which has not been counted."""
        return None if self.data.streaming else self._mixture.per_epoch

    @property
    def train_count(self) -> int | None:
        """Training records, whatever their weight; None of a stream."""
        return None if self.data.streaming else self._mixture.items

    @property
    def val_count(self) -> int:
        """Records of an evaluation."""
        return 0 if self._val is None else len(self._val[1])

    def fingerprint(self) -> Fingerprint:
        """What tells this data from another rank's: files by name, size and number of records (`check_same_data`)."""
        counts = {} if self.data.streaming else self._records.per_file
        counts |= {} if self._val is None else self._val[0].per_file
        try:
            return tuple(FileFacts(str(f.path), f.path.stat().st_size, counts.get(i)) for i, f in enumerate(self.files))
        except OSError as error:
            raise describe_os_error(error.filename, error) from None

    def cursor(self, position: Mapping[str, Any] | None = None) -> Cursor:
        """The order of the training records, from a position on. Raises DataError where it is one in other data."""
        if self.data.streaming:
            return StreamCursor(self._stream, self._mixture, buffer=self.data.shuffle_buffer, position=position)
        return RecordCursor(self._records, self._mixture, self._chosen, position)

    def train_refs(self) -> Iterator[Ref]:
        """Every training record once, in file order, whatever its weight."""
        if self.data.streaming:
            return self._stream.refs()
        numbers = range(len(self._records)) if self._chosen is None else self._chosen
        return (self._records.ref(int(number)) for number in numbers)

    def val_refs(self) -> Iterator[Ref] | None:
        """The records of an evaluation, in file order; None where there is none."""
        if self._val is None:
            return None
        records, numbers = self._val
        return (records.ref(int(number)) for number in numbers)


def as_sources(data: DataSection, given: Sequence[DataSource]) -> list[RecordSource]:
    """The recipe's data sets as the data side knows them."""
    plain = [RecordSource(source.path, reading_of(data, source), source.weight, source.max_samples) for source in given]
    return [resolve(source) for source in plain]


def reading_of(data: DataSection, source: DataSource) -> Reading:
    """How the records of a data set are meant."""
    root = data.image_root if source.image_root is None else source.image_root
    return Reading(source.format, source.columns, source.tags, root, source.boxes)


def _numbers(records: Records, sources: Sequence[RecordSource], seed: int) -> np.ndarray:
    """The records that `max_samples` of each source leaves, ascending."""
    first = np.cumsum([0, *records.counts])
    return np.concatenate(
        [
            first[i] + choice(seed, "max_samples", i, count, source.max_samples)
            for i, (count, source) in enumerate(zip(records.counts, sources, strict=True))
        ]
    )


def _share(count: int, rate: float, seed: int) -> np.ndarray:
    """Which of `count` records are kept for evaluation: at least one, and never all."""
    held = max(1, round(count * rate))
    if held >= count:
        raise DataError(
            f"data.val_rate {rate} of {count} records leaves none to train on; lower it, or give more records"
        )
    return choice(seed, "validation", 0, count, held)


class Feed:
    """Steps and evaluations of a recipe's data sets, and what is said of the records that give no sample."""

    def __init__(
        self,
        recipe: Recipe,
        sets: DataSets,
        encoder: Encoder,
        position: Mapping[str, Any] | None = None,
        *,
        peers: Peers | None = None,
    ):
        """Go to a position, by default the start. Raises DataError where it is one in other data.

        `peers` are the ranks of the run, by default this one alone. All of them call `started`, `next_step`,
        `val_batches` and `everything` alike.
        """
        data = recipe.data
        self.recipe, self.sets, self.encoder = recipe, sets, encoder
        self.position = sets.cursor(position).position()
        self._maker = SampleMaker(sets.files, CachedEncoder(encoder, data.cache) if data.cache else encoder)
        self._packing = Packing(data.pack_tokens, data.pack_patches, data.pack)
        self.peers = peers or Peers()
        self._pool: Pool
        self._loader: StepLoader
        self._told: set[str] = set()
        self._told_of_more = False
        self._told_unread: set[tuple[str, str]] = set()
        self.findings = Findings(data.on_bad_sample == "skip")

    @contextmanager
    def started(self, steps: int) -> Iterator[None]:
        """Make `steps` steps ahead of their use. The first is made at once: most bad data shows there.

        At the end the peers are left.
        """
        data = self.recipe.data
        self._pool = make_pool(self._maker, data.workers)
        cursor = self.sets.cursor(self.position)
        group = self.recipe.train.global_batch
        self._loader = StepLoader(
            self._batches(self._pool, self.peers), cursor, group, steps=steps, prefetch=data.prefetch
        )
        try:
            if steps:
                self._loader.wait()
            yield
        finally:
            self._pool.close()
            self._loader.close()
            self.peers.close()

    def next_step(self) -> Step:
        """The next step. `position` stays before it until `done` is called with it.

        Raises DataError for a record that ends the run, on all ranks alike, and BackendError where a rank has gone.
        """
        return self._loader.next_step()

    def done(self, step: Step) -> None:
        """The step has been trained on."""
        self.position = dict(step.end)
        self.findings.take_in(step)

    def news(self) -> Iterator[str]:
        """Lines about records since the last time: the first that gave no sample, and keys that are not read.

        Each comes once, however often the epochs come by it.
        """
        for key, words in self.findings.unread.items():
            if key not in self._told_unread:
                self._told_unread.add(key)
                yield with_line(words)
        for line in self.findings.left_out:
            if line in self._told or self._told_of_more:
                continue
            if len(self._told) < _NAMED:
                self._told.add(line)
                kind, _, message = line.partition(": ")
                yield f"left out, {kind}: {with_line(message)}"
            else:
                self._told_of_more = True
                yield "further records that are left out are counted (data_dropped, data_bad in metrics.jsonl)"
        self.findings.left_out.clear()

    def summary(self) -> str | None:
        """What has become of records in the whole run; None where all were good as they are."""
        counts = [f"{number} {kind}" for kind, number in sorted(self.findings.counts.items())]
        return f"records: {', '.join(counts)}" if counts else None

    @property
    def has_val(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.sets.val_count > 0

    def val_batches(self) -> Iterator[tuple[Batch, ...]]:
        """One evaluation: every record of the validation data once, in groups of `train.global_batch` records.

        A group is the micro-batches of this rank, of which another may have more or fewer. All ranks ask for as many
        groups; they may stop between two.
        """
        findings = Findings(self.findings.skip_bad, unread=self.findings.unread)
        maker = self._batches(self._pool, self.peers.for_passes())
        yield from passes(maker, self.sets.val_refs() or (), self.recipe.train.global_batch, findings)
        self.findings.left_out += findings.left_out

    @property
    def count(self) -> int:
        """Records of the training data and of the validation data; a stream's are not counted."""
        return (self.sets.train_count or 0) + self.sets.val_count

    @property
    def files(self) -> list[Path]:
        """Where they are read."""
        return [file.path for file in self.sets.files]

    def everything(self) -> Iterator[tuple[Batch, ...]]:
        """Every training record and every validation record once, apart from the run's own steps.

        In groups, as `val_batches`.
        """
        pool = make_pool(self._maker, self.recipe.data.workers)
        try:
            maker = self._batches(pool, self.peers.for_passes())
            for refs in (self.sets.train_refs(), self.sets.val_refs() or ()):
                yield from passes(maker, refs, self.recipe.train.global_batch)
        finally:
            pool.close()

    def first_drafts(self) -> list[Outcome]:
        """Drafts of a few training records, or why there is none, for an estimate of what a step takes."""
        return self._maker.drafts(list(islice(self.sets.train_refs(), FIRST)))

    def val_samples(self, count: int) -> list[Sample | Pair]:
        """The first `count` good samples of the validation data.

        Those that the recipe leaves out are passed over, as in an evaluation. Raises DataError for a bad one, unless
        those are skipped.
        """
        findings = Findings(self.findings.skip_bad)  # an evaluation names them
        refs, found = self.sets.val_refs() or iter(()), list[Sample | Pair]()
        while len(found) < count and (some := list(islice(refs, count - len(found)))):
            for outcome in self._maker.drafts(some):
                sample = outcome if isinstance(outcome, DataError) else self._maker.load(outcome)
                if isinstance(sample, DataError):
                    findings.leave_out(sample)
                else:
                    found.append(sample)
        return found

    def _batches(self, pool: Pool, peers: Peers) -> BatchMaker:
        return BatchMaker(pool, self.encoder, self._packing, self.findings.skip_bad, peers)
