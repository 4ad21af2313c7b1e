"""Requests to the engine and their results: plain values that any thread may use."""

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
    """One prompt and how to answer it.

    sampling: None uses the engine's defaults. stop_ids: token ids that end the answer and are its last token (None: the
    engine's defaults). stop: strings that end the answer and are not part of its text. The first `min_new_tokens`
    tokens are never stop ids. logprobs: None for none, 0 for those of the chosen tokens, k for the k most likely tokens
    as well. n: number of answers; they have the choice numbers `choice`, `choice` + 1, ..., and their random numbers
    depend only on the seed and the choice number, not on the place in a batch. timeout: seconds from `submit` after
    which the answer ends as it is. adapter: the name of one of the engine's adapters; "" is the model without adapter.
    Requests with different `salt` share no cached prefix. guide: called once for each choice, returns the guide that
    says before each token which tokens are allowed.
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
    """Collects the tokens of one choice; the engine creates one for each choice and passes every token to it."""

    def add(self, token: int, logprob: TokenLogprob | None) -> Finish | None:
        """Add the next token; returns why the answer ends with it, or None."""
        ...

    def finish(self, reason: Finish) -> None:
        """No more tokens follow: release text that was held back."""
        ...

    def text_delta(self) -> str | None:
        """The text added since the last call; None without a tokenizer."""
        ...

    @property
    def text(self) -> str | None:
        """The whole text so far; None without a tokenizer."""
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
    """Seconds on one monotonic clock: arrival, first pass, first token, end. None: not reached."""

    arrived: float
    started: float | None
    first_token: float | None
    finished: float


@dataclass(frozen=True, eq=False)
class Completion:
    """One finished choice of a request. `cached_tokens`: tokens of the prompt that were reused from the cache.

    `error` is the exception if the finish reason is "error".
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
    """What one step added to one choice; the last delta of a choice has its completion."""

    id: str
    choice: int
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None
