"""What frames there are in a video file, by PyAV.

Frames are counted and timed by reading the packets, not the header: that holds for a changing frame rate, for a
missing duration and for frames that are in the file and not shown. One frame is decoded for its size and rotation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, NamedTuple

import av
import av.stream
import numpy as np

from duetvl.core.errors import DataError
from duetvl.data.media.containers import is_cut_off
from duetvl.data.media.images import Size, describe, media_content, readable
from duetvl.data.media.kinds import LONGEST_HEAD, what_it_is

_FALLBACK_RATE: Final = Fraction(25)  # of a stream that says nothing of time, as ffmpeg takes it


class VideoHeader(NamedTuple):
    """What the file's header says of the stream: frames (0: it does not say) and seconds."""

    frames: int
    seconds: float | None


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """The frames of a video file in the order in which they are shown.

    ticks (N,) int64 are their time stamps in units of `time_base` seconds, `keys` (N,) says where decoding may begin.
    Not `timed`: the file has no usable time stamps, and ticks are counted. size is that of the turned picture, `stream`
    the number of the stream in its file. `header` may say otherwise; None where there is none.
    """

    size: Size
    ticks: np.ndarray
    keys: np.ndarray
    time_base: Fraction
    duration: Fraction
    timed: bool
    stream: int = 0
    header: VideoHeader | None = None

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def fps(self) -> Fraction:
        """Frames per second, on average."""
        return len(self) / self.duration


class TimeLimit:
    """Seconds that reading a video may take, from now on; None for as many as it takes."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """Raise DataError where they are over."""
        if time.monotonic() > self._end:
            raise DataError(f"takes more than {self.seconds:g} seconds to decode; cut it or make its frames smaller")


def read_index(source: object, seconds: float | None = None) -> VideoIndex:
    """The frames of a video file (a path, bytes or a data URI). Raises DataError naming it.

    So it does where reading takes more than `seconds`.
    """
    with opened(source) as container:
        # Before packets are read: that changes what FFmpeg says of the header of some files.
        headers = {stream.index: _header(stream) for stream in container.streams.video}
        track = _film(container, TimeLimit(seconds))
        stream, first = track.stream, track.first
        if _lacks_frames(source, container, track):
            raise DataError(f"is cut off: {_shortfall(container, track)}")
        if first is None or not track.stamps:
            raise DataError("no frame of it can be decoded")
        turned = abs(first.rotation) % 180 == 90
        size = (first.width, first.height) if turned else (first.height, first.width)
        stamps, keys, common = track.stamps, np.array(track.keys, bool), (stream.index, headers[stream.index])
        if None in stamps or len(set(stamps)) < len(stamps):
            rate, count = _rate(stream), len(stamps)
            return VideoIndex(size, np.arange(count), keys, 1 / rate, count / rate, False, *common)
        ticks = np.array(stamps, np.int64)
        order = np.argsort(ticks)
        order = order[ticks[order] >= _begin(ticks, keys, first.pts)]
        duration = _duration(ticks[order], track.last[1], stream)
        return VideoIndex(size, ticks[order], keys[order], stream.time_base, duration, True, *common)


def _header(stream: Any) -> VideoHeader:
    seconds = None if stream.duration is None else float(stream.duration * stream.time_base)
    return VideoHeader(stream.frames, seconds)


def _begin(ticks: np.ndarray, keys: np.ndarray, first: int | None) -> int:
    """The tick of the first frame shown; those before it need frames that a stream cut in its middle begins after.

    Where even the first key frame cannot be decoded, the stream is damaged, and all of its frames count.
    """
    if first is None or not keys.any() or first > ticks[keys][0]:
        return int(ticks.min())
    return first


class _Track:
    """What the packets of a video stream say: time stamps of the frames shown, and whether decoding may begin there.

    `last` is the time stamp and the length of the last one, `first` a decoded frame. `whole` counts the packets that
    are undamaged, shown or not.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.stamps: list[int | None] = []
        self.keys: list[bool] = []
        self.last = (-(1 << 62), 0)
        self.first: Any = None
        self.whole = 0
        self.decodable = stream.codec_context is not None

    def add(self, packet: Any) -> None:
        if self.first is None and self.decodable:
            self.first = next((frame for frame in decoded(packet) if not frame.is_corrupt), None)
        if packet.size == 0 or packet.is_corrupt:
            return
        self.whole += 1
        if packet.is_discard:  # an edit list hides it
            return
        self.stamps.append(packet.pts)
        self.keys.append(packet.is_keyframe)
        if packet.pts is not None:
            self.last = max(self.last, (packet.pts, packet.duration or 0))


