"""Files of JSON: one record a line, or a list of records. Every error names the file and the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.errors import DataError, shown
from duetvl.data.media.kinds import LFS_POINTER, LONGEST_HEAD, is_text, what_it_is
from duetvl.data.sources.records import LONGEST_LINE, SEARCH_BYTES, Places, Reading, Record

SHARD_BYTES: Final = 1 << 22  # what a stream reads of a file before it may turn to another
_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = re.compile(r"\s*")


@dataclass(frozen=True)
class JsonLines:
    """One record a line."""

    path: Path
    reading: Reading = field(default_factory=Reading)

    def places(self) -> Places:
        """Where the lines start that hold more than white space; numbered as an editor does."""
        ends, at = [], 0
        with open(self.path, "rb") as file:
            while piece := file.read(SEARCH_BYTES):
                ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + at + 1)
                at += len(piece)
            starts = np.concatenate([[0], *ends]).astype(np.int64)
            lengths = np.diff(np.append(starts, at))
            blank = [i for i in np.flatnonzero(lengths < 64) if not _line_at(file, int(starts[i])).strip()]
        if not blank:
            return Places(starts)
        keep = np.delete(np.arange(len(starts)), blank)
        return Places(starts[keep], None if _is_count(keep) else keep + 1)

    def shards(self) -> list[tuple[int, int]]:
        """Ranges of bytes; a line belongs to the one that it starts in."""
        size = self.path.stat().st_size
        return [(at, min(at + SHARD_BYTES, size)) for at in range(0, size, SHARD_BYTES)]

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """Lines that start in the range; their numbers are not known without reading all before them."""
        at = start if after is None else after + 1
        with open(self.path, "rb") as file:
            if at:
                file.seek(at - 1)
                at += _skip_line(file, stop - at + 1) - 1
            while at < stop:
                line = file.readline(LONGEST_LINE)
                length = len(line) if line.endswith(b"\n") else len(line) + _skip_line(file)
                if line.strip():
                    yield at, 0
                if not length:
                    return
                at += length

    def read(self, at: int, number: int = 0) -> Record:
        """Read one line."""
        where = f"{self.path}:{number}" if number else f"{self.path}: byte {at}"
        with open(self.path, "rb") as file:
            raw = _line_at(file, at)
        if len(raw) > LONGEST_LINE:
            raise DataError(f"{where}: the line has more than {LONGEST_LINE >> 20} MiB; are line ends missing?")
        try:
            values = _object(parse_json(raw, where), where)
        except DataError as error:
            cut = (
                ""
                if raw.rstrip(b" \r").endswith((b"\n", b"}"))
                else "; it is the last line and has no line end: the file may be cut off"
            )
            raise DataError(f"{error}{cut}") from None
        name = "" if number else f"byte {at}"
        return Record(self.path, number, where, values, self.reading, name)


@dataclass(frozen=True)
class JsonList:
    """A JSON file with a list of records, or with one alone. Finding them reads it whole; reading one does not."""

    path: Path
    reading: Reading = field(default_factory=Reading)

    def places(self) -> Places:
        """Where the elements of the list start."""
        raw = self.path.read_bytes()
        starts = _element_starts(raw)
        if starts is None:
            values = parse_json(raw, str(self.path))  # says what is wrong, and where
            raise DataError(f"{self.path}: expected a list of records, found {kind_of(values)}")
        return Places(starts)

    def shards(self) -> list[tuple[int, int]]:
        """The whole."""
        return [(0, self.path.stat().st_size)]

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """All elements, or those behind one."""
        starts = self.places().at
        first = 0 if after is None else int(np.searchsorted(starts, after, side="right"))
        for i in range(first, len(starts)):
            yield int(starts[i]), i + 1

    def read(self, at: int, number: int = 0) -> Record:
        """Read one element: as much of the file as it takes."""
        where = f"{self.path}: record {number}"
        with open(self.path, "rb") as file:
            size = 1 << 16
            while True:
                file.seek(at)
                raw = file.read(size)
                try:
                    values, _ = _UNIQUE.raw_decode(raw.decode("utf-8", errors="replace"))
                    break
                except _Contradiction as error:
                    raise DataError(f"{where}: {error}") from None
                except ValueError:
                    if len(raw) < size:
                        raise DataError(f"{where}: has changed since the file was indexed") from None
                    size *= 4
        return Record(self.path, number, where, _object(values, where), self.reading)


def open_json(path: Path, reading: Reading) -> JsonLines | JsonList:
    """A `.json` file may hold one record per line as well: what it starts with decides. Raises DataError for what is
    no text in UTF-8."""
    start = check_text(path).removeprefix(_BOM).lstrip()[:1]
    whole = start == b"[" or (start == b"{" and _is_one_object(path))
    return JsonList(path, reading) if whole else JsonLines(path, reading)


def check_text(path: Path) -> bytes:
    """The first bytes of a text file. Raises DataError where they are those of another kind of file."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: is text in UTF-16; save it as UTF-8")
    if not is_text(head[:LONGEST_HEAD]) or head.startswith(LFS_POINTER):
        what = what_it_is(head[:LONGEST_HEAD]).removesuffix("; its header is damaged")  # here that is not the matter
        if what or b"\0" in head[:16]:
            raise DataError(f"{path}: is not a file of records but {what or 'a binary file'}")
    return head


