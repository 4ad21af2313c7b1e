"""Records of files that are read front to back, in an order that can be resumed at any record.

Files are cut into *shards* known from their sizes (ranges of bytes, row groups, whole tar files). An epoch is an
order of shards, fixed by (seed, epoch). A few shards are read in turn into a buffer, from which records are drawn at
random. The buffer holds where records lie, never the records: so the whole state is a small JSON mapping, and it
knows neither ranks nor workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from duetvl.core.errors import DataError
from duetvl.core.random import philox
from duetvl.data.loading.order import Mixture
from duetvl.data.sources.records import RecordFile, Ref, describe_os_error

OPEN_SHARDS: Final = 8  # read in turn, so that neighbours of a file or source do not come in a row
Shard = tuple[int, int, int]  # number of a file, and a range of places in it


class StreamSource:
    """The files and shards of data sets. Raises DataError for a file that cannot be looked at."""

    def __init__(self, files_per_source: Sequence[Sequence[RecordFile]]):
        self.files = [file for files in files_per_source for file in files]
        shards = [_shards(file) for file in self.files]
        self.shards: list[Shard] = [(number, *cut) for number, cuts in enumerate(shards) for cut in cuts]
        sizes = iter(len(cuts) for cuts in shards)
        self.counts = [sum(next(sizes) for _ in files) for files in files_per_source]
        """Shards of each source."""

    def refs(self) -> Iterator[Ref]:
        """All records in file order."""
        for file, start, stop in self.shards:
            yield from self.scan(file, start, stop)

    def scan(self, file: int, start: int, stop: int, after: int | None = None) -> Iterator[Ref]:
        """See `RecordFile.scan`."""
        try:
            for at, number in self.files[file].scan(start, stop, after):
                yield Ref(file, at, number)
        except OSError as error:
            raise describe_os_error(self.files[file].path, error) from None

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.path.stat().st_size for file in self.files)


def _shards(file: RecordFile) -> list[tuple[int, int]]:
    try:
        return file.shards()
    except OSError as error:
        raise describe_os_error(file.path, error) from None


class StreamCursor:
    """Goes through a stream, epoch by epoch: each record comes as often in an epoch as its shard does.

    position = {"epoch": ..., "next": shards of the epoch that were begun, "open": [[place in the epoch's order, place
    of the last record that was taken, or -1], ...], "buffer": [[file, place, number], ...], "draws": ..., "files": ...,
    "bytes": ...}; the latter two know the data.
    """

    def __init__(
        self,
        source: StreamSource,
        mixture: Mixture,
        *,
        buffer: int,
        position: Mapping[str, Any] | None = None,
    ):
        """`mixture` says which shards an epoch holds, and in which order. Without its shuffling records keep theirs."""
        self.source, self.mixture = source, mixture
        self.most, self.width = (buffer, OPEN_SHARDS) if mixture.shuffle else (1, 1)
        self._data = {"files": len(source.files), "bytes": source.bytes}
        self._epoch, self._next, self._draws = 0, 0, 0
        self._buffer: list[Ref] = []
        self._open: list[_Open] = []
        if position is not None:
            self._restore(position)

    @property
    def epoch(self) -> int:
        """The epoch of the next record."""
        return self._epoch

    def take(self, count: int) -> list[Ref]:
        """The next records."""
        return [self._draw() for _ in range(count)]

    def position(self) -> dict[str, Any]:
        """All there is to know, for JSON."""
        return {
            "epoch": self._epoch,
            "next": self._next,
            "open": [[shard.number, shard.after] for shard in self._open],
            "buffer": [list(ref) for ref in self._buffer],
            "draws": self._draws,
            **self._data,
        }

    def _restore(self, position: Mapping[str, Any]) -> None:
        if position.keys() != self.position().keys():
            raise DataError("the data position is not that of a stream; set data.streaming as it was")
        found = {key: position[key] for key in self._data}
        if found != self._data:
            raise DataError(
                f"has {self._data['bytes']} bytes in {_files(self._data['files'])}, but the checkpoint's data "
                "position is one of "
                f"{found['bytes']} bytes in {_files(found['files'])}"
            )
        self._epoch, self._next, self._draws = (int(position[key]) for key in ("epoch", "next", "draws"))
        self._buffer = [Ref(*map(int, ref)) for ref in position["buffer"]]
        self._open = [self._opened(int(number), int(after)) for number, after in position["open"]]

    def _draw(self) -> Ref:
        self._fill()
        if not self._buffer:
            self._begin_epoch()
        # A new generator for each draw: its number is all the state there is.
        bits = philox(self.mixture.seed, "stream", self._draws).bit_generator.random_raw()
        at = int(bits) % len(self._buffer)
        self._draws += 1
        drawn, last = self._buffer[at], self._buffer.pop()
        if at < len(self._buffer):
            self._buffer[at] = last
        return drawn

    def _begin_epoch(self) -> None:
        """The first epoch that holds a record: with weights below one, some may hold none."""
        for _ in range(1 + max(int(1 / weight) for weight in self.mixture.weights)):
            self._epoch, self._next = self._epoch + 1, 0
            self._fill()
            if self._buffer:
                return
        raise DataError(f"{', '.join(str(file.path) for file in self.source.files[:4])}: no records")

    def _fill(self) -> None:
        """Read until the buffer is full or the epoch is at its end."""
        order = self.mixture.epoch(self._epoch)
        while len(self._buffer) < self.most:
            while len(self._open) < self.width and self._next < len(order):
                self._open.append(self._opened(self._next, -1))
                self._next += 1
            if not self._open:
                return
            shard = self._open.pop(0)
            ref = next(shard.refs, None)
            if ref is not None:
                shard.after = ref.at
                self._buffer.append(ref)
                self._open.append(shard)

    def _opened(self, number: int, after: int) -> _Open:
        file, start, stop = self.source.shards[int(self.mixture.epoch(self._epoch)[number])]
        return _Open(number, after, self.source.scan(file, start, stop, None if after < 0 else after))


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"


class _Open:
    """A shard that is being read: its place in the epoch's order, the last record taken, and those to come."""

    def __init__(self, number: int, after: int, refs: Iterator[Ref]):
        self.number, self.after, self.refs = number, after, refs
