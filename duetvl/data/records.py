"""Records of JSON and JSONL files, read when they are asked for; every error names the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.errors import DataError

_SEARCH = 1 << 24  # bytes looked through for line ends at a time


@dataclass(frozen=True)
class Reading:
    """How the records of a source are meant: the fields of the recipe's `data.train` that encoding needs."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    image_root: str | None = None
    boxes: str = "as_written"


@dataclass(frozen=True)
class Record:
    """One conversation as it stands in its file."""

    file: Path
    number: int  # the line of a JSONL file, the place in the list of a JSON file; both from 1
    where: str  # file and place for an error message
    values: dict[str, Any]
    reading: Reading = field(default_factory=Reading)

    @property
    def id(self) -> str:
        """Names the record in messages: chat.jsonl:12."""
        return f"{self.file.name}:{self.number}"

    @property
    def media_dir(self) -> Path:
        """Where relative paths of its pictures and videos start."""
        return self.file.parent if self.reading.image_root is None else Path(self.reading.image_root)


class Records:
    """The records of several files, one after the other."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]):
        """Find the records; what is in them is looked at when they are read. Raises DataError."""
        self.files = [_open(Path(path)) for path in paths]
        self._ends = np.cumsum([len(file) for file in self.files])
        if not len(self):
            raise DataError(f"{', '.join(str(path) for path in paths)}: no records")

    def __len__(self) -> int:
        """Records of all files."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        """Read one record. Raises DataError naming file and line."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[at].read(index - (int(self._ends[at - 1]) if at else 0))

    def __iter__(self) -> Iterator[Record]:
        """Read all records, one at a time."""
        return (self[index] for index in range(len(self)))


class _Lines:
    """A JSONL file: where its lines start, and nothing of what they hold."""

    def __init__(self, path: Path):
        self.path = path
        self._starts, self._numbers = _non_blank_lines(path)

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> Record:
        number = int(self._numbers[index])
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[index]))
            raw = file.readline()
        where = f"{self.path}:{number}"
        return Record(self.path, number, where, _conversation(_parse(raw, where), where))


class _List:
    """A JSON file with a list of records, which has to be read whole."""

    def __init__(self, path: Path):
        self.path = path
        values = _parse(path.read_bytes(), str(path))
        if not isinstance(values, list):
            raise DataError(f"{path}: expected a list of records, found {_kind(values)}")
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def read(self, index: int) -> Record:
        where = f"{self.path}: record {index + 1}"
        return Record(self.path, index + 1, where, _conversation(self._values[index], where))


def _open(path: Path) -> _Lines | _List:
    try:
        return _List(path) if _is_list(path) else _Lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _is_list(path: Path) -> bool:
    """A `.json` file may hold one record per line as well: what it starts with decides."""
    with open(path, "rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[")


def _non_blank_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets and numbers (from 1) of the lines that hold more than white space."""
    ends, at = [], 0
    with open(path, "rb") as file:
        while piece := file.read(_SEARCH):
            ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + at + 1)
            at += len(piece)
        starts = np.concatenate([[0], *ends]).astype(np.int64)
        lengths = np.diff(np.append(starts, at))
        blank = [i for i in np.flatnonzero(lengths < 64) if not _line(file, int(starts[i]))]
    keep = np.delete(np.arange(len(starts)), blank)
    return starts[keep], keep + 1


def _line(file: Any, start: int) -> bytes:
    file.seek(start)
    return file.readline().strip()


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in raw.strip() else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None


def _conversation(values: Any, where: str) -> dict[str, Any]:
    """The record, when it has the one key that all have."""
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object with 'messages', found {_kind(values)}")
    if "messages" not in values:
        found = ", ".join(repr(key) for key in list(values)[:8]) or "nothing"
        raise DataError(f"{where}: has no 'messages'; found {found}")
    if not isinstance(values["messages"], list) or not values["messages"]:
        raise DataError(f"{where}: 'messages' must be a list of at least one message")
    return values


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
