"""The text of a growing answer, token by token: constant work for each, however long the answer is.

Tokens spell bytes, and an incremental decoder makes characters of them: nothing is guessed from a text that ends oddly,
and a character whose bytes are not all there yet is held back. Of the characters those are held back as well with which
a stop string may begin. What has been handed out is never taken back, and all of it together is the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from typing import Any, Final

from duetvl.core.errors import ConfigError, shown
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.request import Finish, Request
from duetvl.inference.sampling import TokenLogprob

MOST_STOPS: Final = 16
LONGEST_STOP: Final = 256  # characters

BytesOf = Callable[[int], bytes]


class TextStream:
    """Tokens to text; `bytes_of` gives the bytes of one."""

    def __init__(self, bytes_of: BytesOf):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that the token completes."""
        return self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        """What is held back: the bytes of a character that will not be completed, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopFinder:
    """Finds the first of some texts in a stream of characters, wherever the stream is cut.

    The first is the one that is complete first, of those that end together the longest. `held` are the characters
    that may be its beginning.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """The characters that are no part of a stop text, and whether one was found: what follows it is dropped."""
        whole = self.held + text
        found = [(start + len(stop), start) for stop in self.stops if (start := whole.find(stop)) >= 0]
        if found:
            self.held = ""
            return whole[: min(found)[1]], True
        kept = max((_overlap(whole, stop) for stop in self.stops), default=0)
        self.held = whole[len(whole) - kept :]
        return whole[: len(whole) - kept], False

    def finish(self) -> str:
        """The held characters: nothing more comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with, but for its whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Output:
    """One choice's answer as a text; an `Answer` of the engine (request.py).

    It ends at a stop id, which is its last token, where a stop string is complete, which is no part of the text, and
    after `max_new_tokens`. Stop strings are not looked for among the first `min_new_tokens` tokens.
    """

    def __init__(self, request: Request, tokenizer: TextTokenizer):
        """ConfigError for stop strings that make no sense, and a tokenizer whose tokens do not spell bytes."""
        check_stops(request.stop)
        if not tokenizer.is_byte_level:
            raise ConfigError(
                "the tokenizer is not byte-level, as Qwen's is; its answers cannot be made text as they grow"
            )
        self.request, self.count, self.finish_reason = request, 0, None
        self.ends = request.stop_ids or frozenset()
        self._stream, self._stops = TextStream(tokenizer.bytes_of), StopFinder(request.stop)
        self._told: list[str] = []
        self._new = 0

    finish_reason: Finish | None

    def add(self, token: int, logprob: TokenLogprob | None = None) -> Finish | None:
        """Take the next token; why the answer ends with it, or None."""
        self.count += 1
        stopped = self._read(self._stream.add(token))
        if stopped or token in self.ends:
            self.finish("stop", cut=stopped)
        elif self.count >= self.request.max_new_tokens:
            self.finish("length")
        return self.finish_reason

    def finish(self, reason: Finish, *, cut: bool = False) -> None:
        """Nothing more comes: what was held back of the text is let go, unless a stop string has cut it off."""
        if self.finish_reason is None:
            if not cut:
                self._tell(self._stops.finish() + self._stream.finish())
            self.finish_reason = reason

    def text_delta(self) -> str:
        """The text that has come since this was last asked."""
        new, self._new = self._told[self._new :], len(self._told)
        return "".join(new)

    @property
    def text(self) -> str:
        """All of the text that may be shown so far."""
        return "".join(self._told)

    def _read(self, text: str) -> bool:
        """Take characters; whether a stop string is complete."""
        if self.request.stop and self.count > self.request.min_new_tokens:
            text, stopped = self._stops.add(text)
        else:
            stopped = False
        self._tell(text)
        return stopped

    def _tell(self, text: str) -> None:
        if text:
            self._told.append(text)


def check_stops(stops: Any) -> None:
    """Raise ConfigError for stop strings that make no sense."""
    if not isinstance(stops, tuple | list) or len(stops) > MOST_STOPS:
        raise ConfigError(f"stop is {shown(stops)}, expected at most {MOST_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise ConfigError(f"stop: {shown(stop)} is not a text of 1 to {LONGEST_STOP} characters")


def spelt(tokenizer: TextTokenizer, logprob: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability with its text and bytes, and the likeliest tokens there, as OpenAI's interface has it.

    A token may be a part of a character: then its text has U+FFFD, and the bytes tell.
    """

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = tokenizer.spelling(token)
        return {"token": raw.decode("utf-8", "replace"), "id": token, "logprob": value, "bytes": list(raw)}

    likeliest: Iterator[dict[str, Any]] = (entry(*one) for one in logprob.top)
    return {**entry(logprob.token, logprob.logprob), "top_logprobs": list(likeliest)}
