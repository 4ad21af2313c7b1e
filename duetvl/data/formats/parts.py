"""Parts of a message as chat interfaces write them: texts, pictures and videos, checked and with whole paths."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL.Image import Image

from duetvl.core.errors import DataError, did_you_mean, shown
from duetvl.data.conversation import ImagePart, Part, VideoPart
from duetvl.data.formats.media_settings import read_settings
from duetvl.data.media.images import Resize
from duetvl.data.sources.spelling import on_disk, without_scheme

_IMAGE_KEYS: Final = ("image", "image_url", "url", "path", "value")
_VIDEO_KEYS: Final = ("video", "video_url", "url", "path", "value")
_SCHEMES: Final = ("data:", "http:", "https:")
_SHORTEST_BASE64: Final = 512  # characters: there is no path so long without a dot
_BASE64: Final = re.compile(r"(?:[A-Za-z0-9+/]{4}){128,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?\Z")


@dataclass(frozen=True)
class MediaRules:
    """What holds for all media of a record.

    Relative paths are looked for in `dirs`, in this order; `settings` (min_pixels, max_pixels, fps, ...) are those of
    every part that does not say otherwise.
    """

    dirs: tuple[Path, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


PLAIN: Final = MediaRules()


def read_part(part: Any, rules: MediaRules = PLAIN) -> Part:
    """A part {"type": "text" | "image" | "image_url" | "video" | "video_url", ...}. Raises DataError."""
    if not isinstance(part, Mapping):
        raise DataError(f"expected a part with a type, found {type(part).__name__}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise DataError(f"unknown part type {shown(kind)}{did_you_mean(str(kind), _READERS)}")
    return _READERS[kind](part, rules)


def image_part(source: Any, rules: MediaRules = PLAIN) -> ImagePart:
    """A picture of a record's list: a path, a data URI, bytes, or {"bytes": ..., "path": ...}. Raises DataError."""
    return _read_image({"image": source}, rules)


def video_part(source: Any, rules: MediaRules = PLAIN) -> VideoPart:
    """A video of a record's list: a path, bytes, or its frames as a list. Raises DataError."""
    return _read_video({"video": source}, rules)


def lacks_source(part: Any) -> str | None:
    """ "image" or "video" for a part {"type": "image"} without a source: it stands for the record's next one."""
    if isinstance(part, Mapping) and part.get("type") in ("image", "video"):
        kind = str(part["type"])
        return kind if _source(part, _IMAGE_KEYS if kind == "image" else _VIDEO_KEYS) is None else None
    return None


def _read_text(part: Mapping[str, Any], rules: MediaRules) -> str:
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if not isinstance(text, str):
        raise DataError(f"a text part needs a text, found {shown(text)}")
    return text


def _read_image(part: Mapping[str, Any], rules: MediaRules) -> ImagePart:
    source = _source(part, _IMAGE_KEYS)
    if source is None:
        raise DataError(f"an image part needs one of {', '.join(_IMAGE_KEYS)}; found {_names(part)}")
    if isinstance(source, list | tuple):
        raise DataError("a picture must be one path, data URI or bytes; found a list")
    found, root = _located(source, rules)
    return ImagePart(found, _read_wish(read_settings(part, _IMAGE_KEYS, rules.settings)), root)


