"""Which frames of a video file are taken, and their pictures.

The rules that choose frames go by the number of a frame, as those of qwen-vl-utils and LLaMA-Factory do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from PIL import Image

from duetvl.core.errors import DataError
from duetvl.data.conversation import VideoPart
from duetvl.data.media.video_index import TimeLimit, VideoIndex, decoded, opened

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


_Timed = tuple[int, Any]  # a tick and its frame


class Pick(NamedTuple):
    """A frame that is taken: its number and tick, and those of the last frame before it where decoding may begin."""

    number: int
    tick: int
    key: int
    key_tick: int


@dataclass(frozen=True)
class VideoPlan:
    """The frames that are taken, of the file's stream number `stream`. `seconds`: from one to the next, on average.

    `reach` is the furthest tick that may stand in for one that cannot be decoded.
    """

    picks: tuple[Pick, ...]
    seconds: float
    timed: bool
    time_base: Fraction
    reach: int
    stream: int


def plan_frames(index: VideoIndex, rule: FrameRule, part: VideoPart) -> VideoPlan:
    """Which frames of a video are taken. Raises DataError where the rule takes none."""
    asked = replace(
        rule,
        fps=rule.fps if part.fps is None else part.fps,
        min_frames=rule.min_frames if part.min_frames is None else part.min_frames,
        max_frames=rule.max_frames if part.max_frames is None else part.max_frames,
    )
    numbers, seconds = (_by_qwen if rule.rule == "qwen" else _by_llamafactory)(index, asked, part)
    return VideoPlan(
        picks=tuple(_picks(index, numbers)),
        seconds=seconds,
        timed=index.timed,
        time_base=index.time_base,
        reach=math.ceil(max(seconds / 2, float(2 / index.fps)) / index.time_base),
        stream=index.stream,
    )


def _by_qwen(index: VideoIndex, rule: FrameRule, part: VideoPart) -> tuple[np.ndarray, float]:
    """Numbers of the frames, and the seconds from one to the next."""
    first, last, duration = _stretch(index, part)
    wanted = part.frames or float(duration) * rule.fps
    count = qwen_count(last - first + 1, wanted, rule.min_frames, rule.max_frames, exact=part.frames is not None)
    return np.linspace(first, last, count).round().astype(np.int64), float(duration) / count


def _by_llamafactory(index: VideoIndex, rule: FrameRule, part: VideoPart) -> tuple[np.ndarray, float]:
    """Numbers of the frames, and the seconds from one to the next; both from what the header says, as there."""
    first, total, seconds = 0, len(index), float(index.duration)
    if part.start is not None or part.end is not None:
        first, last, duration = _stretch(index, part)
        total, seconds = last - first + 1, float(duration)
    elif index.header is not None:
        total = index.header.frames or (total if part.frames else 0)
        if index.header.seconds is not None:
            seconds = index.header.seconds
        elif not total:
            seconds = rule.max_frames / rule.fps
    if total:
        wanted = part.frames or max(1, math.floor(seconds * rule.fps))
        count = max(1, min(total, rule.max_frames, int(wanted)))
        numbers = np.linspace(first, first + total - 1, count).astype(np.int64)  # truncated, as there
    else:  # without a number of frames the first ones are taken there
        count = rule.max_frames
        numbers = np.arange(count)
    return numbers[numbers < len(index)], seconds / count


def qwen_count(total: int, wanted: float, fewest: int, most: int, *, exact: bool = False) -> int:
    """Frames that qwen-vl-utils takes of `total`: an even number, within bounds unless a number is asked for `exact`ly.

    Raises DataError where that is less than two or more than there are.
    """
    if total < 2:
        raise DataError(
            "has one frame, and the rule 'qwen' takes at least two; give it as an image, or choose "
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


def read_frames(source: object, plan: VideoPlan, seconds: float | None = None) -> Iterator[Image.Image]:
    """The planned frames as RGB pictures, one at a time, turned as the file says; nothing behind the last is decoded.

    A frame that cannot be decoded is replaced by the nearest one within reach. Raises DataError naming the file; so it
    does where it takes more than `seconds` in all.
    """
    done = 0
    limit = TimeLimit(seconds)
    # An index may be wrong about where decoding can begin: then once more from the front, where there is no doubt.
    for may_jump in (True, False):
        with opened(source) as container:
            cursor = _Cursor(container, plan, limit, may_jump=may_jump)
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

    def __init__(self, container: Any, plan: VideoPlan, limit: TimeLimit, *, may_jump: bool):
        self.container, self.stream, self.plan = container, container.streams[plan.stream], plan
        self.limit, self.may_jump = limit, may_jump and plan.timed
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
            self.limit.check()
            for frame in decoded(packet):
                tick = frame.pts if self.plan.timed else number
                number += 1
                if tick is not None and not frame.is_corrupt:
                    yield tick, frame


def _picture(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)
