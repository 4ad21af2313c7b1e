"""How the next token is chosen from logits, in numpy with random numbers of our own: the same on every backend.

Random numbers are keyed by (seed, choice, step), never by a sequence's place in a batch: the same request gets the same
tokens whatever its neighbours are. The order is that of transformers: logit bias, repetition penalty (then presence and
frequency penalty, which transformers lacks), tokens that may not come yet, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

import numpy as np

from duetvl.core.errors import ConfigError, shown
from duetvl.core.ops import Ops
from duetvl.core.random import philox

Tensor = Any

MOST_ALTERNATIVES: Final = 20  # top log-probabilities of a token, as OpenAI's interface bounds them
_LARGEST_SEED: Final = 2**64 - 1
_FIRST_PART: Final = 256  # candidates for top-p that are looked at before more are; no more than these are sorted

# Field -> (least, most, whether the least itself is allowed).
_BOUNDS: Final[Mapping[str, tuple[float, float, bool]]] = {
    "temperature": (0, 1e6, True), "top_p": (0, 1, False), "min_p": (0, 1, True),
    "repetition_penalty": (0, 1e6, False), "presence_penalty": (-2, 2, True), "frequency_penalty": (-2, 2, True),
}  # fmt: skip
_COUNTS: Final[Mapping[str, int]] = {"top_k": 2**31, "seed": _LARGEST_SEED}
_BIAS: Final = 100.0


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all tokens.

    repetition_penalty: for tokens of the prompt and the answer. presence_penalty, frequency_penalty: for tokens of the
    answer, once and per occurrence. logit_bias: added to the logits of these tokens. Raises ConfigError for an invalid
    value, with its name.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (least, most, included) in _BOUNDS.items():
            _check_number(name, getattr(self, name), least, most, included)
        for name, largest in _COUNTS.items():
            check_count(name, getattr(self, name), largest)
        _check_bias(self.logit_bias)

    def check_tokens(self, vocabulary: int) -> None:
        """Raise ConfigError where a token of `logit_bias` is not one of the model's."""
        if beyond := [token for token in self.logit_bias if token >= vocabulary]:
            raise ConfigError(f"logit_bias: token {beyond[0]} is not one of the model's {vocabulary}")

    @property
    def takes_the_largest(self) -> bool:
        """Whether the largest logit is the choice: then no logits need to leave the device."""
        plain = self.repetition_penalty == 1.0 and not self.presence_penalty and not self.frequency_penalty
        return self.temperature == 0 and plain and not self.logit_bias

    def told(self) -> str:
        """What is not as usual, for the user: `temperature 0.7, top_p 0.9`; `greedy` where there is nothing."""
        usual = Sampling()
        names = [each.name for each in fields(self) if getattr(self, each.name) != getattr(usual, each.name)]
        words = [f"{name} {getattr(self, name)}" for name in names]
        return ", ".join(words if self.temperature else ["greedy", *words])


class TokenLogprob(NamedTuple):
    """Log-probability of a token under the model's own distribution, before biases, penalties, temperature and
    filters, and the likeliest tokens there, in falling order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Chosen(NamedTuple):
    """A token, and its log-probability where that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