def _read_video(part: Mapping[str, Any], rules: MediaRules) -> VideoPart:
    source = _source(part, _VIDEO_KEYS)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        source = list(source)
    if source is None or (isinstance(source, list | tuple) and not source):
        raise DataError(f"a video part needs its file or its frames as a list in `video`; found {_names(part)}")
    listed = isinstance(source, list | tuple)
    if isinstance(source, np.ndarray | Image):
        raise DataError("a video is a file or a list of frames, found a single picture")
    said = read_settings(part, _VIDEO_KEYS, rules.settings)
    located = [_located(_unwrapped(frame), rules) for frame in (source if listed else [source])]
    return VideoPart(
        [frame for frame, _ in located] if listed else located[0][0],
        fps=_number(said, *(("sample_fps", "fps") if listed else ("fps",))),
        frames=_integer(said, "nframes"),
        min_frames=_integer(said, "min_frames"),
        max_frames=_integer(said, "max_frames"),
        start=_number(said, "video_start", positive=False),
        end=_number(said, "video_end"),
        second_per_grid=_number(said, "second_per_grid", "second_per_grid_ts"),
        total_pixels=_integer(said, "total_pixels"),
        wish=_read_wish(said),
        root=located[0][1],
    )


_READERS: Final[dict[str, Callable[[Mapping[str, Any], MediaRules], Part]]] = {
    "text": _read_text,
    "image": _read_image,
    "image_url": _read_image,
    "video": _read_video,
    "video_url": _read_video,
}


def _source(part: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return _unwrapped(next((part[key] for key in keys if part.get(key) is not None), None))


def _unwrapped(source: Any) -> Any:
    """What OpenAI's {"url": ...} and Hugging Face's {"bytes": ..., "path": ...} hold."""
    if not isinstance(source, Mapping):
        return source
    for key in ("bytes", "url", "path"):
        if source.get(key) is not None:
            return source[key]
    raise DataError(f"a picture or video as an object needs one of bytes, url, path; found {_names(source)}")


def find_file(text: str, dirs: Sequence[Path]) -> tuple[Path, Path]:
    """The file of a relative path in the first directory that has it, and this directory.

    Where none has, the path lies in the first.
    """
    for directory in dirs:
        if (path := on_disk(directory / text)) is not None:
            return path, directory
    return dirs[0] / text, dirs[0]


def _located(source: Any, rules: MediaRules) -> tuple[Any, Path | None]:
    """A medium's source with its whole path or its content, and the directory that it was found in."""
    if isinstance(source, str | Path):
        text = str(source)
        if isinstance(source, str):
            if (content := _base64_content(text)) is not None:
                return content, None
            source = text = without_scheme(text)
        if not text or "\0" in text or not _has_bytes(text):
            raise DataError(f"{shown(text)} is not a path")
        if rules.dirs and not text.startswith(_SCHEMES):
            return find_file(text, rules.dirs)
        return source, None
    if isinstance(source, Mapping | bool | int | float) or source is None:
        raise DataError(f"a picture or video cannot be {shown(source)}; give a path, a data URI or bytes")
    return source, None


def _base64_content(text: str) -> str | bytes | None:
    """A data URI without line ends, what bare base64 means, or None. Writers of MIME break it into lines."""
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        return f"{head.lower()}{comma}{''.join(body.split())}"
    if len(text) < _SHORTEST_BASE64:
        return None
    compact = "".join(text.split())
    return base64.b64decode(compact) if _BASE64.match(compact) else None


def _has_bytes(text: str) -> bool:
    """JSON can spell half a character, which no file's name has."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _read_wish(said: Mapping[str, Any]) -> Resize:
    keys = ("min_pixels", "max_pixels", "resized_height", "resized_width")
    return Resize(*(_integer(said, key) for key in keys))


def _number(said: Mapping[str, Any], *keys: str, positive: bool = True) -> float | None:
    """The first of the keys that has a value."""
    for key in keys:
        value = said.get(key)
        if value is None:
            continue
        good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
        if not (good and isfinite(value) and (value > 0 if positive else value >= 0)):
            raise DataError(f"{key} is {shown(value)}, expected a {'positive' if positive else 'non-negative'} number")
        return float(value)
    return None


def _integer(said: Mapping[str, Any], key: str) -> int | None:
    number = _number(said, key)
    if number is not None and number != int(number):
        raise DataError(f"{key} is {shown(said[key])}, expected an integer")
    return None if number is None else int(number)


def _names(part: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(part)[:8]) or "nothing"
