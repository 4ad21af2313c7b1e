"""Tiny videos, written with PyAV.

Frame i is grey of level 10 + 20 (i mod 12), so that a decoded frame tells its number. Its left half is darker by 8, so
that a turned one shows.
"""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.stream
import numpy as np
from PIL import Image

MILLI = Fraction(1, 1000)


def level(number: int) -> int:
    return 10 + 20 * (number % 12)


def write_clip(
    path: Path,
    frames: int = 10,
    *,
    rate: int = 10,
    codec: str = "mpeg4",
    size: tuple[int, int] = (48, 64),
    times: list[int] | None = None,
    gop: int = 12,
    between: int = 0,
    turn: int | None = None,
    audio: bool = False,
    options: dict[str, Any] | None = None,
) -> Path:
    """A clip of size (height, width). times: milliseconds of each frame; between: B-frames; turn: rotation metadata."""
    with av.open(str(path), "w", **(options or {})) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.max_b_frames = between
        if times is not None:
            stream.codec_context.time_base = MILLI
        if turn is not None:
            stream.set_display_rotation(turn)
        if audio:
            _add_silence(container)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], MILLI
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def picture(number: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    pixels = np.full((*size, 3), level(number), np.uint8)
    pixels[:, : size[1] // 2] -= 8
    return pixels


def levels(images: list[Image.Image]) -> list[int]:
    """The levels of decoded frames, to the nearest that `write_clip` paints."""
    means = [float(np.asarray(image).mean()) + 4 for image in images]
    return [round((mean - 10) / 20) * 20 + 10 for mean in means]


def trim(path: Path, start: float = 0.0, seconds: float | None = None) -> Path:
    """Hides frames of an MP4 file by its edit list, as a trim without encoding does; the frames stay in the file."""
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12  # behind version and number of edits: length, start, rate
    movie, media = (struct.unpack_from(">I", content, content.index(kind) + 16)[0] for kind in (b"mvhd", b"mdhd"))
    length, begin = struct.unpack_from(">Ii", content, place)
    shown = length - round(start * movie) if seconds is None else round(seconds * movie)
    struct.pack_into(">Ii", content, place, shown, begin + round(start * media))
    path.write_bytes(content)
    return path


def write_with_still(path: Path, frames: int = 20, *, attached: bool = False, codec: str = "libx264") -> Path:
    """A clip whose first video stream is a white picture: a cover (`attached`) or a stream of one frame."""
    with av.open(str(path), "w") as container:
        still, film = container.add_stream("mjpeg", rate=10), container.add_stream(codec, rate=10)
        still.height, still.width, still.pix_fmt = 32, 32, "yuvj420p"
        film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        if attached:
            still.disposition = av.stream.Disposition.attached_pic
        for stream, pictures in (
            (still, [np.full((32, 32, 3), 255, np.uint8)]),
            (film, [picture(number) for number in range(frames)]),
        ):
            for pixels in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    return path


def _add_silence(container: Any) -> None:
    """An audio stream, before the video's packets."""
    stream = container.add_stream("aac", rate=16000)
    for _ in range(20):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
