"""What goes back, in the shapes of OpenAI's interface: chunks while an answer grows, or the whole of it at its end."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.output import spelt
from duetvl.inference.request import Completion, Delta
from duetvl.inference.sampling import TokenLogprob
from duetvl.serving.calls import Call, CallReader
from duetvl.serving.errors import SERVER_KIND, ServerError

DONE: Final = b"data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True)
class Heading:
    """What all chunks of an answer, and the whole of it, begin with. `model` is the name that was asked for."""

    id: str
    created: int
    model: str
    prompts: tuple[str, ...]  # the engine's ids of the prompts, in order
    n: int = 1  # answers to each
    media_tokens: int = 0
    usage_at_end: bool = False


@dataclass
class _Choice:
    """What has come of one choice."""

    pieces: list[str | Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None
    reader: CallReader | None = None
    letters: int = 0
    begun: bool = False

    @property
    def text(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[Call]:
        return [piece for piece in self.pieces if isinstance(piece, Call)]

    def read(self, delta: Delta) -> list[str | Call]:
        """What a delta adds to it."""
        text = delta.text or ""
        if self.reader is None:
            return [text] if text else []
        pieces = self.reader.take(text)
        return pieces + self.reader.finish() if delta.completion is not None else pieces


class Answers(ABC):
    """The answers to one request. `add` takes what comes; its chunks are those of a stream."""

    object: str
    chunk: str

    def __init__(self, heading: Heading, tokenizer: TextTokenizer, *, calls: bool = False) -> None:
        """calls: whether calls of functions are read from the texts."""
        self.heading, self._tokenizer = heading, tokenizer
        self._number = {id: number for number, id in enumerate(heading.prompts)}
        self.count = len(heading.prompts) * heading.n
        self._choices = [_Choice(reader=CallReader() if calls else None) for _ in range(self.count)]

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunks that a delta makes. Raises what `check_finish` does."""
        index = self._number[delta.id] * self.heading.n + delta.choice
        choice = self._choices[index]
        if not choice.begun:
            choice.begun = True
            yield from self._first(index)
        if delta.completion is not None:
            check_finish(delta.completion)
            choice.completion = delta.completion
        pieces = choice.read(delta)
        logprobs = self._shown(delta)
        yield from self._chunks(index, choice, pieces, logprobs)
        choice.pieces += pieces
        choice.logprobs += logprobs
        choice.letters += sum(len(piece) for piece in pieces if isinstance(piece, str))
        if delta.completion is not None:
            yield self._chunk(self._last(index, choice))

    def _shown(self, delta: Delta) -> list[TokenLogprob]:
        """Those of a delta but for the token that ended the answer, which is no part of its text."""
        ended = delta.completion is not None and delta.completion.finish_reason == "stop"
        if ended and delta.logprobs and not self._tokenizer.bytes_of(delta.logprobs[-1].token):
            return delta.logprobs[:-1]
        return delta.logprobs

    def end(self) -> Iterator[dict[str, Any]]:
        """Chunks after everything has."""
        if self.heading.usage_at_end:
            yield {**self._head(self.chunk), "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens; those of a prompt count once, however many answers it has."""
        firsts = [choice.completion for choice in self._choices[:: self.heading.n]]
        prompt = sum(one.prompt_tokens for one in firsts if one is not None)
        made = sum(len(one.completion.token_ids) for one in self._choices if one.completion is not None)
        details = {
            "cached_tokens": sum(one.cached_tokens for one in firsts if one is not None),
            "image_tokens": self.heading.media_tokens,
            "text_tokens": prompt - self.heading.media_tokens,
        }
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": details,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        heading = self.heading
        return {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.heading.usage_at_end else {}
        return {**self._head(self.chunk), "choices": [choice], **usage}

    def _reason(self, choice: _Choice) -> str:
        assert choice.completion is not None
        return "tool_calls" if choice.calls else choice.completion.finish_reason

    def _first(self, index: int) -> Iterator[dict[str, Any]]:
        """Chunks at the beginning of a choice."""
        return iter(())

    @abstractmethod
    def _chunks(
        self, index: int, choice: _Choice, pieces: Sequence[str | Call], logprobs: list[TokenLogprob]
    ) -> Iterator[dict[str, Any]]:
        """Chunks of what is new in a choice."""

    @abstractmethod
    def _last(self, index: int, choice: _Choice) -> dict[str, Any]:
        """The choice of the chunk that says why an answer has ended."""

    @abstractmethod
    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        """The choice in the whole response."""


class ChatAnswers(Answers):
    """Of a chat completion: messages."""

    object, chunk = "chat.completion", "chat.completion.chunk"

    def _first(self, index: int) -> Iterator[dict[str, Any]]:
        """Whose message it is."""
        yield self._of(index, {"role": "assistant", "content": ""})

    def _chunks(
        self, index: int, choice: _Choice, pieces: Sequence[str | Call], logprobs: list[TokenLogprob]
    ) -> Iterator[dict[str, Any]]:
        """See Answers."""
        number = len(choice.calls)
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [_call(call, number + at) for at, call in enumerate(one for one in pieces if isinstance(one, Call))]
        if content or logprobs:
            yield self._of(index, {"content": content}, logprobs)
        for call in calls:
            yield self._of(index, {"tool_calls": [call]})

    def _of(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        shown = self._logprobs(logprobs) if logprobs else None
        return self._chunk({"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason})

    def _last(self, index: int, choice: _Choice) -> dict[str, Any]:
        """See Answers."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": self._reason(choice)}

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        """See Answers."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message["content"] = choice.text or None
            message["tool_calls"] = [_call(call) for call in choice.calls]
        completion = choice.completion
        shown = self._logprobs(choice.logprobs) if completion is not None and completion.logprobs is not None else None
        return {"index": index, "message": message, "logprobs": shown, "finish_reason": self._reason(choice)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"content": [_without_ids(spelt(self._tokenizer, one)) for one in logprobs], "refusal": None}


class TextAnswers(Answers):
    """Of a completion: texts."""

    object, chunk = "text_completion", "text_completion"

    def _chunks(
        self, index: int, choice: _Choice, pieces: Sequence[str | Call], logprobs: list[TokenLogprob]
    ) -> Iterator[dict[str, Any]]:
        """See Answers."""
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        if text or logprobs:
            shown = self._logprobs(logprobs, choice.letters) if logprobs else None
            yield self._chunk({"index": index, "text": text, "logprobs": shown, "finish_reason": None})

    def _last(self, index: int, choice: _Choice) -> dict[str, Any]:
        """See Answers."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": self._reason(choice)}

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        """See Answers."""
        completion = choice.completion
        shown = (
            self._logprobs(choice.logprobs, 0) if completion is not None and completion.logprobs is not None else None
        )
        return {"index": index, "text": choice.text, "logprobs": shown, "finish_reason": self._reason(choice)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob], letters: int) -> dict[str, Any]:
        """In the older layout: lists side by side. `letters` of the text come before."""
        entries = [spelt(self._tokenizer, one) for one in logprobs]
        offsets = []
        for entry in entries:
            offsets.append(letters)
            letters += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


def check_finish(completion: Completion) -> None:
    """Raise what ended an answer before its end: its own error, or ServerError."""
    if completion.error is not None:
        raise completion.error
    if completion.finish_reason == "deadline":
        raise ServerError(
            f"the answer was not finished in time; {len(completion.token_ids)} tokens of it were generated",
            status=504,
            kind=SERVER_KIND,
            code="deadline_exceeded",
        )
    if completion.finish_reason == "cancelled":
        raise ServerError("the server is shutting down", status=503, kind=SERVER_KIND, code="shutting_down")


def _call(call: Call, index: int | None = None) -> dict[str, Any]:
    place = {} if index is None else {"index": index}
    function = {"name": call.name, "arguments": call.arguments}
    return {**place, "id": call.id, "type": "function", "function": function}


def _without_ids(entry: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI has it: a token is named by its text and bytes."""
    top = [{key: value for key, value in one.items() if key != "id"} for one in entry["top_logprobs"]]
    return {**{key: value for key, value in entry.items() if key != "id"}, "top_logprobs": top}
