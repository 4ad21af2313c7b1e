"""What is asked of the engine, and what comes back: plain values, which any thread may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError, shown
from duetvl.inference.guided import Guide
from duetvl.inference.sampling import Sampling, TokenLogprob

Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to go on from it.

    sampling None: as the engine's defaults say. stop_ids end the answer and are its last token (None: those of the
    engine's defaults); stop strings end it and are left out of its text. No stop id is chosen among the first
    `min_new_tokens`. logprobs: None for none, 0 for those of the chosen tokens, k for the k
    likeliest besides. n answers are made; the first is choice number `choice`, and with the seed this number, and no
    place in any batch, names their random numbers. timeout: seconds from `submit`, then the answer ends as it is.
    adapter names one of the engine's; "" is the model without any. Requests of different `salt` share no cached
    prefix. guide: makes for each choice a guide, which says before each token which may come next.
    """

    prompt: Sample
    id: str = ""
    sampling: Sampling | None = None
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop_ids: frozenset[int] | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    choice: int = 0
    timeout: float | None = None
    adapter: str = ""
    salt: str = ""
    guide: Callable[[], Guide] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {shown(self.max_new_tokens)}, it must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {shown(self.min_new_tokens)}, it must be between 0 and max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if self.n < 1:
            raise ConfigError(f"n is {shown(self.n)}, it must be at least 1")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"timeout is {shown(self.timeout)} seconds, it must be above 0")


class Answer(Protocol):
    """What becomes of one choice's tokens; the engine makes one for each and tells it of every token."""

    def add(self, token: int, logprob: TokenLogprob | None) -> Finish | None:
        """Take the next token; why the answer ends with it, or None."""
        ...

    def finish(self, reason: Finish) -> None:
        """Nothing more comes: what was held back of the text is let go."""
        ...

    def text_delta(self) -> str | None:
        """The text that has come since this was last asked; None where there is no tokenizer."""
        ...

    @property
    def text(self) -> str | None:
        """All of the text so far; None where there is no tokenizer."""
        ...


class TokenAnswer:
    """An answer without text: ends at a stop id or at `max_new_tokens`."""

    text: str | None = None

    def __init__(self, request: Request):
        self.request, self.ends = request, request.stop_ids or frozenset()
        self.count = 0

    def add(self, token: int, logprob: TokenLogprob | None) -> Finish | None:
        """See `Answer.add`."""
        self.count += 1
        if token in self.ends:
            return "stop"
        return "length" if self.count == self.request.max_new_tokens else None

    def finish(self, reason: Finish) -> None:
        """See `Answer.finish`."""

    def text_delta(self) -> str | None:
        """See `Answer.text_delta`."""
        return None


@dataclass(frozen=True)
class Timings:
    """Seconds on one monotonic clock: arrival, first pass, first token, end. None: it did not come to that."""

    arrived: float
    started: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, eq=False)
class Completion:
    """One choice of a request at its end. `cached_tokens` of the prompt were not computed but found.

    `error` is the exception where the finish reason is "error".
    """

    id: str
    choice: int
    token_ids: list[int]
    text: str | None
    finish_reason: Finish
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    error: Exception | None = None


@dataclass(frozen=True, eq=False)
class Delta:
    """What one step added to one choice; the last one of a choice carries its completion."""

    id: str
    choice: int
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None
