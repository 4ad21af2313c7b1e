"""The vocabulary's matrix (V, D), as rows that tokens take and as the last product: of one leaf record where they are
tied.

A matrix whose rows are divided over ranks has a leaf `shard` beside it, which does the same without joining them.

T tokens, N rows whose next token is asked for, D width, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from duetvl.core.ops import Ops
from duetvl.core.params import Weights

Tensor = Any
# (hidden states (N, D) of the trained rows behind the final norm, the vocabulary's leaf record) -> 0-d tensors, a loss
# first
LastStage = Callable[[Tensor, Weights], tuple[Tensor, ...]]


class VocabularyShard(Protocol):
    """A part of the vocabulary's rows (v, D), and the ranks that have the others."""

    def embed(self, weight: Tensor, ids: Tensor) -> Tensor:
        """Rows (T, D) of the tokens ids (T,) that are here and zeros for others: a part of the sum over the ranks."""
        ...

    def logprobs(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p (N,) float32 of labels (N,) in the whole vocabulary; hidden (N, D) is the same on all ranks.

        The gradient to hidden is a part of the sum over the ranks, as is that of `logits`.
        """
        ...

    def logits(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> (N, V), of the whole vocabulary."""
        ...


def embed(ops: Ops, w: Weights, ids: Tensor) -> Tensor:
    """Rows (T, D) of the tokens ids (T,); of a part of the vocabulary, what it adds to them."""
    shard: VocabularyShard | None = w.get("shard")
    return ops.take_rows(w.weight, ids) if shard is None else shard.embed(w.weight, ids)


def logits(ops: Ops, w: Weights, hidden: Tensor) -> Tensor:
    """hidden (N, D) -> (N, V), in its dtype."""
    shard: VocabularyShard | None = w.get("shard")
    return ops.linear(hidden, w.weight) if shard is None else shard.logits(w.weight, hidden)


def cross_entropy(ops: Ops, w: Weights, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of -log p of labels (N,), each times its weight (N,) float32 where there are weights: float32, 0-d."""
    if w.get("shard") is None:
        return ops.linear_cross_entropy(hidden, w.weight, labels, weights)
    losses = -logprobs(ops, w, hidden, labels)
    return ops.sum(losses if weights is None else losses * weights)


def logprobs(ops: Ops, w: Weights, hidden: Tensor, labels: Tensor) -> Tensor:
    """log p (N,) float32 of labels (N,)."""
    shard: VocabularyShard | None = w.get("shard")
    if shard is not None:
        return shard.logprobs(w.weight, hidden, labels)
    return ops.linear_logprobs(hidden, w.weight, labels)[0]
