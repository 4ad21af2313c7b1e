"""Records of every known layout to conversations and preference pairs. docs/data_formats.md has the layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import DataError, did_you_mean, shown
from duetvl.data.conversation import Conversation, Preference
from duetvl.data.formats.grounding import Unit, find_boxes, read_objects
from duetvl.data.formats.messages import (
    TRAINS,
    Attached,
    Dialect,
    check_messages,
    has_parts,
    keys_beyond,
    read_answer,
    read_turns,
)
from duetvl.data.formats.parts import MediaRules
from duetvl.data.formats.tools import parse_json, read_tools

# What LLaMA-Factory calls a column -> the keys it is looked for under when `columns` does not say.
_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "messages": ("messages", "conversations"),
    "system": ("system",), "tools": ("tools",),
    "images": ("images", "image"), "videos": ("videos", "video"), "audios": ("audios", "audio"),
    "prompt": ("instruction", "prompt", "question"), "query": ("input", "query"),
    "response": ("output", "response", "completion", "answer"), "history": ("history",),
    "chosen": ("chosen",), "rejected": ("rejected", "rejected_response", "rejected_messages"),
}  # fmt: skip
COLUMNS: Final = tuple(_KEYS)
_AFTER_ANSWERS: Final = ("rejected_response", "rejected_messages")  # ms-swift: beside a talk that ends with the better
_MEDIA_LIKE: Final = re.compile(
    r"(?!(num|n|no|has|is|with|count|total|max|min)_)([a-z0-9]{1,20}_){0,3}"
    r"(img|image|picture|photo|video|frame)s?(_?(path|file|url|list|bytes|base64|b64|data|name)s?)*"
)
_WEIGHING: Final = (*TRAINS, "label", "kto_tag", "margin")  # of a whole record: not read, and may change its meaning


def read_record(
    values: Mapping[str, Any],
    *,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    media_dirs: Sequence[Path] = (),
    boxes: str = "as_written",
    answered: bool = True,
) -> Conversation | Preference:
    """A record of any layout; `form` names it, or it is recognised by its keys.

    `columns` and `tags` rename keys and roles as in LLaMA-Factory's dataset_info.json. Relative paths of media are
    looked for in `media_dirs`. `boxes` says what coordinates written in texts are, see `DataSource.boxes`. A
    conversation ends with the assistant's turn, unless not `answered`: then it may. Raises DataError that says what was
    expected and found; the caller adds the place.
    """
    if not isinstance(values, Mapping):
        raise DataError(f"expected a record (an object), found {type(values).__name__}")
    record = _Record(values, columns or {}, Dialect.from_tags(tags), media_dirs, answered)
    if form == "auto":
        form = _recognised(record)
    if form not in _READERS:
        raise DataError(f"no format {shown(form)}{did_you_mean(form, _READERS)}")
    found = _READERS[form](record)
    return found if boxes == "as_written" else _with_boxes(found, boxes)


class _Record:
    """A record's values under the names of LLaMA-Factory's columns, and how to read its messages."""

    def __init__(
        self,
        values: Mapping[str, Any],
        columns: Mapping[str, str],
        dialect: Dialect,
        media_dirs: Sequence[Path],
        answered: bool,
    ) -> None:
        for name in columns:
            if name not in _KEYS:
                raise DataError(f"columns has no {shown(name)}{did_you_mean(name, _KEYS)}")
        self.values, self.dialect, self.media_dirs = values, dialect, media_dirs
        self.answered = answered  # whether it must be
        self._columns = columns

    def keys(self, column: str) -> tuple[str, ...]:
        """The keys under which a column is looked for; none where `columns` gives it an empty name."""
        if column in self._columns:
            return (self._columns[column],) if self._columns[column] else ()
        return _KEYS[column]

    def get(self, column: str) -> Any:
        """The value of a column; None when there is none."""
        return next((self.values[key] for key in self.keys(column) if self.values.get(key) is not None), None)

    def has(self, *columns: str) -> bool:
        """Whether all the columns have a value."""
        return all(self.get(column) is not None for column in columns)

    def text(self, column: str) -> str:
        """A text; empty when there is none. Raises DataError for anything else."""
        value = self.get(column)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.wanted(column)} must be a text, found {type(value).__name__}")
        return value or ""

    def messages(self) -> list[Any]:
        """The list of messages, which a table may hold as JSON text. Raises DataError."""
        value = self.get("messages")
        if value is None:
            other = next((key for key in _KEYS["messages"] if self.values.get(key) is not None), None)
            hint = f"; name {other!r} in columns.messages" if other else _wrapped(self.values)
            raise DataError(f"the record has no {self.wanted('messages')}; found {self.found()}{hint}")
        return list(check_messages(parse_json("messages", value) if isinstance(value, str) else value))

    def wanted(self, column: str) -> str:
        """The keys of a column, for messages."""
        return " or ".join(repr(key) for key in self.keys(column)) or f"key for {column}"

    def found(self) -> str:
        """The record's keys, for messages."""
        return ", ".join(repr(key)[:40] for key in list(self.values)[:8]) or "nothing"

    def conversation(self, messages: Sequence[Any]) -> Conversation:
        """Messages with what the record lists beside them. Raises DataError."""
        messages = self._with_system(messages)
        attached = self.attached()
        if not self.has("messages") and "instruction" not in self.values and "prompt" not in self._columns:
            messages = _media_first(messages, attached, self.dialect)
        turns = read_turns(messages, self.dialect, attached)
        return Conversation(tuple(turns), read_tools(self.get("tools")), self._unread())

    def _unread(self) -> tuple[str, ...]:
        """Keys that weigh the record, or seem to hold a picture or video, and are not read."""
        read = {key for column in _KEYS for key in self.keys(column)}
        rest = keys_beyond(read, self.values)
        return tuple(key for key in rest if key in _WEIGHING or _MEDIA_LIKE.fullmatch(key[:80].lower()))

    def attached(self) -> Attached:
        """Media and boxes. Raises DataError."""
        if _listed(self.get("audios")):
            raise DataError("the record has audios, which these models do not support; remove them")
        images, videos = _listed(self._one_of("images")), _listed(self._one_of("videos"))
        refs, boxes = read_objects(self.values.get("objects"), len(images))
        settings = self.values.get("chat_template_kwargs") or {}
        if not isinstance(settings, Mapping):
            raise DataError(f"chat_template_kwargs must be an object, found {type(settings).__name__}")
        return Attached(images, videos, refs, boxes, MediaRules(tuple(self.media_dirs), settings))

    def _one_of(self, column: str) -> Any:
        several = [key for key in self.keys(column) if _listed(self.values.get(key))]
        if len(several) > 1:
            raise DataError(f"the record has both {' and '.join(map(repr, several))}; keep one")
        return self.get(column) if not several else self.values[several[0]]

    def _with_system(self, messages: Sequence[Any]) -> Sequence[Any]:
        text = self.text("system")
        if not text:
            return messages
        if self.dialect.speaker(messages[0]) == "system":
            raise DataError("the record has a system text and a system message; keep one")
        return [self.dialect.message("system", text), *messages]


