"""Shares of a device's peaks, fitted to what the steps of runs took: `duetvl plan --measured RUN ...`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from duetvl.convert.opening import open_merged
from duetvl.core.errors import ConfigError
from duetvl.cost_model.devices import DeviceType, Shares
from duetvl.cost_model.step_time import CostModel, StepTime
from duetvl.parallel.division import Division
from duetvl.training.checkpoints.run_directory import RECIPE
from duetvl.training.expected import cost_model, here, sizes_of
from duetvl.training.lora import plan_adapters
from duetvl.training.memory import division_of
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.sft import first_drafts
from duetvl.training.watching.metrics import read_metrics

_WARMING: Final = 2  # steps at the start of a run that are not looked at
_LEAST: Final = 3  # steps that have to be left
_SENDS: Final = 0.05  # of a step's seconds, spent on links: less says nothing of them
_LOWEST, _HIGHEST = 0.001, 4.0  # of a share; above 1 where a table's peak is too low
_ROUNDS: Final = 4  # of fitting one share after the other
_GOLDEN: Final = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class Measured:
    """A run: its layout, the cost model of its recipe, and the median seconds of a step without waits for data."""

    run: Path
    division: Division
    model: CostModel
    seconds: float
    steps: int

    def expected(self, shares: Shares) -> StepTime:
        """What a step is expected to take with these shares."""
        model = self.model
        device = replace(model.device, shares=shares)
        return CostModel(model.config, model.trained, model.work, model.optimizing, device).step(self.division)


def read_run(run: Path, device: DeviceType | None) -> Measured:
    """A run as it was trained, on this kind of device; None: on this machine's processor, which is measured.

    Its model's config and its data have to be where they were.

    Raises ConfigError where the directory is not a run's, or has too few steps.
    """
    file = run / RECIPE
    if not file.is_file():
        raise ConfigError(f"--measured {run}: is not the directory of a run, it has no {RECIPE}")
    recipe = load_recipe(file)
    rows = [row for row in read_metrics(run) if _is_positive(row.get("step_s"))][_WARMING:]
    if len(rows) < _LEAST:
        raise ConfigError(
            f"--measured {run}: has {len(rows) + _WARMING} steps or fewer in metrics.jsonl; a run of at least "
            f"{_LEAST + _WARMING} is needed"
        )
    seconds = median(row["step_s"] * (1 - row.get("data_wait", 0.0)) for row in rows)
    source = open_merged(recipe.model.path, base=recipe.model.base, weights=False)
    sizes = sizes_of(first_drafts(recipe, source))
    if not sizes:
        raise ConfigError(f"--measured {run}: none of the first records of its data can be used")
    adapters = plan.adapters if (plan := plan_adapters(recipe, source.config)) else None
    model = cost_model(recipe, source.config, adapters, sizes, device or here(recipe, source.config, sizes))
    return Measured(run, division_of(recipe, source.config), model, seconds, len(rows))


def _is_positive(value: Any) -> bool:
    return isinstance(value, float | int) and value > 0


def fitted(runs: Sequence[Measured]) -> Shares:
    """The shares with which the expected seconds of these runs are nearest to the measured ones.

    That of products is fitted to one run or more; that of links too, if there are several and one of them sends for
    a noticeable part of its step. The least mean square of the logarithms of the ratios counts.
    """
    shares = runs[0].model.device.shares

    def error(shares: Shares) -> float:
        return sum(math.log(run.expected(shares).seconds / run.seconds) ** 2 for run in runs)

    steps = [run.expected(shares) for run in runs]
    sending = max((one.sums + one.pieces + one.blocks + one.gradients) / one.seconds for one in steps)
    names = ["products", "links"] if len(runs) > 1 and sending > _SENDS else ["products"]
    for _ in range(_ROUNDS if len(names) > 1 else 1):
        for name in names:
            shares = _nearer(shares, name, error)
    return shares


def _nearer(shares: Shares, name: str, error: Callable[[Shares], float]) -> Shares:
    """With the value of one share for which the error is least."""
    return replace(shares, **{name: _least(lambda value: error(replace(shares, **{name: value})))})


def _least(error: Callable[[float], float]) -> float:
    """Where an error with one minimum is least, by golden sections of the logarithm."""
    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    while high - low > 0.01:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if error(math.exp(left)) < error(math.exp(right)) else (left, high)
    return math.exp((low + high) / 2)


def describe(runs: Sequence[Measured], shares: Shares) -> Iterator[str]:
    """Each run's seconds beside those expected before and after, and the option that gives these shares again."""
    for run in runs:
        before, after = (run.expected(one).seconds for one in (run.model.device.shares, shares))
        yield (
            f"{run.run}: {run.seconds:.3g} s a step (median of {run.steps}), expected {before:.3g} s, with the shares "
            f"below {after:.3g} s"
        )
    yield f"shares of the peaks, to give again: --shares {written(shares)}"


def written(shares: Shares) -> str:
    """`products=0.41,memory=0.8,links=0.8`"""
    return ",".join(f"{name}={value:.3g}" for name, value in vars(shares).items())


def shares_of(text: str, usual: Shares) -> Shares:
    """From `products=0.41,links=0.6`; those that are not named are the usual ones. Raises ConfigError."""
    values = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            values[name.strip()] = float(number)
        except ValueError:
            values[name.strip()] = -1.0
    known = vars(usual)
    wrong = [name for name, value in values.items() if name not in known or not 0 < value <= _HIGHEST]
    if wrong:
        raise ConfigError(
            f"--shares {text}: give numbers above 0 and at most {_HIGHEST:g} for {', '.join(known)}, such as "
            f"{written(usual)}"
        )
    return replace(usual, **values)
