"""Conversations: messages and records in, pieces of text, control tokens and media out.

The layout is that of LLaMA-Factory's `qwen2_vl` template, which is also that of the published chat
template: a system turn, "You are a helpful assistant." unless one is given, then turns of user and
assistant, each ended by `<|im_end|>` and a line end. Of an assistant's turn the content,
`<|im_end|>` and the line end are trained; nothing else is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from duetvl.core.errors import DataError, did_you_mean
from duetvl.data.conversation import ImagePart, Part, Turn, VideoPart
from duetvl.data.images import Resize

DEFAULT_SYSTEM: Final = "You are a helpful assistant."
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
_ROLES: Final = ("system", "user", "assistant")
_MEDIA_KEYS: Final = ("image", "image_url", "url", "path", "value", "video")
_MARKER: Final = re.compile("(<image>|<video>)")


class Piece(NamedTuple):
    """A stretch of a conversation: text to be tokenised on its own, a control token, a medium."""

    kind: Literal["text", "control", "image", "video"]
    text: str = ""
    medium: ImagePart | VideoPart | None = None
    trained: bool = False


def read_messages(messages: Any) -> list[Turn]:
    """Messages in the form of Hugging Face and OpenAI, checked.

    A message is {"role": "system" | "user" | "assistant", "content": str | [part, ...]}; a part is
    {"type": "text" | "image" | "image_url" | "video", ...}. An optional system message comes first,
    then user and assistant take turns. Raises DataError naming the message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"messages must be a list of messages, found {type(messages).__name__}")
    if not messages:
        raise DataError("messages is empty")
    turns = []
    for number, message in enumerate(messages, start=1):
        try:
            turns.append(_read_message(message))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    _check_order(turns)
    return turns


