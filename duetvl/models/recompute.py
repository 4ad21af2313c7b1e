"""Which activations are kept for the backward pass, and which are computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

Tensor = Any
Runner = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (fn, x) -> fn(x)
RecomputeMode = Literal["none", "full", "selective", "vision", "language"]
Again = Literal["nothing", "mlp", "block"]

# What runs again in the vision tower and in the language model. Of a block that does its input alone is kept. MLPs hold
# most of a block's activations; attention, which is expensive to run, is kept by "selective".
RUNS_AGAIN: Final[dict[RecomputeMode, tuple[Again, Again]]] = {
    "none": ("nothing", "nothing"),
    "full": ("block", "block"),
    "selective": ("mlp", "mlp"),
    "vision": ("block", "nothing"),
    "language": ("nothing", "block"),
}


def keep(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn(x)`, all of it remembered."""
    return fn(x)


@dataclass(frozen=True)
class Recompute:
    """How a tower runs its blocks, and the MLP (with its norm) in each of them."""

    block: Runner = keep
    mlp: Runner = keep


KEEP = Recompute()


def towers(mode: RecomputeMode, again: Runner) -> tuple[Recompute, Recompute]:
    """How the vision tower and the language model run; `again` is `Autograd.checkpoint`."""
    made = {"nothing": KEEP, "mlp": Recompute(mlp=again), "block": Recompute(block=again)}
    vision, language = RUNS_AGAIN[mode]
    return made[vision], made[language]
