"""Messages of any dialect to turns: who speaks, what stands in a text for a medium, what is trained."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Literal

from duetvl.core.errors import DataError, did_you_mean, shown
from duetvl.data.conversation import BoxPart, Conversation, ImagePart, Part, RefPart, Turn, VideoPart
from duetvl.data.formats.parts import PLAIN, MediaRules, image_part, lacks_source, read_part, video_part
from duetvl.data.formats.tools import calls_text, read_tools, written_calls

Speaker = Literal["system", "user", "assistant", "tool", "call"]  # a call: an assistant whose content is its calls

_SPEAKERS: Final[dict[str, Speaker]] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
    "tool": "tool", "observation": "tool", "tool_response": "tool", "function": "tool",
    "function_call": "call", "tool_call": "call",
}  # fmt: skip
_TEXT_KEYS: Final = frozenset({"type", "text", "value", "cache_control"})
_NAMED_KEYS: Final = 16  # of a message that are named as not read
_NO_MORE: Final = object()  # a list may hold null, which is an error of its own
_TAGS: Final[dict[str, Speaker]] = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool",
    "function_tag": "call", "system_tag": "system",
}  # fmt: skip
TAGS: Final = ("role_tag", "content_tag", *_TAGS)  # the names that LLaMA-Factory gives to them
TRAINS: Final = ("loss", "loss_scale", "loss_weight", "weight", "train", "training", "trainable")
_MEDIA: Final = ("image", "images", "video", "videos", "audio", "audios")
_HARMLESS: Final = frozenset({
    "id", "uuid", "index", "message_id", "tool_call_id", "name", "timestamp", "date", "created_at", "create_time",
})  # fmt: skip
_TAGGED: Final = re.compile(r"<img>[^<>]{1,4096}</img>")  # a picture's place in the first Qwen-VL's layout
_MARKER: Final = re.compile("(<image>|<video>|<ref-object>|<bbox>)")
_LISTS: Final = {"<image>": "images", "<video>": "videos", "<ref-object>": "objects.ref", "<bbox>": "objects.bbox"}


@dataclass(frozen=True)
class Dialect:
    """How messages call their roles and keys.

    `role` and `content` are keys in the order in which they are looked for; `speakers` maps a role's name.
    """

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value")
    speakers: Mapping[str, Speaker] = field(default_factory=lambda: _SPEAKERS)

    @staticmethod
    def from_tags(tags: Mapping[str, str] | None) -> Dialect:
        """The dialect that LLaMA-Factory's `tags` describe; what they leave out is as usual. Raises DataError."""
        if not tags:
            return _USUAL
        for name, value in tags.items():
            if name not in TAGS:
                raise DataError(f"tags has no {shown(name)}{did_you_mean(name, TAGS)}")
            if not isinstance(value, str):
                raise DataError(f"tags.{name} must be a text, found {shown(value)}")
        named = {tags[tag]: speaker for tag, speaker in _TAGS.items() if tag in tags}
        replaced = set(named.values())
        usual = {name: speaker for name, speaker in _SPEAKERS.items() if speaker not in replaced}
        return Dialect(
            role=(tags["role_tag"],) if "role_tag" in tags else Dialect.role,
            content=(tags["content_tag"],) if "content_tag" in tags else Dialect.content,
            speakers={**usual, **named},
        )

    def speaker(self, message: Any) -> Speaker | None:
        """Who speaks; None where that is not known."""
        role = _first(message, self.role)
        return self.speakers.get(role) if isinstance(role, str) else None

    def body(self, message: Any) -> Any:
        """What is said: a text, parts, or nothing."""
        return _first(message, self.content)

    def unread(self, message: Mapping[str, Any]) -> Iterator[str]:
        """Keys of a message that are not read and hold something, unless they only identify it."""
        known = {*self.role, *self.content, "tool_calls", *TRAINS, *_HARMLESS}
        yield from keys_beyond(known, message)
        parts = self.body(message)
        for part in parts if isinstance(parts, list | tuple) else ():
            if isinstance(part, Mapping) and part.get("type") == "text":
                yield from keys_beyond(_TEXT_KEYS, part)

    def message(self, speaker: Speaker, text: str) -> dict[str, Any]:
        """A message in this dialect."""
        role = next(name for name, meant in self.speakers.items() if meant == speaker)
        return {self.role[0]: role, self.content[0]: text}


_USUAL: Final = Dialect()


