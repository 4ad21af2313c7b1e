"""What every format of records is read into, and what every later stage works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from duetvl.data.media.images import NO_WISH, ImageSource, Resize
from duetvl.data.sources.blob import Blob


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A picture in a message; `root` is the directory that its relative path was found in."""

    source: ImageSource
    wish: Resize = NO_WISH
    root: Path | None = None


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A video in a message: a file, or its frames as a list.

    Of a list `fps` says how many frames were taken per second, of a file how many are to be taken; `frames` asks for
    a number of frames instead, `min_frames` and `max_frames` bound it, `start` and `end` (seconds) cut a stretch out.
    None leaves each to the settings. `second_per_grid`, the seconds that one temporal patch spans, replaces what
    follows from the frames. `wish` bounds each frame, `total_pixels` all of them together. `root`
    is the directory that its (first) relative path was found in.
    """

    source: str | Path | bytes | Blob | Sequence[ImageSource]
    fps: float | None = None
    frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    second_per_grid: float | None = None
    total_pixels: int | None = None
    wish: Resize = NO_WISH
    root: Path | None = None


@dataclass(frozen=True)
class BoxPart:
    """A box (x1, y1, x2, y2), a point (x, y), or several, in picture number `image` (from 0) of the conversation.

    It is written into the text once the size at which the picture enters the model is known. `unit` says what the
    numbers are: pixels of the picture as it is in its file, parts of its sides (0 to 1), or thousandths of them.
    A `mark` is written as each family writes a box, and a `quad` the four corners of an outline; a `list` stays a list
    of numbers in every family, and `plain` ones have blanks between them.
    """

    image: int
    values: tuple[float, ...]
    unit: Literal["pixels", "norm1", "norm1000"] = "pixels"
    form: Literal["mark", "quad", "list", "plain"] = "mark"


@dataclass(frozen=True)
class RefPart:
    """The name of an object that a box belongs to."""

    text: str


Part = str | ImagePart | VideoPart | BoxPart | RefPart


@dataclass(frozen=True, eq=False)
class Turn:
    """One message. `trained` says for an assistant's turn whether it is trained; None leaves it to the settings.

    `unread` names what else the message held.
    """

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...]
    trained: bool | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Conversation:
    """Turns in order: an optional system turn, then the user's (or a tool's) and the assistant's by turns.

    `tools` are the functions that the assistant may call, as JSON schemas. `unread` names keys of the record that may
    change what it means, and are not read.
    """

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Preference:
    """A prompt, which ends with the user's turn, and two answers to it."""

    prompt: Conversation
    chosen: Turn
    rejected: Turn
