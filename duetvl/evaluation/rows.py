"""Rows of a benchmark's data: what the columns hold, and pictures when they are asked for."""

from __future__ import annotations

import ast
import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Protocol

from duetvl.core.errors import DataError, shown
from duetvl.data.sources.catalog import Records
from duetvl.data.sources.records import Record
from duetvl.evaluation.media import find_medium
from duetvl.evaluation.profiles import Medium

# What pandas reads as a missing value, and VLMEvalKit with it: such an option vanishes from its prompt.
MISSING_IN_PANDAS: Final = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A row without its pictures. `cells` are those that are not empty; `cluster` names what its pictures are."""

    id: str
    where: str
    cells: Mapping[str, Any]
    cluster: str

    @cached_property
    def options(self) -> dict[str, str]:
        """The columns that are named by a capital letter."""
        return {name: self.text(name) for name in sorted(self.cells) if _is_letter(name)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Cells that VLMEvalKit takes for empty ones."""
        return tuple(
            f"VLMEvalKit reads {name} {value!r} as missing"
            for name, value in self.cells.items()
            if (_is_letter(name) or name in ("question", "answer", "hint")) and str(value) in MISSING_IN_PANDAS
        )

    def text(self, name: str) -> str:
        """A cell as text; empty where there is none."""
        return str(self.cells.get(name, ""))

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a cell that is a list, or has one written in it; or the one text that it is."""
        cell = self.cells.get(name, "")
        listed = listed_texts(cell) if isinstance(cell, str) else cell
        return tuple(map(str, listed)) if isinstance(listed, list | tuple) else (str(cell),)


class Rows(Protocol):
    """The rows of a data set, and the names of its columns."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def pictures(self, number: int) -> tuple[Medium, ...]:
        """The pictures of a row: bytes of their files, or paths. Raises DataError for what is missing or damaged."""
        ...


class RecordRows:
    """Records of JSON, JSONL or Parquet; a picture is a path, a data URI, bytes, or an object with `bytes` or `path`.

    Its columns are the keys of the first record.
    """

    def __init__(self, path: Path, *, image: str | None = None, index: str | None = None) -> None:
        """Rows without an `index` are numbered from 1. Raises DataError where two have the same."""
        self._image, self._index = image, index
        self._records = Records([path])
        self.columns = tuple(self._records[0].values)
        if index is not None:
            require_unique((row.id, row.where) for row in map(self.__getitem__, range(len(self))))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> Row:
        record = self._records[number]
        pictures = record.values.pop(self._image, None) if self._image else None
        cells = {name: value for name, value in record.values.items() if value not in (None, "")}
        row_id = number + 1 if self._index is None else cells.get(self._index, "")
        return Row(str(row_id), record.where, cells, cluster_of(pictures or record.where))

    def pictures(self, number: int) -> tuple[Medium, ...]:
        """See `Rows`."""
        record = self._records[number]
        value = record.values.get(self._image) if self._image else None
        entries = value if isinstance(value, list) else [value]
        return tuple(_medium(entry, record) for entry in entries) if self._image else ()


def _medium(entry: Any, record: Record) -> Medium:
    if isinstance(entry, dict):
        entry = entry.get("bytes") or entry.get("path")
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str) or not entry:
        raise DataError(f"{record.where}: has no picture but {shown(entry)}")
    return decoded(entry, record.where) if entry.startswith("data:") else find_medium(entry, record.media_dirs)


def require_unique(ids: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The number of each id; ids come with where they stand. Raises DataError for one that comes twice."""
    numbers: dict[str, int] = {}
    places: list[str] = []
    for number, (row_id, where) in enumerate(ids):
        places.append(where)
        first = numbers.setdefault(row_id, number)
        if first != number:
            raise DataError(f"{where}: its id {shown(row_id)} is that of {places[first]} too; each row needs its own")
    return numbers


def cluster_of(pictures: Any) -> str:
    """A short name of what pictures are; equal ones have the same."""
    content = pictures if isinstance(pictures, bytes) else str(pictures).encode()
    return blake2b(content, digest_size=8).hexdigest()


def _is_letter(name: str) -> bool:
    return len(name) == 1 and "A" <= name <= "Z"


def listed_texts(cell: str) -> tuple[str, ...] | None:
    """The items of a list, as Python writes it or JSON writes texts and numbers; None for another text."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return None
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return tuple(map(str, values)) if isinstance(values, list) else None


def decoded(text: str, where: str) -> bytes:
    """The bytes of base64, with or without `data:...,` in front. Raises DataError."""
    start = text.find(",") + 1 if text.startswith("data:") else 0
    try:
        return base64.b64decode(text[start:])
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: its picture is not base64, or cut off: {error}") from None