class Chooser:
    """Chooses the tokens of one answer, one after the other.

    `choice` numbers the answers to one request. No token of `ends` is among the first `min_tokens`. `logprobs`: None
    for none, else those of the chosen tokens and of this number of the likeliest.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: np.ndarray,
        *,
        choice: int = 0,
        ends: Collection[int] = (),
        min_tokens: int = 0,
        logprobs: int | None = None,
    ):
        """`prompt`: its token ids."""
        if logprobs is not None:
            check_count("logprobs", logprobs, MOST_ALTERNATIVES)
        self.sampling, self.stream, self.step = sampling, stream_name(choice), 0
        self.min_tokens, self.logprobs = min_tokens, logprobs
        self._seen = np.unique(np.asarray(prompt, np.int64)) if sampling.repetition_penalty != 1.0 else _NO_IDS
        self._counts: Counter[int] = Counter()
        self._ends = np.array(sorted(ends), np.int64)

    @property
    def takes_the_largest(self) -> bool:
        """Whether the next token is that of the largest logit."""
        return self.sampling.takes_the_largest and self.logprobs is None and not self._waits

    def choose(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> Chosen:
        """The next token, of logits (V,) that are all finite; `allowed` (V,) bool leaves some of them out."""
        sampling = self.sampling
        scores = self._scores(np.asarray(logits, np.float64), allowed)
        token = int(scores.argmax()) if sampling.temperature == 0 else draw(scores, sampling, self.stream, self.step)
        return self.take(token, None if self.logprobs is None else logprob_of(logits, token, self.logprobs))

    def take(self, token: int, logprob: TokenLogprob | None = None) -> Chosen:
        """Count a token that has been chosen, here or on the device."""
        self.step += 1
        if self.sampling.repetition_penalty != 1.0 and token not in self._counts:
            self._seen = np.union1d(self._seen, [token])
        self._counts[token] += 1
        return Chosen(token, logprob)

    @property
    def _waits(self) -> bool:
        """Whether no token may end the answer yet."""
        return self.step < self.min_tokens and len(self._ends) > 0

    def _scores(self, logits: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """What is drawn from, all but temperature and filters; the logits themselves stay as they are."""
        sampling, scores = self.sampling, logits
        if sampling.logit_bias:
            scores = scores.copy()
            scores[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
        scores = penalised(scores, self._seen, sampling.repetition_penalty)
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            scores = scores.copy()
            ids, counts = (np.array(list(found)) for found in (self._counts.keys(), self._counts.values()))
            scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if allowed is not None:
            scores = np.where(allowed, scores, -np.inf)
        if self._waits:
            others = scores.copy()
            others[self._ends[self._ends < len(others)]] = -np.inf  # a file may name one that the model cannot choose
            scores = others if np.isfinite(others.max()) else scores  # where nothing else is allowed, an end is
        return scores


def choose_rows(
    ops: Ops, logits: Tensor, choosers: Sequence[Chooser], allowed: Sequence[np.ndarray | None] = ()
) -> list[Chosen | None]:
    """The next token of each sequence of a pass, of logits (S, V) on the device; None where they are not all finite.

    Where the largest logit is the choice it is found on the device; the rows of the others alone are copied out.
    `allowed` has a mask (V,) for each sequence that may not have every token.
    """
    finite = np.isfinite(ops.to_numpy(ops.sum(ops.cast(logits, "float32"), axis=1)))  # a float16's sum may overflow
    masks = allowed or [None] * len(choosers)
    largest = [chooser.takes_the_largest and mask is None for chooser, mask in zip(choosers, masks, strict=True)]
    tokens = ops.to_numpy(ops.argmax(logits, axis=1)) if any(largest) else _NO_IDS
    there = [number for number, simple in enumerate(largest) if not simple and finite[number]]
    rows = dict(zip(there, _rows(ops, logits, there), strict=True))
    return [
        None if not finite[number] else chooser.take(int(tokens[number])) if largest[number]
        else chooser.choose(rows[number], masks[number])
        for number, chooser in enumerate(choosers)
    ]  # fmt: skip


def _rows(ops: Ops, logits: Tensor, there: Sequence[int]) -> np.ndarray:
    """Rows of a tensor on the host."""
    if not there:
        return np.zeros((0, 0), np.float32)
    if len(there) == logits.shape[0]:
        return ops.to_numpy(logits)
    return ops.to_numpy(ops.take_rows(logits, ops.from_numpy(np.array(there, np.int32))))


_NO_IDS: Final = np.zeros(0, np.int64)


def stream_name(choice: int) -> str:
    """The name of the random numbers of one answer to a request."""
    return f"sequence {choice}"


def choose(logits: np.ndarray, seen: np.ndarray, sampling: Sampling, stream: str, step: int) -> int:
    """The next token of one sequence: logits (V,), `seen` the token ids so far; penalties of the answer alone are not
    known here. `stream` and `step` name the random number."""
    scores = penalised(np.asarray(logits, np.float64), seen, sampling.repetition_penalty)
    return int(scores.argmax()) if sampling.temperature == 0 else draw(scores, sampling, stream, step)


def draw(scores: np.ndarray, sampling: Sampling, stream: str, step: int) -> int:
    """A token drawn from scores (V,) by their chances, after temperature and filters."""
    ids, kept = filtered((scores - scores.max()) / sampling.temperature, sampling)
    edges = np.cumsum(np.exp(kept - kept.max()))
    drawn = philox(sampling.seed, stream, step).random() * edges[-1]
    place = int(np.searchsorted(edges, drawn, side="right"))
    return place if ids is None else int(ids[place])


def penalised(scores: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide positive and multiply negative scores of tokens already seen (Keskar et al., arXiv:1909.05858)."""
    if penalty == 1.0 or len(seen) == 0:
        return scores
    changed = scores.copy()
    ids = np.unique(seen)
    changed[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
    return changed


def filtered(scores: np.ndarray, sampling: Sampling) -> tuple[np.ndarray | None, np.ndarray]:
    """The ids (rising) and scores that top-k, top-p and min-p leave; ids None where all of them are left.

    The vocabulary is not sorted: the best are parted off, and of these as many sorted as top-p needs. Of equal scores
    those of smaller ids are kept.
    """
    if not sampling.top_k and sampling.top_p == 1.0 and not sampling.min_p:
        return None, scores
    ids = best(scores, sampling.top_k or len(scores))
    if sampling.top_p < 1.0:
        ids = _nucleus(ids, scores[ids], sampling.top_p)
    if sampling.min_p:
        kept = scores[ids]
        ids = ids[np.exp(kept - kept.max()) >= sampling.min_p]
    return ids, scores[ids]


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest scores, rising; of equal ones those of smaller ids."""
    if count >= len(scores):
        return np.arange(len(scores))
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(ids: np.ndarray, scores: np.ndarray, top_p: float) -> np.ndarray:
    """Of tokens with rising ids the smallest set of the most likely that holds `top_p` of the probability."""
    chances = np.exp(scores - scores.max())
    return ids[best(scores, _needed(chances, top_p * chances.sum()))]


def _needed(chances: np.ndarray, wanted: float) -> int:
    """How many of the largest chances hold the sum `wanted`; at least one. What is sorted is a small part of them."""
    rest, count, held = chances, 0, 0.0
    size = _FIRST_PART
    while len(rest) > size:
        parted = np.partition(rest, len(rest) - size)
        lower, upper = parted[:-size], parted[-size:]
        together = held + float(upper.sum())
        if together >= wanted:
            rest = upper
        else:
            rest, count, held = lower, count + size, together
        size = max(_FIRST_PART, len(rest) // 2)
    rest = np.sort(rest)[::-1]
    before = held + np.cumsum(rest) - rest
    return max(1, count + int(np.count_nonzero(before < wanted)))


def logprob_of(logits: np.ndarray, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of a token, and of the most likely ones, under logits (V,)."""
    values = np.asarray(logits, np.float64)
    largest = values.max()
    total = largest + np.log(np.exp(values - largest).sum())
    ids = best(values, alternatives) if alternatives else _NO_IDS
    order = ids[np.argsort(-values[ids], kind="stable")]
    return TokenLogprob(token, float(values[token] - total), tuple((int(i), float(values[i] - total)) for i in order))


# -- what makes sense -------------------------------------------------------------------------------------------------


def _check_number(name: str, value: Any, least: float, most: float, included: bool) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not least <= value <= most or (value == least and not included):  # false for NaN
        low = f"at least {least}" if included else f"above {least}"
        raise ConfigError(f"{name} is {shown(value)}, expected a number {low} and at most {most:g}")


def check_count(name: str, value: Any, largest: int) -> None:
    """Raise ConfigError unless a user's value is a whole number from 0 to `largest`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 0 <= value <= largest:
        raise ConfigError(f"{name} is {shown(value)}, expected a whole number from 0 to {largest}")


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise ConfigError(f"logit_bias is {shown(bias)}, expected numbers by token id")
    for token, value in bias.items():
        if not isinstance(token, int | np.integer) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"logit_bias: {shown(token)} is not a token id")
        _check_number(f"logit_bias of token {token}", value, -_BIAS, _BIAS, True)
