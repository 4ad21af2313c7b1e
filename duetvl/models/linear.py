"""The one linear layer of every model."""

from __future__ import annotations

from typing import Any

from duetvl.core.ops import Ops
from duetvl.core.params import Weights

Tensor = Any


def linear(ops: Ops, w: Weights, x: Tensor) -> Tensor:
    """x (..., I) times the leaf record's weight (O, I), plus its bias (O,) where it has one -> (..., O)."""
    return ops.linear(x, w.weight, w.get("bias"))