def _recognised(record: _Record) -> str:
    if record.has("chosen") or record.has("rejected"):
        return "preference"
    if record.has("messages"):
        return "messages"
    if record.has("response") and (record.has("prompt") or record.has("query")):
        return "alpaca"
    raise DataError(
        "the record has no known layout: it has neither messages or conversations, nor instruction and output, "
        f"nor chosen and rejected; found {record.found()}{_wrapped(record.values)}. docs/data_formats.md lists "
        "them; name one as `format`, or its keys in `columns`"
    )


def _wrapped(values: Mapping[str, Any]) -> str:
    """A hint for an object around the records: which of its keys holds a list of objects."""
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            return (
                f"; {shown(key)} holds a list of {len(value)} objects: if these are the records, write that list alone"
            )
    return ""


def _read_messages(record: _Record) -> Conversation:
    return _finished(record, record.conversation(record.messages()))


def _read_swift(record: _Record) -> Conversation | Preference:
    return _read_preference(record) if record.has("rejected") else _read_messages(record)


def _read_alpaca(record: _Record) -> Conversation:
    answer = _as_messages(record, "response", record.get("response")) if record.has("response") else []
    if record.answered and not answer:
        raise DataError(f"the record has no {record.wanted('response')}; found {record.found()}")
    return _finished(record, record.conversation([*_alpaca_prompt(record), *answer]))


def _alpaca_prompt(record: _Record) -> list[Any]:
    prompt = record.get("prompt")
    if isinstance(prompt, list | tuple):
        return list(prompt)
    history = record.get("history") or []
    if not isinstance(history, list | tuple):
        raise DataError(f"history must be a list of [question, answer], found {type(history).__name__}")
    messages = []
    for pair in history:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"history must be a list of [question, answer], found {shown(pair)}")
        messages += [record.dialect.message("user", pair[0]), record.dialect.message("assistant", pair[1])]
    asked = [text for text in (record.text("prompt"), record.text("query")) if text]
    return [*messages, record.dialect.message("user", "\n".join(asked))]


