"""How a tower's layers attend: who sees whom is decided outside of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duetvl.core.ops import Ops
from duetvl.core.spans import Spans

Tensor = Any
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q (T, H, K), k, v (T, G, K)) -> out (T, H, K)


def attend_within(ops: Ops, spans_of: Callable[[int], Spans]) -> Attend:
    """Every row sees rows of its own span alone; `spans_of` gives those of a layer."""
    return lambda layer, q, k, v: ops.attention(q, k, v, spans_of(layer))[0]
