"""How long a run is, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from duetvl.training.recipe.sections import OptimSection, Recipe


def total_steps(recipe: Recipe, records: Fraction | int | None) -> int:
    """Optimizer steps of a whole run over `records` records in an epoch; None: a stream, which is not counted."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert records is not None, "recipes with streams give train.steps"
    epochs = 1.0 if recipe.train.epochs is None else recipe.train.epochs
    return math.ceil(_as_written(epochs) * records / recipe.train.global_batch)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: `warmup` itself, or that fraction of `total`, rounded up, when it is below 1."""
    return math.ceil(_as_written(warmup) * total) if warmup < 1 else int(warmup)


def _as_written(number: float) -> Fraction:
    """The decimal number that was written: 0.1 is a tenth, where the float is a little more and rounds up to a step."""
    return Fraction(str(number))


def stretched(recipe: Recipe, stored: Mapping[str, Any], records: Fraction | int | None, step: int) -> str:
    """What becomes of the learning rate after `step`, where the `stored` recipe has another length; else empty."""
    lengths = {name: stored["train"].get(name) for name in ("steps", "epochs")}
    before = recipe.model_copy(update={"train": recipe.train.model_copy(update=lengths)})
    old, new = total_steps(before, records), total_steps(recipe, records)
    last, following = learning_rate(step - 1, old, recipe.optim), learning_rate(step, new, recipe.optim)
    if following == learning_rate(step, old, recipe.optim):
        return ""
    return (
        f"the schedule reached over {old} steps and now reaches over {new}: the learning rate was {last:.3g} at step "
        f"{step} and is {following:.3g} at step {step + 1}"
    )


def learning_rate(step: int, total: int, optim: OptimSection) -> float:
    """The rate of update number `step`, from 0, of `total`.

    It rises from 0 over the warm-up, and falls to `min_lr_ratio` of the peak at `total`: the same numbers as
    transformers' schedules, whose first update with a warm-up has rate 0.
    """
    warm = warmup_steps(optim.warmup, total)
    if step < warm:
        return optim.lr * step / warm
    progress = min(1.0, (step - warm) / max(1, total - warm))
    fall = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[optim.schedule]
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * fall)
