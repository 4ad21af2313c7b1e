"""Video files by PyAV: what frames there are, which of them are taken, and their pictures.

Frames are counted and timed by reading the packets, not the header: that holds for a changing frame rate, for a
missing duration and for a file that ends early. One frame is decoded for its size and rotation. The rules that choose
frames go by the number of a frame, as those of qwen-vl-utils and LLaMA-Factory do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import av
import numpy as np
from PIL import Image

from duetvl.core.errors import DataError
from duetvl.data.conversation import VideoPart
from duetvl.data.media.images import Size, describe, media_content

_FALLBACK_RATE: Final = Fraction(25)  # of a stream that says nothing of time, as ffmpeg takes it
_WORTH_A_SEEK: Final = 16  # frames that need not be decoded
_TURNS: Final = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class FrameRule:
    """Which frames of a video are taken."""

    rule: Literal["qwen", "llamafactory"] = "qwen"
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """The frames of a video file in the order in which they are shown.

    ticks (N,) int64 are their time stamps in units of `time_base` seconds, `keys` (N,) says where decoding may begin.
    Not `timed`: the file has no usable time stamps, and ticks are counted. size is that of the turned picture.
    """

    size: Size
    ticks: np.ndarray
    keys: np.ndarray
    time_base: Fraction
    duration: Fraction
    timed: bool

    def __len__(self) -> int:
        return len(self.ticks)

    @property
    def fps(self) -> Fraction:
        """Frames per second, on average."""
        return len(self) / self.duration


_Timed = tuple[int, Any]  # a tick and its frame


class Pick(NamedTuple):
    """A frame that is taken: its number and tick, and those of the last frame before it where decoding may begin."""

    number: int
    tick: int
    key: int
    key_tick: int


@dataclass(frozen=True)
class VideoPlan:
    """The frames that are taken. `seconds` is the time from one to the next, on average.

    `reach` is the furthest tick that may stand in for one that cannot be decoded.
    """

    picks: tuple[Pick, ...]
    seconds: float
    timed: bool
    time_base: Fraction
    reach: int


def read_index(source: object) -> VideoIndex:
    """The frames of a video file (a path, bytes or a data URI). Raises DataError naming it."""
    with _opened(source) as (container, stream):
        packets = _Packets(container, stream)
        first, stamps, keys = packets.first, packets.stamps, np.array(packets.keys, bool)
        if first is None:
            raise DataError("no frame of it can be decoded")
        turned = abs(first.rotation) % 180 == 90
        size = (first.width, first.height) if turned else (first.height, first.width)
        if None in stamps or len(set(stamps)) < len(stamps):
            rate, count = _rate(stream), len(stamps)
            return VideoIndex(size, np.arange(count), keys, 1 / rate, count / rate, timed=False)
        ticks = np.array(stamps, np.int64)
        order = np.argsort(ticks)
        duration = _duration(ticks[order], packets.last[1], stream)
        return VideoIndex(size, ticks[order], keys[order], stream.time_base, duration, timed=True)


class _Packets:
    """What the packets of a video stream say: their time stamps, and whether decoding may begin there.

    `last` is the time stamp and the length of the last one shown, `first` a decoded frame. Raises DataError where the
    file ends before its header says.
    """

    def __init__(self, container: Any, stream: Any):
        self.stamps: list[int | None] = []
        self.keys: list[bool] = []
        self.last = (-(1 << 62), 0)
        self.first: Any = None
        self.end = Fraction(0)  # seconds, of any stream
        for packet in container.demux():
            if packet.pts is not None:
                self.end = max(self.end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index == stream.index:
                self._add(packet)
        missing = stream.frames - len(self.stamps)
        if missing > max(2, stream.frames // 50):
            raise DataError(f"is cut off: its index lists {stream.frames} frames, {len(self.stamps)} are there")
        # Matroska has no number of frames, but a duration that is exact, of the longest stream.
        lasts = Fraction(container.duration or 0, av.time_base) if "matroska" in container.format.name else 0
        if lasts - self.end > max(1, lasts / 20):
            raise DataError(f"is cut off: {float(self.end):.1f} s of {float(lasts):.1f} s are there")

    def _add(self, packet: Any) -> None:
        if self.first is None:
            self.first = next(_decoded(packet), None)
        if packet.size == 0 or packet.is_discard or packet.is_corrupt:
            return
        self.stamps.append(packet.pts)
        self.keys.append(packet.is_keyframe)
        if packet.pts is not None:
            self.last = max(self.last, (packet.pts, packet.duration or 0))


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


def plan_frames(index: VideoIndex, rule: FrameRule, part: VideoPart) -> VideoPlan:
    """Which frames of a video are taken. Raises DataError where the rule takes none."""
    first, last, duration = _stretch(index, part)
    total = last - first + 1
    fps = rule.fps if part.fps is None else part.fps
    fewest = rule.min_frames if part.min_frames is None else part.min_frames
    most = rule.max_frames if part.max_frames is None else part.max_frames
    if rule.rule == "qwen":
        wanted = part.frames or float(duration) * fps
        count = qwen_count(total, wanted, fewest, most, exact=part.frames is not None)
        numbers = np.linspace(first, last, count).round().astype(np.int64)
    else:
        wanted = part.frames or max(1, math.floor(float(duration) * fps))
        count = max(1, min(total, most, int(wanted)))
        numbers = np.linspace(first, last, count).astype(np.int64)  # truncated, as there
    seconds = float(duration) / count
    return VideoPlan(
        picks=tuple(_picks(index, numbers)),
        seconds=seconds,
        timed=index.timed,
        time_base=index.time_base,
        reach=math.ceil(max(seconds / 2, float(2 / index.fps)) / index.time_base),
    )


def qwen_count(total: int, wanted: float, fewest: int, most: int, *, exact: bool = False) -> int:
    """Frames that qwen-vl-utils takes of `total`: an even number, within bounds unless `exact`ly so many are asked.

    Raises DataError where that is less than two or more than there are.
    """
    if total < 2:
        raise DataError(
            "has one frame, and the rule 'qwen' takes two at least; give it as an image, or choose "
            "data.video_frames: llamafactory"
        )
    low, high = math.ceil(fewest / 2) * 2, min(most, total) // 2 * 2
    count = round(wanted / 2) * 2 if exact else math.floor(min(max(wanted, low), high) / 2) * 2
    if not 2 <= count <= total:
        raise DataError(f"has {total} frames, {count} of them are asked for; the rule 'qwen' takes from 2 to all")
    return count


def _stretch(index: VideoIndex, part: VideoPart) -> tuple[int, int, Fraction]:
    """Numbers of the first and last frame between the part's start and end, and the seconds that they cover."""
    if part.start is None and part.end is None:
        return 0, len(index) - 1, index.duration
    times = (index.ticks - index.ticks[0]) * float(index.time_base)
    slack = 1e-6  # seconds; a start that is meant to be a frame's own time is not missed by rounding
    inside = np.flatnonzero(
        (times >= (part.start or 0.0) - slack) & (times <= (math.inf if part.end is None else part.end) + slack)
    )
    if len(inside) < 2:
        raise DataError(
            f"has {len(inside)} frames between {part.start or 0:g} s and "
            f"{'its end' if part.end is None else f'{part.end:g} s'}; it is {float(index.duration):.2f} s long"
        )
    first, last = int(inside[0]), int(inside[-1])
    ticks = int(index.ticks[last] - index.ticks[first])
    return first, last, ticks * index.time_base * Fraction(len(inside), len(inside) - 1)


