"""Whether a video file ends before its container says: by the sizes that the container's own elements state.

A header may count other frames than are shown (edit lists, dropped frames, a last frame that lasts long), so numbers
of frames and durations prove nothing. An element that holds frames and runs beyond the end of the file does.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO, Final, NamedTuple

_MOST_ELEMENTS: Final = 1 << 20  # far more than a film of ten hours has; a bound for files that are made to hang
_MP4_FRAMES: Final = (b"moov", b"mdat", b"moof", b"styp", b"sidx", b"prft", b"emsg")  # and what goes before them
_MATROSKA_SEGMENT: Final = 0x18538067
_MATROSKA_CLUSTER: Final = 0x1F43B675


class _Element(NamedTuple):
    """An element's end and where the next one begins; `frames`: it holds frames, `opens`: the next one lies in it."""

    end: int
    following: int
    frames: bool = False
    opens: bool = False


def is_cut_off(file: BinaryIO, container: str) -> bool:
    """Whether frames are missing at the end of a file of this FFmpeg format; False where nothing in it can tell.

    So they are where the end is there, but was never written, as in a download that reserves the space.
    """
    read = _READERS.get(container.split(",")[0])
    if read is None:
        return False
    there = file.seek(0, os.SEEK_END)
    promised = position = 0
    for _ in range(_MOST_ELEMENTS):
        if position + 8 > there:
            return promised > there
        file.seek(position)
        if not any(file.read(8)):
            return position < promised
        file.seek(position)
        element = read(file, position)
        if element is None:
            return False
        if element.opens:
            promised = element.end
        elif element.end > there:
            return element.frames
        position = element.following
    return False


def _mp4_box(file: BinaryIO, position: int) -> _Element | None:
    """A box; the last one may have the size 0, which is up to the end of the file."""
    size, kind = _unpacked(file, ">I4s") or (0, b"")
    if size == 1:
        size = (_unpacked(file, ">Q") or (0,))[0]
    end = position + size
    return _Element(end, end, kind in _MP4_FRAMES) if size >= 8 else None


def _avi_chunk(file: BinaryIO, position: int) -> _Element | None:
    """A chunk; one whose size was never filled in states nothing."""
    kind, size, form = _unpacked(file, "<4sI4s") or (b"", 0, b"")
    if kind == b"RIFF":  # some programs state its size wrong by a few bytes
        return _Element(0, position + 12, opens=True)
    if size == 0xFFFFFFFF or (size == 0 and kind == b"LIST"):
        return None
    end = position + 8 + size
    if (kind, form) == (b"LIST", b"movi"):
        return _Element(end, position + 12, opens=True)
    return _Element(end, end + size % 2, kind[:2].isdigit() or form == b"rec ")


def _matroska_element(file: BinaryIO, position: int) -> _Element | None:
    """An element; of one of unknown size, as in recordings of a live stream, nothing is stated."""
    name, size = _matroska_number(file, keep_marker=True), _matroska_number(file)
    if name is None or size is None:
        return None
    start = file.tell()
    if name == _MATROSKA_SEGMENT:
        return _Element(start + size, start, opens=True)
    return _Element(start + size, start + size, name == _MATROSKA_CLUSTER)


def _matroska_number(file: BinaryIO, *, keep_marker: bool = False) -> int | None:
    """A number of 1 to 8 bytes, whose first set bit says how many. None for an unknown one, whose bits are all set."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    if keep_marker:
        return value
    value &= (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value


def _unpacked(file: BinaryIO, form: str) -> tuple[Any, ...] | None:
    data = file.read(struct.calcsize(form))
    return struct.unpack(form, data) if len(data) == struct.calcsize(form) else None


_READERS: Final = {"mov": _mp4_box, "avi": _avi_chunk, "matroska": _matroska_element}
