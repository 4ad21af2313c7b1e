"""The vocabulary's matrix (V, D), as rows that tokens take and as the last product: of one leaf record where they are
tied.

T tokens, N rows whose next token is asked for, D width, V tokens in the vocabulary.
"""

from __future__ import annotations

from typing import Any

from duetvl.core.ops import Ops
from duetvl.core.params import Weights

Tensor = Any


def embed(ops: Ops, w: Weights, ids: Tensor) -> Tensor:
    """Rows (T, D) of the tokens ids (T,)."""
    return ops.take_rows(w.weight, ids)


def logits(ops: Ops, w: Weights, hidden: Tensor) -> Tensor:
    """hidden (N, D) -> (N, V), in its dtype."""
    return ops.linear(hidden, w.weight)


def cross_entropy(ops: Ops, w: Weights, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of -log p of labels (N,), each times its weight (N,) float32 where there are weights: float32, 0-d."""
    return ops.linear_cross_entropy(hidden, w.weight, labels, weights)


def logprobs(ops: Ops, w: Weights, hidden: Tensor, labels: Tensor) -> Tensor:
    """log p (N,) float32 of labels (N,)."""
    return ops.linear_logprobs(hidden, w.weight, labels)[0]
