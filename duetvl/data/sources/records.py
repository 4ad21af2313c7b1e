"""Records, the places they have in a file, and what a file of records offers.

A file of records (`RecordFile`) is described by its path alone. A *place* says where a record lies in it: a byte
offset, or in Parquet a row. So an index holds eight bytes a record, and a reader that knows a place can read the record
without an index: worker processes get places, and so does the state of a stream.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from duetvl.core.errors import DataError

LONGEST_LINE: Final = 1 << 28  # bytes of a record in a text file: pictures as base64 fit, a file without lines does not
SEARCH_BYTES: Final = 1 << 24  # looked through for line ends at a time
_BYTE: Final = re.compile(r"(?P<path>.+?): byte (?P<at>[0-9]+)\b", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """How the records of a source are meant: the fields of the recipe's `data.train` that encoding needs."""

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    image_root: str | None = None
    boxes: str = "as_written"
    media_dirs: tuple[str, ...] = ()  # of the data set, where media are looked for before the file's own directory


@dataclass(frozen=True)
class Record:
    """One record as it stands in its file."""

    file: Path
    number: int  # the line of a text file, the place in a list, the row of a table; from 1
    where: str  # file and place for an error message
    values: dict[str, Any]
    reading: Reading = field(default_factory=Reading)
    name: str = ""

    @property
    def id(self) -> str:
        """Names the record in messages: chat.jsonl:12."""
        return f"{self.file.name}:{self.name or self.number}"

    @property
    def media_dirs(self) -> tuple[Path, ...]:
        """Where relative paths of its pictures and videos are looked for, in this order.

        Under the source's `image_root`, or where it has none: in the data set's directory, the file's own, and the
        working directory, as LLaMA-Factory and MindSpeed-MM do.
        """
        if self.reading.image_root is not None:
            return (Path(self.reading.image_root),)
        return tuple(dict.fromkeys((*map(Path, self.reading.media_dirs), self.file.parent, Path())))


class Places(NamedTuple):
    """Of every record of a file, in order: its place (int64), and its number where that is not simply 1, 2, 3."""

    at: np.ndarray
    numbers: np.ndarray | None = None


class Ref(NamedTuple):
    """A record by the number of its file, its place there, and its number in the file (0: not known)."""

    file: int
    at: int
    number: int


class RecordFile(Protocol):
    """A file of records. Small and picklable: it holds no index."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def reading(self) -> Reading:
        """How its records are read."""
        ...

    def places(self) -> Places:
        """Find all records. Raises DataError where the file as a whole is damaged."""
        ...

    def shards(self) -> list[tuple[int, int]]:
        """Ranges of places that together make up the file, found without reading through it."""
        ...

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """Place and number of the records whose place lies in [start, stop), front to back.

        `after` is the place of a record that was had already: go on behind it.
        """
        ...

    def read(self, at: int, number: int = 0) -> Record:
        """The record at a place. Raises DataError naming file and line."""
        ...


def with_line(message: str) -> str:
    """The message with the line in the place of a byte offset, which a stream has to name a record by.

    The file is read up to there, so this is for messages that somebody will see.
    """
    found = _BYTE.match(message)
    if found is None or not Path(found["path"]).is_file():
        return message
    with open(found["path"], "rb") as file:
        pieces = iter(lambda: file.read(min(SEARCH_BYTES, int(found["at"]) - file.tell())), b"")
        line = 1 + sum(piece.count(b"\n") for piece in pieces)
    return f"{found['path']}:{line}{message[found.end() :]}"


def describe_os_error(path: str | os.PathLike[str], error: OSError) -> DataError:
    """A file that cannot be read."""
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
    return DataError(f"{path}: {reason}")