def _film(container: Any, limit: TimeLimit) -> _Track:
    """The video stream that a player shows, its packets read: none that is a cover picture, the default one if any.

    A stream of one picture gives way to one of several. Raises DataError where there is none.
    """
    videos, disposition = container.streams.video, av.stream.Disposition
    tracks = {stream.index: _Track(stream) for stream in videos if not stream.disposition & disposition.attached_pic}
    if not tracks:
        raise DataError("has only a cover picture" if videos else "has no video stream")
    for packet in container.demux([track.stream for track in tracks.values()]):
        limit.check()
        tracks[packet.stream.index].add(packet)

    def rank(track: _Track) -> tuple[bool, bool, bool]:
        several = len(track.stamps) > 1
        return several and track.decodable, several, bool(track.stream.disposition & disposition.default)

    film = max(tracks.values(), key=rank)
    if not film.decodable:
        raise DataError("has a video stream of a kind that FFmpeg cannot decode")
    return film


def _lacks_frames(source: object, container: Any, track: _Track) -> bool:
    """Whether the file ends before its last frame."""
    if container.format.name == "avi" and track.whole == track.stream.frames:
        return False  # sizes in AVI files are at times wrong
    with readable(source) as file:
        return is_cut_off(file, container.format.name)


def _shortfall(container: Any, track: _Track) -> str:
    """In words, what a file that is cut off lacks."""
    listed, there = track.stream.frames, len(track.stamps)
    if listed > there:
        return f"its index lists {listed} frames, {there} are there"
    end = float((track.last[0] + track.last[1]) * track.stream.time_base) if there else 0.0
    return f"{end:.1f} s of {(container.duration or 0) / av.time_base:.1f} s are there"


def _rate(stream: Any) -> Fraction:
    """Frames per second by the header."""
    return stream.average_rate or stream.guessed_rate or _FALLBACK_RATE


def _duration(ticks: np.ndarray, length: int, stream: Any) -> Fraction:
    """Seconds from the first frame to the end of the last."""
    if length <= 0 and len(ticks) > 1:
        length = int(np.median(np.diff(ticks)))
    if length <= 0:
        return 1 / _rate(stream)
    return (int(ticks[-1]) - int(ticks[0]) + length) * stream.time_base


def decoded(packet: Any) -> Iterator[Any]:
    """Frames that a packet completes. One that is damaged gives none: that shows where its frame is missed."""
    try:
        yield from packet.decode()
    except av.error.InvalidDataError:
        return


@contextmanager
def opened(source: object) -> Iterator[Any]:
    """The container. Whatever goes wrong becomes one DataError that names the file."""
    try:
        content = media_content(source)
        if content is None:
            raise DataError(f"a video cannot be a {type(source).__name__}; give a path, bytes, or a list of frames")
        on_disk = isinstance(content, Path)
        # What is in memory came from anywhere: a playlist in it must not lead to files of this machine.
        options = None if on_disk else {"protocol_whitelist": "none"}
        with av.open(f"file:{content}" if on_disk else content, options=options) as container:
            yield container
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{describe(source)}: no such file") from None
    except MemoryError:  # says nothing about the file
        raise
    except (av.error.FFmpegError, OSError, ValueError, EOFError, LookupError) as error:
        # PyAV looks up a stream by its number, which a damaged transport stream invents.
        found = _other_kind(source) if isinstance(error, av.error.InvalidDataError) else ""
        cause = f"it is {found}" if found else getattr(error, "strerror", None) or error
        raise DataError(f"{describe(source)}: is damaged or not a video: {cause}") from None


def _other_kind(source: object) -> str:
    """What a file is that is no video, in words; "" where it may be one."""
    with readable(source) as file:
        return what_it_is(file.read(LONGEST_HEAD), but_video=True)
