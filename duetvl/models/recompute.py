"""Which activations are kept for the backward pass, and which are computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Tensor = Any
Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (fn, x) -> fn(x)
Mode = Literal["none", "full", "selective", "vision", "language"]


def keep(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn(x)`, all of it remembered."""
    return fn(x)


@dataclass(frozen=True)
class Recompute:
    """How a tower runs its blocks, and the MLP (with its norm) in each of them."""

    block: Run = keep
    mlp: Run = keep


KEEP = Recompute()


def towers(mode: Mode, again: Run) -> tuple[Recompute, Recompute]:
    """How the vision tower and the language model run; `again` is `Autograd.checkpoint`.

    full: of every block its input alone is kept. vision, language: that tower does so, the other keeps all.
    selective: MLPs run again, which hold most of a block's activations; attention, which is expensive to run, is kept.
    """
    whole, mlps = Recompute(block=again), Recompute(mlp=again)
    return {
        "none": (KEEP, KEEP),
        "full": (whole, whole),
        "selective": (mlps, mlps),
        "vision": (whole, KEEP),
        "language": (KEEP, whole),
    }[mode]
