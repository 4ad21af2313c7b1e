"""JPEG files without the segments of applications that are damaged: Pillow refuses a whole picture for one."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, Final

SIGNATURE: Final = b"\xff\xd8\xff"
_MOST_SEGMENTS: Final = 1 << 12
_MOST_BYTES: Final = 1 << 30
_SCAN: Final = 0xDA
_TAGS: Final = 0xE1  # may hold the orientation
_ADOBE: Final = 0xEE  # says what the colours are
_BESIDE: Final = (*range(0xE0, 0xF0), 0xFE)  # of applications, and comments


def without_side_data(file: BinaryIO) -> io.BytesIO:
    """The picture of an open JPEG file, with its orientation, without whatever else stands beside the pixels."""
    file.seek(2)
    kept = [SIGNATURE[:2]]
    for _ in range(_MOST_SEGMENTS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] == _SCAN:
            kept.append(head)
            break
        content = file.read(max(0, struct.unpack(">H", head[2:])[0] - 2))
        if head[1] not in _BESIDE or head[1] == _TAGS or (head[1] == _ADOBE and len(content) >= 12):
            kept += [head, content]
    return io.BytesIO(b"".join([*kept, file.read(_MOST_BYTES)]))
