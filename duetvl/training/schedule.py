"""How long a run is, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final

from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.recipe.sections import Recipe


def total_steps(recipe: Recipe, records: Fraction | int | None) -> int:
    """Optimizer steps of a whole run over `records` records in an epoch; None: a stream, which is not counted."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    assert records is not None, "recipes with streams give train.steps"
    epochs = 1.0 if recipe.train.epochs is None else recipe.train.epochs
    return math.ceil(_as_written(epochs) * records / recipe.train.global_batch)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up or wsd's decay: `warmup` itself, or that fraction of `total`, rounded up, when it is below 1."""
    return math.ceil(_as_written(warmup) * total) if warmup < 1 else int(warmup)


def _as_written(number: float) -> Fraction:
    """The decimal number that was written: 0.1 is a tenth, where the float is a little more and rounds up to a step."""
    return Fraction(str(number))


def stretched(recipe: Recipe, stored: Mapping[str, Any], records: Fraction | int | None, step: int) -> str:
    """What becomes of the learning rate after `step`, where the `stored` recipe has another length; else empty.

    A rate that is lifted by it is a warning.
    """
    lengths = {name: stored["train"].get(name) for name in ("steps", "epochs")}
    before = recipe.model_copy(update={"train": recipe.train.model_copy(update=lengths)})
    old, new = total_steps(before, records), total_steps(recipe, records)
    last, following = learning_rate(step - 1, old, recipe.optim), learning_rate(step, new, recipe.optim)
    planned = learning_rate(step, old, recipe.optim)
    if following == planned:
        return ""
    return (
        f"{'warning: ' * (following > planned)}the schedule spanned {old} steps and now spans {new}: the "
        f"learning rate was {last:.3g} at step {step} and is {following:.3g} at step {step + 1}"
    )


def learning_rate(step: int, total: int, optim: OptimSection) -> float:
    """The rate of update number `step`, from 0, of `total`.

    It rises from 0 over the warm-up, and falls as the schedule has it, to `min_lr_ratio` of the peak at `total` (but
    for constant and inverse_sqrt, which have no end): the same numbers as transformers' schedules, whose first update
    with a warm-up has rate 0.
    """
    warm = warmup_steps(optim.warmup, total)
    if step < warm:
        return optim.lr * step / warm
    fall = _FALLS[optim.schedule](step, warm, total, optim)
    return optim.lr * (optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * fall)


def _progress(step: int, first: int, total: int) -> float:
    """How far a step is on the way from `first` to `total`: 0 to 1."""
    return min(1.0, max(0, step - first) / max(1, total - first))


def _cosine(step: int, first: int, total: int, optim: OptimSection) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, first, total)))


def _linear(step: int, first: int, total: int, optim: OptimSection) -> float:
    return 1.0 - _progress(step, first, total)


def _constant(step: int, first: int, total: int, optim: OptimSection) -> float:
    return 1.0


def _inverse_sqrt(step: int, warm: int, total: int, optim: OptimSection) -> float:
    """The root of scale / (scale + steps since the warm-up), where the scale is the warm-up's length."""
    scale = warm or _SCALE_WITHOUT_WARMUP
    return math.sqrt(scale / (scale + step - warm))


def _wsd(step: int, warm: int, total: int, optim: OptimSection) -> float:
    decay = warmup_steps(_DECAY if optim.decay is None else optim.decay, total)
    return _cosine(step, max(warm, total - decay), total, optim)


_SCALE_WITHOUT_WARMUP: Final = 10_000  # transformers'
_DECAY: Final = 0.1
# The part of the peak that is left at a step after the warm-up.
_FALLS: Final[Mapping[str, Callable[[int, int, int, OptimSection], float]]] = {
    "cosine": _cosine, "linear": _linear, "constant": _constant, "inverse_sqrt": _inverse_sqrt, "wsd": _wsd,
}  # fmt: skip
