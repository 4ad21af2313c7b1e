"""The one linear layer of every model, with or without a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from duetvl.core.ops import Ops
from duetvl.core.params import Weights

Tensor = Any


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a pass must know of an adapter beside its tensors; the leaf `lora` of a linear layer that has one.

    scale multiplies its output. dropout is of its input, drawn by `key`; without a key, as in evaluation, there is
    none. rows (N,) are the numbers of the input's rows among those of the whole pass; None: they are all of them.
    """

    scale: float
    dropout: float = 0.0
    key: tuple[int, ...] = ()
    rows: np.ndarray | None = None


class Leave(Protocol):
    """The leaf `leave` of a linear layer that is divided by its inputs, `column` being the first of them here."""

    column: int

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer gives from this rank's inputs -> what it gives from all, of the rows that the rank keeps."""
        ...

    def norms(self, own: Tensor) -> Tensor:
        """Norms (O,) float32 of this rank's parts of the weight's rows -> those of the whole rows."""
        ...


def linear(ops: Ops, w: Weights, x: Tensor) -> Tensor:
    """x (..., I) times the leaf record's weight (O, I), plus its adapter's part, plus its bias (O,) -> (..., O).

    A layer that is divided by its inputs has a leaf `leave`: what sums the parts of all ranks, before the bias.
    """
    adapter, leave, bias = w.get("lora"), w.get("leave"), w.get("bias")
    if adapter is None and leave is None:
        return ops.linear(x, w.weight, bias)
    y = ops.linear(x, w.weight)
    if adapter is not None:
        y = y + adapter_part(ops, w, adapter, x, y)
    if leave is not None:
        y = leave(y)
    return y if bias is None else y + bias


def adapter_part(ops: Ops, w: Weights, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
    """What an adapter adds to y = W x: scale * B A x, or with magnitudes m what makes the sum DoRA's.

    Adapters are float32; they are cast to x's dtype where they are used, as under autocast, and get float32 gradients.
    DoRA (arXiv:2402.09353): m / |W + scale B A| * (W + scale B A) x, its row norms taken as constants (section 4.3).
    With dropout, the part that depends on the magnitudes sees the thinned x, as in PEFT.
    """
    dtype, leave = ops.dtype_of(x), w.get("leave")
    column = 0 if leave is None else leave.column
    dropped = ops.dropout(x, adapter.dropout, adapter.key, adapter.rows, column) if adapter.key else x
    low = ops.linear(dropped, ops.cast(w.lora_A.weight, dtype))
    update = ops.linear(low, ops.cast(w.lora_B.weight * adapter.scale, dtype))
    magnitude = w.get("lora_magnitude_vector")
    if magnitude is None:
        return update
    ratio = magnitude.weight / row_norms(ops, w.weight, w.lora_A.weight, w.lora_B.weight, adapter.scale, leave)
    own = ops.cast(ops.linear(dropped, w.weight) if adapter.key and adapter.dropout else y, "float32")
    return ops.cast(own * (ratio - 1.0) + ops.cast(update, "float32") * ratio, dtype)


def row_norms(ops: Ops, weight: Tensor, a: Tensor, b: Tensor, scale: float, leave: Leave | None) -> Tensor:
    """Norms (O,) float32 of the rows of weight + scale * b a, of the whole layer where it is divided by its inputs."""
    norms = ops.low_rank_row_norms(weight, a, b, scale)
    return norms if leave is None else leave.norms(norms)
