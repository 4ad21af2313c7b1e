"""The learning-rate arguments of a script to the fields of `optim`."""

from __future__ import annotations

from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.report import Report, Values
from duetvl.migrate.tables import SCRIPT

_SCHEDULES: Final = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "inverse-square-root": "inverse_sqrt", "WSD": "wsd",
}  # fmt: skip


def schedule(script: Values, lr: float, steps: int, report: Report) -> dict[str, Any]:
    """The fields of `optim` that say how the rate goes over `steps`, of a peak `lr`."""
    style = script.text("--lr-decay-style") or "linear"
    if style not in _SCHEDULES:
        report.lacks(SCRIPT.title, f"--lr-decay-style {style}", f": there are {', '.join(_SCHEDULES)}")
        style = "linear"
    made: dict[str, Any] = {"schedule": _SCHEDULES[style]}
    report.add("used", "--lr-decay-style", f"optim.schedule: {made['schedule']}{absent(script, '--lr-decay-style')}")
    if style == "WSD":
        made["decay"] = _wsd(script, report)
    decay = script.whole("--lr-decay-iters")
    if decay is not None and decay != steps:
        report.add("changed", "--lr-decay-iters", f"{decay}, but the rate falls over all {steps} steps here")
    elif decay is not None:
        report.add("used", "--lr-decay-iters", f"{decay}, as many as train.steps")
    fraction, warmup = script.number("--lr-warmup-fraction"), script.whole("--lr-warmup-iters")
    if fraction and warmup:
        report.add("contradiction", "--lr-warmup-iters", f"{warmup}, but --lr-warmup-fraction is given, which is taken")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ConfigError(f"{SCRIPT.title}: --lr-warmup-fraction is {fraction:g}, expected a fraction of all steps")
    if fraction or warmup:
        made["warmup"] = (steps if fraction == 1 else float(fraction)) if fraction else warmup  # here 1 is one step
        report.add(
            "used", "--lr-warmup-fraction" if fraction else "--lr-warmup-iters", f"optim.warmup: {made['warmup']:g}"
        )
    if style == "inverse-square-root" and "warmup" not in made:
        report.add(
            "changed",
            "optim.warmup",
            "none: the rate is divided by the root of 1 + step / 10000, there by that of the step",
        )
    least = float(script.number("--min-lr", 0.0))
    if least and style == "inverse-square-root":
        report.add("changed", "--min-lr", f"{least:g}, but an inverse_sqrt rate has no floor here")
    elif least and style != "constant":
        made["min_lr_ratio"] = float(f"{least / lr:.12g}")
        report.add("used", "--min-lr", f"optim.min_lr_ratio: {least / lr:g}")
    return made


def _wsd(script: Values, report: Report) -> int:
    """The steps of the decay. Raises ConfigError where the script does not give them."""
    decay = script.whole("--lr-wsd-decay-iters")
    if decay is None or decay < 1:
        raise ConfigError(f"{SCRIPT.title}: --lr-decay-style WSD needs --lr-wsd-decay-iters, 1 or more, found {decay}")
    report.add("used", "--lr-wsd-decay-iters", f"optim.decay: {decay}")
    style = script.text("--lr-wsd-decay-style") or "exponential"
    kind, said = ("used", "as here") if style == "cosine" else ("changed", f"{style} there, along a cosine here")
    report.add(kind, "--lr-wsd-decay-style", said + absent(script, "--lr-wsd-decay-style"))  # type: ignore[arg-type]
    return int(decay)


def absent(script: Values, argument: str, whose: str = "Megatron's default") -> str:
    """What a report adds of an argument that the script does not give; empty where it does."""
    return "" if argument in script else f" ({whose})"
