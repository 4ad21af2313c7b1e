"""The files that a recipe's data sets name, and their records by number."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from duetvl.core.errors import DataError
from duetvl.data.formats.dataset_info import INFO_NAME, info_names, read_dataset_info
from duetvl.data.sources.json_files import check_text, open_json
from duetvl.data.sources.records import Places, Reading, Record, RecordFile, Ref, describe_os_error
from duetvl.data.sources.spelling import on_disk, spellings
from duetvl.data.sources.tables import ParquetFile, TsvFile
from duetvl.data.sources.tar import TarShard

SUFFIXES: Final = (".json", ".jsonl", ".ndjson", ".parquet", ".tsv", ".tar")


@dataclass(frozen=True)
class RecordSource:
    """One data set of a recipe: where it lies, how it is meant, how much of it an epoch sees."""

    path: str
    reading: Reading = field(default_factory=Reading)
    weight: float = 1.0
    max_samples: int | None = None
    files: tuple[Path, ...] | None = None  # where they are known already


AnySource = RecordSource | str | os.PathLike[str]


def open_source(source: AnySource) -> list[RecordFile]:
    """The files of a data set: one, those that match a pattern, or those in a directory. Raises DataError."""
    source = as_source(source)
    try:
        paths = _paths(source.path) if source.files is None else source.files
    except OSError as error:
        raise describe_os_error(source.path, error) from None
    return [_open(path, source.reading) for path in paths]


def resolve(source: RecordSource) -> RecordSource:
    """What an entry `dataset_info.json:NAME` says, as a source of its own; another source as it is.

    The recipe's own layout, columns and tags come first, and so does its `max_samples`. Raises DataError.
    """
    if Path(source.path).name == INFO_NAME:
        names = info_names(source.path)
        raise DataError(f"{source.path}: lists data sets, name one of them: {source.path}:NAME ({names})")
    path, colon, name = source.path.rpartition(":")
    if not colon or not path.endswith(".json"):
        return source
    path = str(on_disk(Path(path)) or path)
    info = read_dataset_info(path, name)
    own = source.reading
    reading = replace(
        own,
        format=info.format if own.format == "auto" else own.format,
        columns={**info.columns, **own.columns},
        tags={**info.tags, **own.tags},
        media_dirs=(os.path.dirname(path),),
    )
    most = info.num_samples if source.max_samples is None else source.max_samples
    return replace(source, files=info.files, reading=reading, max_samples=most)


def as_source(source: AnySource) -> RecordSource:
    """A path stands for a source with defaults."""
    return source if isinstance(source, RecordSource) else RecordSource(os.fspath(source))


def _paths(path: str) -> list[Path]:
    path = str(on_disk(Path(path)) or path)
    if glob.has_magic(path) and not os.path.exists(path):
        matches = {name for pattern in spellings(path) for name in glob.glob(pattern, recursive=True)}
        found = [Path(name) for name in sorted(matches) if os.path.isfile(name)]
        if not found:
            raise DataError(f"{path}: no file matches this pattern")
        return found
    if os.path.isdir(path):
        found = [
            entry
            for entry in sorted(Path(path).iterdir())
            if entry.suffix in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
        ]
        if not found:
            raise DataError(f"{path}: a directory without files of records ({', '.join(SUFFIXES)})")
        return found
    return [Path(path)]


def _open(path: Path, reading: Reading) -> RecordFile:
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading it could wait for ever, and what is read is gone
            raise DataError(f"{path}: is not a file but a FIFO, a socket or a device; write the records to a file")
        if not size:
            raise DataError(f"{path}: is empty: it has no records")
        if path.suffix == ".parquet":
            return ParquetFile(path, reading)
        if path.suffix == ".csv":
            raise DataError(
                f"{path}: comma-separated values are not supported; save it as .tsv (tabs), JSONL or Parquet"
            )
        if path.suffix == ".tsv":
            check_text(path)
            return TsvFile(path, reading)
        return TarShard(path, reading) if path.suffix == ".tar" else open_json(path, reading)
    except OSError as error:
        raise describe_os_error(path, error) from None


class Records:
    """The records of data sets by number, one file after the other. Holds eight bytes of each."""

    def __init__(self, sources: Sequence[AnySource], *, first_file: int = 0):
        """Find the records; what is in them is looked at when they are read. Raises DataError.

        `first_file` is the number of the first file in the `Ref`s.
        """
        per_source = [open_source(source) for source in sources]
        self.files = [file for files in per_source for file in files]
        self.first_file = first_file
        self._places = [_places(file) for file in self.files]
        self._ends = np.cumsum([0, *(len(places.at) for places in self._places)])
        ends = np.cumsum([0, *map(len, per_source)])
        self.counts = [int(self._ends[b] - self._ends[a]) for a, b in pairwise(ends)]
        """How many records each source has."""
        for source, count in zip(sources, self.counts, strict=True):
            if not count:
                raise DataError(f"{as_source(source).path}: no records")
        if not len(self):
            raise DataError("no data set is given")

    def __len__(self) -> int:
        """Records of all files."""
        return int(self._ends[-1])

    @property
    def per_file(self) -> dict[int, int]:
        """Records of each file, by the file's number in the `Ref`s."""
        return {self.first_file + number: len(places.at) for number, places in enumerate(self._places)}

    def ref(self, index: int) -> Ref:
        """Where a record is to be read."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right")) - 1
        inside = index - int(self._ends[file])
        places = self._places[file]
        number = inside + 1 if places.numbers is None else int(places.numbers[inside])
        return Ref(self.first_file + file, int(places.at[inside]), number)

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises DataError naming file and line."""
        file, at, number = self.ref(index)
        return self.files[file - self.first_file].read(at, number)

    def __iter__(self) -> Iterator[Record]:
        """Read all records, one at a time."""
        return (self[index] for index in range(len(self)))


def _places(file: RecordFile) -> Places:
    try:
        return file.places()
    except OSError as error:
        raise describe_os_error(file.path, error) from None
