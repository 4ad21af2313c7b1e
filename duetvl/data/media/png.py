"""PNG files without what stands beside their pixels.

Pillow refuses a whole picture for a text or a colour profile that is large or damaged. None of it is needed but the
orientation, so Pillow is given the chunks of the picture alone; what is not needed is not even read.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

import numpy as np
from PIL import Image

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_END: Final = b"\0\0\0\0IEND\xae\x42\x60\x82"
_MOST_CHUNKS: Final = 1 << 20  # a bound for files that are made to hang
_MOST_TAGS: Final = 1 << 20  # bytes of a tag that may hold an orientation
_TAGS: Final = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_GREY, _RGB = 0, 2  # colour types


class _Chunk(NamedTuple):
    """A chunk as it is in the file. Of one that is cut off `whole` is what there is; `content` is empty if damaged."""

    kind: bytes
    whole: bytes

    @property
    def content(self) -> bytes:
        content, checksum = self.whole[8:-4], self.whole[-4:]
        good = struct.pack(">I", zlib.crc32(self.kind + content)) == checksum
        return content if good else b""


def open_png(file: BinaryIO, *, pixels: bool) -> Image.Image:
    """The picture of an open PNG file; without `pixels` they are not read, and it cannot be decoded.

    Its orientation is in `info`, wherever it stands in the file. Raises what Pillow raises.
    """
    header, hole, body, end = b"", None, [], b""
    tags: dict[bytes, bytes] = {}
    for chunk in _chunks(file, pixels):
        if chunk.kind == b"IDAT":
            body.append(chunk.whole)
        elif chunk.kind == b"tRNS" and not body:
            transparency, hole = _transparency(header, chunk)
            header += transparency
        elif chunk.kind in (b"IHDR", b"PLTE") and not body:
            header += chunk.whole
        elif chunk.kind == b"IEND":
            end = _END
        else:
            tags.update(_orienting(chunk))
    picture = Image.open(io.BytesIO(b"".join((SIGNATURE, header, *tags.values(), *body, end))), formats=["PNG"])
    if pixels and hole is not None:
        picture.load()
        samples = _deep_samples(b"".join((SIGNATURE, header, *body, end)))
        picture.putalpha(Image.fromarray((samples != hole).any(axis=-1).astype(np.uint8) * 255))
    return picture


def _chunks(file: BinaryIO, pixels: bool) -> Iterator[_Chunk]:
    """The chunks of a picture, or those that may turn it, up to the picture's end or that of a file that is cut off."""
    size = file.seek(0, os.SEEK_END)
    start = len(SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        file.seek(start)
        if start + 8 > size:
            return
        length, kind = struct.unpack(">I4s", file.read(8))
        # Of pixels that are not read, the length and kind alone.
        longest = {b"IDAT": length if pixels else -4, b"IHDR": 13, b"PLTE": 768, b"tRNS": 256, b"IEND": 0}.get(kind)
        if longest is None and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and length <= _MOST_TAGS:
            longest = length
        if longest is not None:
            file.seek(start)
            yield _Chunk(kind, file.read(min(min(length, longest) + 12, size - start)))
        if kind == b"IEND":
            return
        start += length + 12


def _transparency(header: bytes, chunk: _Chunk) -> tuple[bytes, tuple[int, ...] | None]:
    """The tRNS chunk in the values of Pillow's pixels, which have 8 bits; the transparent colour where those do not do.

    Pillow keeps 16 bits of grey alone.
    """
    depth, colour = header[16:18] if len(header) > 17 else (0, 0)
    count = {_GREY: 1, _RGB: 3}.get(colour, 0)
    if not count or len(chunk.content) < 2 * count or (depth == 16 and colour == _GREY):
        return chunk.whole, None
    most = (1 << depth) - 1
    values = [value & most for value in struct.unpack_from(f">{count}H", chunk.content)]
    if depth == 16:
        return b"", tuple(values)
    return _made(b"tRNS", struct.pack(f">{count}H", *(value * 255 // most for value in values))), None


def _orienting(chunk: _Chunk) -> dict[bytes, bytes]:
    """The chunk under its name, if it may hold an orientation: EXIF tags, or a text that holds them or XMP."""
    if chunk.kind == b"eXIf":
        return {chunk.kind: chunk.whole} if chunk.content else {}
    name, _, rest = chunk.content.partition(b"\0")
    if name not in _TAGS:
        return {}
    packed, text = False, rest
    if chunk.kind == b"zTXt":
        packed, text = True, rest[1:]
    elif chunk.kind == b"iTXt":
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    if packed:
        try:
            text = zlib.decompressobj().decompress(text, _MOST_TAGS)
        except zlib.error:
            return {}
    return {name: _made(b"tEXt", name + b"\0" + text)}


def _made(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _deep_samples(content: bytes) -> np.ndarray:
    """The colours (H, W, 3) of a PNG file of 16 bits, uint16. Pillow knows their upper bytes alone."""
    import av

    with av.open(io.BytesIO(content), format="png_pipe") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb48be")[..., :3]