@dataclass(frozen=True)
class Attached:
    """What a record lists beside its messages, for markers in their texts and for parts without a source."""

    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    refs: Sequence[RefPart] = ()
    boxes: Sequence[BoxPart] | None = None  # None: `<bbox>` and `<ref-object>` are plain text
    rules: MediaRules = PLAIN


def read_messages(messages: Any, *, tools: Any = None) -> Conversation:
    """Messages in the form of Hugging Face and OpenAI, checked.

    A message is {"role": "system" | "user" | "assistant" | "tool", "content": str | [part, ...]}; a part is
    {"type": "text" | "image" | "image_url" | "video" | "video_url", ...}; an assistant may have `tool_calls`.
    Texts are taken literally. An optional system message comes first, then the user (or results of tools) and the
    assistant take turns. Raises DataError naming the message.
    """
    turns = read_turns(check_messages(messages), _USUAL, None, literal=True)
    return Conversation(tuple(turns), read_tools(tools))


def check_messages(messages: Any) -> Sequence[Any]:
    """Whether it is a list with something in it. Raises DataError."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise DataError(f"messages must be a list of messages, found {type(messages).__name__}")
    if not messages:
        raise DataError("messages is empty")
    return messages


def read_turns(
    messages: Sequence[Any], dialect: Dialect, attached: Attached | None, *, literal: bool = False
) -> list[Turn]:
    """Turns in order, their roles checked and all of `attached` used.

    `<image>` and its like in texts stand for what is attached, unless `literal`, or unless any message has parts:
    then texts are taken as they are, and what is attached goes to parts without a source. Raises DataError.
    """
    filler = _Filler(attached or Attached(), literal=literal or has_parts(messages, dialect))
    if not filler.literal:
        filler.check_counts([dialect.body(message) for message in messages if dialect.speaker(message) != "system"])
    turns = []
    for number, message in enumerate(messages, start=1):
        try:
            turns.append(_read_message(message, dialect, filler))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    filler.check_all_used()
    check_order(turns)
    return turns


def read_answer(message: Any, dialect: Dialect, *, literal: bool, grounded: bool) -> Turn:
    """An answer that stands apart from its conversation: nothing attached is meant for it.

    With `grounded` records `<bbox>` in it is an error. Raises DataError.
    """
    turn = _read_message(message, dialect, _Filler(Attached(boxes=() if grounded else None), literal=literal))
    if turn.role != "assistant":
        raise DataError(f"an answer must be the assistant's, found the {turn.role}'s")
    return turn


def has_parts(messages: Sequence[Any], dialect: Dialect) -> bool:
    """Whether any message is a list of parts: then texts are literal."""
    return any(isinstance(dialect.body(message), list | tuple) for message in messages)


def check_order(turns: Sequence[Turn]) -> None:
    """The optional system turn, then the user or tools and the assistant by turns. Raises DataError."""
    expected = "user"
    for number, turn in enumerate(turns, start=1):
        if number == 1 and turn.role == "system":
            continue
        after_call = number > 1 and turns[number - 2].role in ("assistant", "tool")
        if turn.role == "tool" and after_call:
            expected = "assistant"
            continue
        if turn.role != expected:
            raise DataError(
                f"message {number}: expected the {expected}, found the {turn.role}; an optional "
                f"system message comes first, then user and assistant take turns"
            )
        expected = "assistant" if expected == "user" else "user"
    if turns[-1].role == "system":
        raise DataError("messages contain only a system message")


class _Filler:
    """Hands out what is attached, in order."""

    def __init__(self, attached: Attached, *, literal: bool) -> None:
        self.literal = literal
        self.rules = attached.rules
        self._lists: dict[str, Sequence[Any]] = {"<image>": attached.images, "<video>": attached.videos}
        if attached.boxes is not None:
            self._lists |= {"<ref-object>": attached.refs, "<bbox>": attached.boxes}
        self._left: dict[str, Iterator[Any]] = {marker: iter(listed) for marker, listed in self._lists.items()}

    def check_counts(self, texts: Sequence[Any]) -> None:
        """As many markers in the texts as there are things for them."""
        for marker, listed in self._lists.items():
            found = sum(text.count(marker) for text in texts if isinstance(text, str))
            if found != len(listed):
                raise DataError(
                    f"the texts hold {found} {marker} markers, but {_LISTS[marker]} lists {len(listed)}"
                    f"{'; a marker meant as plain text needs a part of type text' if found > len(listed) else ''}"
                )

    def check_all_used(self) -> None:
        """Nothing may be left over."""
        for marker, left in self._left.items():
            if count := len(list(left)):
                raise DataError(
                    f"{_LISTS[marker]} lists {len(self._lists[marker])}, of which {count} belong to no message; "
                    f"messages made of parts need one part without a source for each"
                )

    def text(self, text: str) -> list[Part]:
        """A message's text, its markers replaced."""
        if self.literal:
            return [text]
        return [self._next(piece) if piece in self._lists else piece for piece in _MARKER.split(text) if piece]

    def part(self, part: Any) -> Part:
        """One of a message's parts."""
        kind = lacks_source(part)
        if kind is None or not self._lists[f"<{kind}>"]:
            return read_part(part, self.rules)
        return self._next(f"<{kind}>", part)

    def _next(self, marker: str, part: Mapping[str, Any] | None = None) -> Part:
        thing = next(self._left[marker], _NO_MORE)
        if thing is _NO_MORE:
            raise DataError(f"{_LISTS[marker]} lists {len(self._lists[marker])}, which is fewer than the messages need")
        if isinstance(thing, RefPart | BoxPart):
            return thing
        rules = MediaRules(self.rules.dirs, {**self.rules.settings, **(part or {})})
        return image_part(thing, rules) if marker == "<image>" else video_part(thing, rules)