def _is_one_object(path: Path) -> bool:
    """Whether a file holds one object over several lines. Raises DataError for several such."""
    if path.stat().st_size > LONGEST_LINE:
        return False
    with open(path, "rb") as file:
        if _is_json(next((line for line in file if line.removeprefix(_BOM).strip()), b"")):
            return False
        file.seek(0)
        text = file.read().decode("utf-8-sig", errors="replace").strip()
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False  # lines, of which the first is damaged
    if end < len(text) and "\n" in text[:end]:
        raise DataError(f"{path}: has objects that span several lines; write one per line, or all as a list")
    return end == len(text)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def parse_json(raw: bytes, where: str) -> Any:
    """The value of a JSON text. Raises DataError that says what is wrong, and where."""
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_contradiction)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if b"\n" in raw.strip() else ""
        raise DataError(f"{where}: not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except _Contradiction as error:
        raise DataError(f"{where}: {error}") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise DataError(f"{where}: not JSON: {error}") from None


class _Contradiction(Exception):
    """An object of JSON that gives a key twice, with different values."""


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these pairs. Raises _Contradiction: of two values, whichever is taken, one is lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _Contradiction(f"the key {shown(key)} is given twice, with different values; keep one")
    return found


_UNIQUE: Final = json.JSONDecoder(object_pairs_hook=_without_contradiction)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")


def _object(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where}: expected an object, found {kind_of(values)}")
    return values


def _is_count(keep: np.ndarray) -> bool:
    """Whether only lines at the end are left out."""
    return len(keep) == 0 or int(keep[-1]) == len(keep) - 1


def _line_at(file: Any, start: int) -> bytes:
    """The line at a byte offset; one byte too long where it is longer than allowed."""
    file.seek(start)
    return file.readline(LONGEST_LINE + 1)


def _skip_line(file: Any, most: int = 1 << 62) -> int:
    """Go behind the next line end, or where it is not within `most` bytes so far; returns the bytes passed.

    A line may reach through many shards: each looks for its end within itself alone.
    """
    passed = 0
    while piece := file.readline(min(SEARCH_BYTES, most - passed)):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _element_starts(raw: bytes) -> np.ndarray | None:
    """Byte offsets of a list's elements; None where this is no list, or not JSON."""
    try:
        text = raw.decode("utf-8-sig")
        starts = _starts_in_text(text)
    except (ValueError, RecursionError, IndexError):
        return None
    if starts is None or raw.isascii():
        return starts
    shift = len(raw) - len(text.encode())
    pieces = zip(np.concatenate([[0], starts[:-1]]).tolist(), starts.tolist(), strict=True)
    return np.cumsum([len(text[a:b].encode()) for a, b in pieces], dtype=np.int64) + shift


def _starts_in_text(text: str) -> np.ndarray | None:
    decode, at = json.JSONDecoder().raw_decode, _space(text, 0)
    if text[at] == "{" and _space(text, decode(text, at)[1]) == len(text):
        return np.array([at], np.int64)
    if text[at] != "[":
        return None
    starts: list[int] = []
    at = _space(text, at + 1)
    if text[at] == "]" and _space(text, at + 1) == len(text):
        return np.zeros(0, np.int64)
    while True:
        starts.append(at)
        _, at = decode(text, at)
        at = _space(text, at)
        if text[at] == "]":
            return np.array(starts, np.int64) if _space(text, at + 1) == len(text) else None
        if text[at] != ",":
            return None
        at = _space(text, at + 1)


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