def _picks(index: VideoIndex, numbers: np.ndarray) -> Iterator[Pick]:
    keys = np.flatnonzero(index.keys)
    for number in numbers.tolist():
        before = int(np.searchsorted(keys, number, side="right")) - 1
        key = int(keys[before]) if before >= 0 else 0
        yield Pick(number, int(index.ticks[number]), key, int(index.ticks[key]))


def read_frames(source: object, plan: VideoPlan) -> Iterator[Image.Image]:
    """The planned frames as RGB pictures, one at a time, turned as the file says; nothing behind the last is decoded.

    A frame that cannot be decoded is replaced by the nearest one within reach. Raises DataError naming the file.
    """
    done = 0
    # An index may be wrong about where decoding can begin: then once more from the front, where there is no doubt.
    for may_jump in (True, False):
        with _opened(source) as (container, stream):
            cursor = _Cursor(container, stream, plan, may_jump=may_jump)
            for pick in plan.picks[done:]:
                frame = cursor.at(pick)
                if frame is None and cursor.jumped:
                    break
                yield _picture(cursor.checked(frame, pick))
                done += 1
        if done == len(plan.picks):
            return


class _Cursor:
    """Decodes forwards, and leaps to a later frame where that is less work."""

    def __init__(self, container: Any, stream: Any, plan: VideoPlan, *, may_jump: bool):
        self.container, self.stream, self.plan = container, stream, plan
        self.may_jump = may_jump and plan.timed
        self.jumped = False
        self.number = -1  # of the newest frame, as far as it is known
        self.before: _Timed | None = None
        self.newest: _Timed | None = None
        self.frames = self._read()

    def at(self, pick: Pick) -> Any:
        """The decoded frame nearest to a pick; None where none is within reach."""
        if self.may_jump and pick.key - self.number > _WORTH_A_SEEK:
            self.container.seek(pick.key_tick, stream=self.stream)
            self.before = self.newest = None
            self.frames, self.jumped = self._read(), True
        while self.newest is None or self.newest[0] < pick.tick:
            item = next(self.frames, None)
            if item is None:
                break
            self.before, self.newest = self.newest, item
        self.number = pick.number
        known = [item for item in (self.before, self.newest) if item is not None]
        tick, frame = min(known, key=lambda item: abs(item[0] - pick.tick), default=(0, None))
        return frame if frame is not None and abs(tick - pick.tick) <= self.plan.reach else None

    def checked(self, frame: Any, pick: Pick) -> Any:
        """The frame. Raises DataError where there is none."""
        if frame is None:
            seconds = float(pick.tick * self.plan.time_base)
            raise DataError(f"is damaged: nothing can be decoded near frame {pick.number}, at {seconds:.2f} s")
        return frame

    def _read(self) -> Iterator[_Timed]:
        number = 0
        for packet in self.container.demux(self.stream):
            for frame in _decoded(packet):
                tick = frame.pts if self.plan.timed else number
                number += 1
                if tick is not None and not frame.is_corrupt:
                    yield tick, frame


def _decoded(packet: Any) -> Iterator[Any]:
    """Frames that a packet completes. One that is damaged gives none: that shows where its frame is missed."""
    try:
        yield from packet.decode()
    except av.error.InvalidDataError:
        return


def _picture(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


@contextmanager
def _opened(source: object) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. Whatever goes wrong becomes one DataError that names the file."""
    try:
        content = media_content(source)
        if content is None:
            raise DataError(f"a video cannot be a {type(source).__name__}; give a path, bytes, or a list of frames")
        with av.open(f"file:{content}" if isinstance(content, Path) else content) as container:
            if not container.streams.video:
                raise DataError("has no video stream")
            yield container, container.streams.video[0]
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{describe(source)}: no such file") from None
    except (av.error.FFmpegError, OSError, ValueError, EOFError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{describe(source)}: is damaged or not a video: {cause}") from None