def _read_preference(record: _Record) -> Preference:
    for column in ("chosen", "rejected"):
        if not record.has(column) and not (column == "chosen" and any(key in record.values for key in _AFTER_ANSWERS)):
            raise DataError(f"a preference pair needs chosen and rejected, found no {column}; found {record.found()}")
    prompt, chosen, rejected = _pair(record)
    answered = record.conversation([*prompt, chosen])
    literal = has_parts([*prompt, chosen, rejected], record.dialect)
    grounded = record.values.get("objects") is not None
    try:
        worse = read_answer(rejected, record.dialect, literal=literal, grounded=grounded)
    except DataError as error:
        raise DataError(f"rejected: {error}") from None
    *asked, better = _finished(record, answered).turns
    for name, turn in (("chosen", better), ("rejected", worse)):
        if turn.trained is False:
            raise DataError(
                f"{name} says that it is not trained, but a pair is trained by comparing both; leave it out"
            )
    untrained = tuple(replace(turn, trained=False) if turn.role == "assistant" else turn for turn in asked)
    return Preference(replace(answered, turns=untrained), replace(better, trained=None), replace(worse, trained=None))


def _pair(record: _Record) -> tuple[list[Any], Any, Any]:
    """Messages of the prompt, the better answer, the worse answer."""
    rejected = _as_messages(record, "rejected", record.get("rejected"))
    if record.has("messages"):
        prompt = record.messages()
        if not record.has("chosen"):  # ms-swift: the conversation ends with the better answer
            if len(rejected) > 1 and rejected[:-1] == prompt[:-1]:
                rejected = rejected[-1:]
            return prompt[:-1], prompt[-1], _only("rejected", rejected)
    elif record.has("prompt") or record.has("query"):
        prompt = _alpaca_prompt(record)
    else:
        prompt = []
    chosen = _as_messages(record, "chosen", record.get("chosen"))
    if not prompt:  # TRL: both are whole conversations
        if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise DataError("chosen and rejected have no common prompt, and the record has no messages or prompt")
        return chosen[:-1], chosen[-1], rejected[-1]
    return prompt, _only("chosen", chosen), _only("rejected", rejected)


def _as_messages(record: _Record, name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return [record.dialect.message("assistant", value)]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple) and value:
        return list(value)
    raise DataError(f"{name} must be a text, a message or a list of messages, found {shown(value)}")


def _only(name: str, messages: Sequence[Any]) -> Any:
    if len(messages) != 1:
        raise DataError(f"{name} must be one answer to the prompt, found {len(messages)} messages")
    return messages[0]


_READERS: Final[dict[str, Callable[[_Record], Conversation | Preference]]] = {
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "llava": _read_messages,
    "qwen": _read_messages,
    "swift": _read_swift,
    "alpaca": _read_alpaca,
    "preference": _read_preference,
}


def _finished(record: _Record, conversation: Conversation) -> Conversation:
    """A record to train on ends with an answer."""
    last = conversation.turns[-1].role
    if last != "assistant" and record.answered:
        raise DataError(
            f"the conversation ends with the {last}'s message, so there is no answer to train; pairs of answers are "
            f"format preference"
        )
    return conversation


def _media_first(messages: Sequence[Any], attached: Attached, dialect: Dialect) -> Sequence[Any]:
    """A question without markers is about the media beside it: they come first, as in TRL."""
    contents = [dialect.body(message) for message in messages]
    texts = [content if isinstance(content, str) else "" for content in contents]
    markers = "<image>" * len(attached.images) + "<video>" * len(attached.videos)
    if not markers or has_parts(messages, dialect) or any("<image>" in text or "<video>" in text for text in texts):
        return messages
    for at, message in enumerate(messages):
        if dialect.speaker(message) == "user":
            return [*messages[:at], dialect.message("user", markers + texts[at]), *messages[at + 1 :]]
    return messages


def _with_boxes(found: Conversation | Preference, boxes: str) -> Conversation | Preference:
    if boxes not in ("pixels", "norm1000"):
        raise DataError(f"boxes is {shown(boxes)}, expected as_written, pixels or norm1000")
    unit: Unit = "pixels" if boxes == "pixels" else "norm1000"
    if isinstance(found, Conversation):
        return find_boxes(found, unit)
    both = [
        find_boxes(replace(found.prompt, turns=(*found.prompt.turns, answer)), unit).turns
        for answer in (found.chosen, found.rejected)
    ]
    return Preference(replace(found.prompt, turns=both[0][:-1]), both[0][-1], both[1][-1])


def _listed(value: Any) -> list[Any]:
    """One or several media as a list; a table may hold the list as JSON text."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, str) and value.startswith(('["', "[{", "[[", "[]")):
        value = parse_json("a list of media", value)
    return list(value) if isinstance(value, list | tuple) else [value]