def _read_message(message: Any, dialect: Dialect, filler: _Filler) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"expected an object with role and content, found {type(message).__name__}")
    speaker, content = dialect.speaker(message), dialect.body(message)
    if speaker is None:
        name = _first(message, dialect.role)
        raise DataError(f"unknown role {shown(name)}{did_you_mean(str(name), dialect.speakers)}")
    calls = message.get("tool_calls")
    if content is None and calls:
        content = ""
    if speaker == "system":
        parts: list[Part] = _system(content)
    elif speaker == "call":
        parts = [written_calls(_text(content))]
    elif isinstance(content, list | tuple):
        parts = [filler.part(part) for part in content]
    else:
        parts = filler.text(_text(content))
        if not filler.literal and speaker in ("user", "tool") and (tagged := _TAGGED.search(content)):
            raise DataError(
                f"{shown(tagged[0])} would be plain text, not a picture; list the picture in images, and write "
                "<image> here"
            )
    if speaker in ("assistant", "call") and calls:
        parts += ["\n" if any(parts) else "", calls_text(calls)]
    role: Literal["system", "user", "assistant", "tool"] = "assistant" if speaker == "call" else speaker
    if role in ("system", "assistant") and any(isinstance(part, ImagePart | VideoPart) for part in parts):
        raise DataError(f"pictures and videos belong in user messages, not in the {role}'s")
    trained, unread = _trained(message), tuple(islice(dialect.unread(message), _NAMED_KEYS))
    if media := next((key for key in unread if key in _MEDIA), None):
        raise DataError(
            f"a message's own {media!r} is not read; list it beside the messages and mark its place by <image> or "
            f"<video>, or give it as a part of the content"
        )
    if role != "assistant" and trained:  # only answers are
        unread += tuple(key for key in TRAINS if message.get(key))
    answers = trained if role == "assistant" else None
    return Turn(role, tuple(part for part in parts if part != ""), answers, unread)


def _system(content: Any) -> list[Part]:
    """Markers mean nothing in a system prompt."""
    parts = [read_part(part) for part in content] if isinstance(content, list | tuple) else [_text(content)]
    return list(parts)


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise DataError(f"content must be a text or a list of parts, found {type(content).__name__}")
    return content


def _trained(message: Mapping[str, Any]) -> bool | None:
    """Whether a message says that it is trained, by any of the keys that mean this: ms-swift's `loss` and `loss_scale`,
    LLaMA-Factory's `loss_weight`, OpenAI's `weight`, axolotl's `train` and `training`."""
    said: dict[str, bool] = {}
    for key in TRAINS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{key} is {shown(value)}; expected true or 1 (trained), false or 0 (not trained)")
        said[key] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"{' and '.join(said)} contradict each other on whether the message is trained; keep one")
    return next(iter(said.values()), None)


def keys_beyond(known: Collection[str], values: Mapping[str, Any]) -> Iterator[str]:
    """Keys that are not known and hold something."""
    for key, value in values.items():
        if key not in known and not (value is None or (isinstance(value, str | list | tuple | dict) and not value)):
            yield str(key)


def _first(message: Any, keys: Sequence[str]) -> Any:
    if not isinstance(message, Mapping):
        return None
    return next((message[key] for key in keys if message.get(key) is not None), None)