def record_messages(record: Mapping[str, Any], media_dir: Path | None = None) -> list[dict[str, Any]]:
    """The messages of a record {"messages": [...], "images": [...], "videos": [[frame, ...], ...]}.

    `<image>` and `<video>` in its texts stand for its media, in order. A record whose messages hold
    parts, and that lists no media beside them, is taken as it is: there the markers are plain text.
    Relative paths start at `media_dir`. A `system` text beside the messages becomes the first
    message. Raises DataError when markers and media differ in number.
    """
    messages = record.get("messages")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError("the record has no messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise DataError("the record's messages must be objects with role and content")
    system = record.get("system")
    first = [{"role": "system", "content": system}] if system else []
    if not (record.get("images") or record.get("videos")) and _any_parts(messages):
        return [*first, *(_rooted_message(message, media_dir) for message in messages)]
    return [*first, *_filled(record, messages, media_dir)]


def _any_parts(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(isinstance(message.get("content"), list) for message in messages)


def _filled(
    record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], media_dir: Path | None
) -> list[dict[str, Any]]:
    """Messages whose markers are replaced by the record's media."""
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise DataError(f"a record's message needs a text as content, found {message!r:.80}")
    texts = [message["content"] for message in messages]
    media = {
        marker: _record_media(record, key, texts, marker, media_dir)
        for marker, key in (("<image>", "images"), ("<video>", "videos"))
    }
    return [
        {
            **message,
            "content": [_marker_part(text, media) for text in _MARKER.split(content) if text],
        }
        for message, content in zip(messages, texts, strict=True)
    ]


def render(turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> Iterator[Piece]:
    """The pieces of a conversation. Raises DataError when a prompt is asked for after an answer."""
    if add_generation_prompt and turns[-1].role == "assistant":
        raise DataError("the conversation ends with an assistant message; there is nothing to generate after it")
    system = turns[0] if turns[0].role == "system" else Turn("system", ())
    if not "".join(part for part in system.parts if isinstance(part, str)):
        system = Turn("system", (DEFAULT_SYSTEM,))
    yield from _prompt_turn(system)
    for turn in turns:
        if turn.role == "user":
            yield from _prompt_turn(turn)
        elif turn.role == "assistant":
            yield from _answer_turn(turn)
    if add_generation_prompt:
        yield from _answer_start()


def _prompt_turn(turn: Turn) -> Iterator[Piece]:
    yield Piece("control", TURN_START)
    yield from _content((f"{turn.role}\n", *turn.parts))
    yield Piece("control", TURN_END)
    yield Piece("text", "\n")


def _answer_start() -> Iterator[Piece]:
    yield Piece("control", TURN_START)
    yield Piece("text", "assistant\n")


def _answer_turn(turn: Turn) -> Iterator[Piece]:
    """An answer is tokenised apart from its header, so that a line end it starts with stays."""
    yield from _answer_start()
    for piece in _content(turn.parts):
        yield piece._replace(trained=True)
    yield Piece("control", TURN_END, trained=True)
    yield Piece("text", "\n", trained=True)


def _content(parts: Sequence[Part]) -> Iterator[Piece]:
    """Pieces of a message's parts; texts that touch are tokenised together."""
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if text:
            yield Piece("text", text)
        text = ""
        assert isinstance(part, ImagePart | VideoPart), "boxes are written out before"
        yield Piece("image" if isinstance(part, ImagePart) else "video", medium=part)
    if text:
        yield Piece("text", text)


def _check_order(turns: Sequence[Turn]) -> None:
    expected = "user"
    for number, turn in enumerate(turns, start=1):
        if number == 1 and turn.role == "system":
            continue
        if turn.role != expected:
            raise DataError(
                f"message {number}: expected the {expected}, found the {turn.role}; an optional "
                f"system message comes first, then user and assistant take turns"
            )
        expected = "assistant" if expected == "user" else "user"
    if turns[-1].role == "system":
        raise DataError("messages hold a system message alone")


def _read_message(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"expected an object with role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise DataError(f"unknown role {role!r}{did_you_mean(str(role), _ROLES)}")
    if isinstance(content, str):
        return Turn(role, (content,))
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise DataError(f"content must be a text or a list of parts, found {type(content).__name__}")
    parts = tuple(_read_part(part) for part in content)
    if role != "user" and not all(isinstance(part, str) for part in parts):
        raise DataError(f"pictures and videos belong into user messages, not into the {role}'s")
    return Turn(role, parts)


def _read_part(part: Any) -> Part:
    if not isinstance(part, Mapping):
        raise DataError(f"expected a part with a type, found {type(part).__name__}")
    kind = part.get("type")
    if kind not in _PART_READERS:
        raise DataError(f"unknown part type {kind!r}{did_you_mean(str(kind), _PART_READERS)}")
    return _PART_READERS[kind](part)


def _read_text(part: Mapping[str, Any]) -> str:
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise DataError(f"a text part needs a text, found {text!r:.80}")
    return text


def _read_image(part: Mapping[str, Any]) -> ImagePart:
    keys = _MEDIA_KEYS[:-1]
    source = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(source, Mapping):  # OpenAI's {"image_url": {"url": ...}}
        source = source.get("url")
    if source is None:
        raise DataError(f"an image part needs one of {', '.join(keys)}; found {', '.join(part)}")
    return ImagePart(source, _read_wish(part))


def _read_video(part: Mapping[str, Any]) -> VideoPart:
    frames = part.get("video")
    if isinstance(frames, np.ndarray) and frames.ndim == 4:
        frames = list(frames)
    if isinstance(frames, str | Path):
        raise DataError(f"video files are not read yet; give {str(frames)!r} as a list of its frames")
    if isinstance(frames, bytes) or not isinstance(frames, Sequence) or not frames:
        raise DataError("a video part needs its frames as a list in `video`")
    fps = part.get("fps", part.get("sample_fps"))
    seconds = part.get("second_per_grid", part.get("second_per_grid_ts"))
    return VideoPart(
        frames,
        fps=None if fps is None else _positive("fps", fps),
        second_per_grid=None if seconds is None else _positive("second_per_grid", seconds),
        wish=_read_wish(part),
    )


def _read_wish(part: Mapping[str, Any]) -> Resize:
    keys = ("min_pixels", "max_pixels", "resized_height", "resized_width")
    return Resize(*(_whole(key, part[key]) if part.get(key) is not None else None for key in keys))


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise DataError(f"{name} is {value!r}, expected a positive number")
    return float(value)


def _whole(name: str, value: Any) -> int:
    number = _positive(name, value)
    if number != int(number):
        raise DataError(f"{name} is {value!r}, expected an integer")
    return int(number)


_PART_READERS: Final[dict[str, Callable[[Mapping[str, Any]], Part]]] = {
    "text": _read_text,
    "image": _read_image,
    "image_url": _read_image,
    "video": _read_video,
}


def _record_media(
    record: Mapping[str, Any], key: str, texts: Sequence[str], marker: str, media_dir: Path | None
) -> Iterator[Any]:
    """A record's media of one kind, in order, after their number was checked."""
    media = record.get(key) or []
    if isinstance(media, str | bytes) or not isinstance(media, Sequence):
        raise DataError(f"{key} must be a list, found {type(media).__name__}")
    markers = sum(text.count(marker) for text in texts)
    if markers != len(media):
        raise DataError(f"the texts hold {markers} {marker} markers, but {key} lists {len(media)}")
    return iter([_rooted(medium, media_dir) for medium in media])


def _rooted_message(message: Mapping[str, Any], media_dir: Path | None) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = [
            {key: _rooted(value, media_dir) if key in _MEDIA_KEYS else value for key, value in part.items()}
            if isinstance(part, Mapping) and part.get("type") != "text"
            else part
            for part in content
        ]
    return {**message, "content": content}


def _rooted(medium: Any, media_dir: Path | None) -> Any:
    """The medium with its relative paths, also those of a video's frames, set below `media_dir`."""
    if isinstance(medium, list | tuple):
        return [_rooted(frame, media_dir) for frame in medium]
    if isinstance(medium, Mapping):
        return {key: _rooted(value, media_dir) for key, value in medium.items()}
    is_path = isinstance(medium, Path) or (isinstance(medium, str) and ":" not in medium[:8])
    return media_dir / medium if is_path and media_dir is not None else medium


def _marker_part(text: str, media: Mapping[str, Iterator[Any]]) -> dict[str, Any]:
    if text not in media:
        return {"type": "text", "text": text}
    kind = text.strip("<>")
    return {"type": kind, kind: next(media[text])}
