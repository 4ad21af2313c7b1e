"""Records in tables: TSV, and Parquet through pyarrow."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from duetvl.core.errors import DataError, shown
from duetvl.data.sources.records import LONGEST_LINE, Places, Reading, Record

_MOST_LINES: Final = 1000  # of one row of a TSV file: more mean a quote that nobody closes
_QUOTED: Final = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=\t|$)')
_KEPT_BYTES: Final = 1 << 28  # of row groups that a process keeps


@dataclass(frozen=True)
class TsvFile:
    """Tab-separated values under a line of names. A field in double quotes may hold tabs and line ends."""

    path: Path
    reading: Reading = field(default_factory=Reading)

    def places(self) -> Places:
        """Where the rows start, and on which lines."""
        found = np.array(list(self.scan(0, self.path.stat().st_size)), np.int64).reshape(-1, 2)
        return Places(found[:, 0].copy(), found[:, 1].copy())

    def shards(self) -> list[tuple[int, int]]:
        """The whole: a quote may reach over any number of lines."""
        return [(0, self.path.stat().st_size)]

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """Rows below the line of names. Reads from the front, to number the lines."""
        for at, line, _ in self._below_names():
            if after is None or at > after:
                yield at, line

    def _below_names(self) -> Iterator[tuple[int, int, bytes]]:
        """Place, line and bytes of every row that is not blank."""
        line, at = 1, 0
        with open(self.path, "rb") as file:
            while row := _row(file, f"{self.path}:{line}"):
                if at > 0 and row.strip():
                    yield at, line, row
                at, line = at + len(row), line + row.count(b"\n")

    def read(self, at: int, number: int = 0) -> Record:
        """Read one row; all values are texts."""
        with open(self.path, "rb") as file:
            names = self._names(file)
            file.seek(at)
            return self._record(names, _row(file, f"{self.path}:{number}"), number)

    def records(self) -> Iterator[tuple[int, Record]]:
        """All rows with their places, read once from front to back."""
        with open(self.path, "rb") as file:
            names = self._names(file)
        for at, line, row in self._below_names():
            yield at, self._record(names, row, line)

    def _names(self, file: Any) -> list[str]:
        """The names of the columns, from the front of the file."""
        names = _fields(_row(file, f"{self.path}:1"), f"{self.path}:1")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{self.path}:1: two columns are named {shown(twice)}; name each once")
        return names

    def _record(self, names: list[str], row: bytes, number: int) -> Record:
        where = f"{self.path}:{number}"
        values = _fields(row, where)
        if len(values) != len(names):
            raise DataError(f"{where}: has {len(values)} fields, but the header has {len(names)}")
        return Record(self.path, number, where, dict(zip(names, values, strict=True)), self.reading)


def _row(file: Any, where: str) -> bytes:
    """The bytes of the next row: a line, or several where a quoted field holds line ends."""
    row = b""
    for _ in range(_MOST_LINES):
        row += file.readline(LONGEST_LINE + 1)
        if len(row) > LONGEST_LINE:
            raise DataError(f"{where}: the row has more than {LONGEST_LINE >> 20} MiB; are line ends missing?")
        if b'"' not in row or _split(row.decode("utf-8", errors="replace")) is not None:
            return row
        if not row.endswith(b"\n"):
            break
    raise DataError(f"{where}: a field starts with a double quote that is never closed")


def _fields(row: bytes, where: str) -> list[str]:
    try:
        fields = _split(row.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    assert fields is not None, "rows are read whole"
    return fields


def _split(row: str) -> list[str] | None:
    """The fields of a row; None where a quoted one is not closed."""
    if '"' not in row:
        row = row.rstrip("\r\n")
    elif row.endswith("\n"):  # not by a regular expression, which reads through the pictures
        row = row[:-1].removesuffix("\r")
    fields, at = [], 0
    while True:
        quoted = _QUOTED.match(row, at) if row.startswith('"', at) else None
        if quoted:
            fields.append(quoted[1].replace('""', '"'))
            at = quoted.end()
        elif row.startswith('"', at):
            return None
        else:
            end = row.find("\t", at)
            fields.append(row[at:] if end < 0 else row[at:end])
            at = len(row) if end < 0 else end
        if at >= len(row):
            return fields
        at += 1


@dataclass(frozen=True)
class ParquetFile:
    """A Parquet file; a record is a row. Row groups are read whole, and the last ones are kept."""

    path: Path
    reading: Reading = field(default_factory=Reading)

    def places(self) -> Places:
        """The numbers of the rows."""
        return Places(np.arange(self._ends()[-1], dtype=np.int64))

    def shards(self) -> list[tuple[int, int]]:
        """The row groups."""
        ends = [int(end) for end in self._ends()]
        return list(pairwise(ends))

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """Rows, without looking at them."""
        for row in range(start if after is None else after + 1, stop):
            yield row, row + 1

    def read(self, at: int, number: int = 0) -> Record:
        """Read one row, by way of its row group."""
        ends = self._ends()
        group = int(np.searchsorted(ends, at, side="right")) - 1
        where = f"{self.path}: row {at + 1}"
        try:
            table = _groups.get(_version(self.path), group)
            values = table.slice(at - int(ends[group]), 1).to_pylist()[0]
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise DataError(f"{where}: its row group cannot be read: {error}") from None
        return Record(self.path, at + 1, where, values, self.reading)

    def _ends(self) -> np.ndarray:
        """(groups + 1,) the row that each row group starts at, and the number of rows."""
        return _row_group_ends(_version(self.path))


class _Version(NamedTuple):
    """A file as it is now: what is kept of it is not that of another one that took its place."""

    path: Path
    size: int
    changed: int


def _version(path: Path) -> _Version:
    state = path.stat()
    return _Version(path, state.st_size, state.st_mtime_ns)


@cache
def _row_group_ends(version: _Version) -> np.ndarray:
    meta = _open_parquet(version.path).metadata
    return np.cumsum([0, *(meta.row_group(i).num_rows for i in range(meta.num_row_groups))])


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'duetvl[parquet]' (importing it says: {error})"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file, or cut off: {error}") from None


class _RowGroups:
    """The row groups that were read last, up to a number of bytes, and at least one."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[_Version, int], Any] = OrderedDict()
        self._lock = threading.Lock()  # an evaluation reads while the next steps are made

    def get(self, version: _Version, group: int) -> Any:
        """A row group as a table."""
        key = (version, group)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _open_parquet(version.path).read_row_group(group, use_threads=False)
                while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


_groups = _RowGroups()
