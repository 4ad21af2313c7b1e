"""Choosing the next token from logits, in numpy with random numbers of our own: the same on every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from duetvl.core.errors import ConfigError
from duetvl.core.random import philox


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 takes the most likely token; top_k 0 and top_p 1 leave all of them in.

    The order is that of transformers: repetition penalty, temperature, top-k, top-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = 0 <= self.temperature < np.inf and 0 < self.repetition_penalty < np.inf  # both false for NaN
        if not positive or self.top_k < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ConfigError(
                f"{self}: temperature, top_k and seed are at least 0, top_p in (0, 1], repetition_penalty above 0"
            )


def choose(logits: np.ndarray, seen: np.ndarray, sampling: Sampling, stream: str, step: int) -> int:
    """The next token of one sequence: logits (V,), `seen` the token ids so far.

    `stream` names the sequence and `step` counts its tokens: together with the seed they fix the choice.
    """
    scores = penalised(np.asarray(logits, np.float64), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores.argmax())
    kept = truncated(scores / sampling.temperature, sampling.top_k, sampling.top_p)
    chances = np.exp(kept - kept.max())
    edges = np.cumsum(chances)
    drawn = philox(sampling.seed, stream, step).random() * edges[-1]
    return int(np.searchsorted(edges, drawn, side="right"))


def penalised(scores: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Divide positive and multiply negative scores of tokens already seen (Keskar et al., arXiv:1909.05858)."""
    if penalty == 1.0 or len(seen) == 0:
        return scores
    changed = scores.copy()
    ids = np.unique(seen)
    changed[ids] = np.where(scores[ids] > 0, scores[ids] / penalty, scores[ids] * penalty)
    return changed


def truncated(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Scores (V,) with all but the top k, and the smallest set that holds probability top_p, at minus infinity."""
    order = np.argsort(-scores, kind="stable")
    keep = len(order) if top_k == 0 else min(top_k, len(order))
    if top_p < 1.0:
        chances = np.exp(scores[order[:keep]] - scores[order[0]])
        before = np.cumsum(chances) - chances
        keep = max(1, int(np.count_nonzero(before < top_p * chances.sum())))
    kept = np.full_like(scores, -np.inf)
    kept[order[:keep]] = scores[order[:keep]]
    return kept
