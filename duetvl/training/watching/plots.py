"""Drawing the curves of runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.storage.files import write_bytes
from duetvl.training.watching.metrics import read_metrics

Row = Mapping[str, Any]

# Of the first run, the second, and so on: where curves lie on each other, the one below shows between the dashes.
_LINES: Final = ("-", (0, (5, 3)), (0, (1, 2)), (0, (8, 3, 1, 3)))
_MARKERS: Final = ("o", "x", "s", "+")
_WIDE: Final = 10  # the largest of the values over the smallest, from which on an axis is logarithmic


def plot_runs(runs: Sequence[Path], target: Path, keys: Sequence[str] = ()) -> None:
    """Draw curves of runs, see `figure_of`, into a PNG, which appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure_of(runs, keys)).print_png(content := io.BytesIO())
    write_bytes(target, content.getvalue())


def figure_of(runs: Sequence[Path], keys: Sequence[str] = ()) -> Any:
    """A matplotlib figure with the curves of runs.

    By default losses (of steps and of evaluations), of several runs how far the others are from the first, learning
    rates, and the scores of benchmarks with their intervals, where there are some; with `keys` one part for each of
    these numbers of metrics.jsonl. An axis is logarithmic where its values span much. ConfigError for a key that no
    run has.
    """
    from matplotlib.figure import Figure

    names = _names(runs) if len(runs) > 1 else [""]
    curves = [
        _Curves(name, number, read_metrics(run)) for number, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    _check_keys(keys, curves)
    parts = [_Part(key, 2, _of_key(key)) for key in keys] or list(_usual(curves))
    figure = Figure(figsize=(9, max(6.5, 1.3 * sum(part.height for part in parts))), layout="constrained")
    heights = [part.height for part in parts]
    all_axes = figure.subplots(len(parts), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, part in zip(all_axes, parts, strict=True):
        part.draw(axes, curves)
        axes.set_ylabel(part.name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    all_axes[-1].set_xlabel("step")
    return figure


class _Series(NamedTuple):
    """One number over steps."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class _Curves:
    """The numbers of one run, and how they are drawn: the `number`-th in the picture; `name` is empty where alone."""

    name: str
    number: int
    rows: Sequence[Row]

    def series(self, key: str) -> _Series:
        """The steps that have this number."""
        points = [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return _Series(np.array(steps, np.int64), np.array(values, np.float64))

    def label(self, text: str) -> str:
        """For the legend."""
        return f"{self.name}: {text}" if self.name else text

    @property
    def style(self) -> dict[str, Any]:
        """Colour and dashes of its lines."""
        return {"color": f"C{self.number % 10}", "linestyle": _LINES[self.number % len(_LINES)]}

    @property
    def marker(self) -> str:
        """Of its single points."""
        return _MARKERS[self.number % len(_MARKERS)]


class _Part(NamedTuple):
    """A part of the picture, from top to bottom."""

    name: str
    height: int
    draw: Callable[[Any, Sequence[_Curves]], None]


def _usual(runs: Sequence[_Curves]) -> Iterator[_Part]:
    yield _Part("loss", 3, _draw_losses)
    if len(runs) > 1:
        yield _Part("difference of loss", 2, _draw_differences)
    yield _Part("learning rate", 1, _draw_rates)
    if any(_score_keys(run) for run in runs):
        yield _Part("score, %", 2, _draw_scores)


def _check_keys(keys: Sequence[str], runs: Sequence[_Curves]) -> None:
    known = {key for run in runs for row in run.rows for key, value in row.items() if isinstance(value, int | float)}
    for key in keys:
        if key not in known:
            raise ConfigError(f"no run has a value {key!r} in its metrics{did_you_mean(key, known - {'step'})}")


# -- what is in a part ------------------------------------------------------------------------------------------------


def _of_key(key: str) -> Callable[[Any, Sequence[_Curves]], None]:
    def draw(axes: Any, runs: Sequence[_Curves]) -> None:
        drawn = [(run, run.series(key)) for run in runs]
        for run, (steps, values) in drawn:
            if len(steps):
                marker = run.marker if len(steps) < 50 else ""
                axes.plot(steps, values, marker=marker, markersize=3, linewidth=1, label=run.label(key), **run.style)
        _scale(axes, [series.values for _, series in drawn])

    return draw


def _draw_losses(axes: Any, runs: Sequence[_Curves]) -> None:
    shown: list[np.ndarray] = []
    for run in runs:
        (steps, losses), (evaluated, held_out) = run.series("loss"), run.series("eval_loss")
        if len(steps):
            axes.plot(steps, losses, color=run.style["color"], alpha=0.3, linewidth=0.8)
            axes.plot(steps, smoothed(losses), label=run.label("train, smoothed"), **run.style)
        if len(evaluated):
            colour = f"C{len(runs) + run.number}" if len(runs) == 1 else run.style["color"]
            axes.plot(
                evaluated, held_out, marker=run.marker, linestyle=":", color=colour, label=run.label("evaluation")
            )
        shown += [losses, held_out]
    _scale(axes, shown)


def _draw_differences(axes: Any, runs: Sequence[_Curves]) -> None:
    """Of the losses of every other run from the first, at the steps that both have."""
    first = runs[0].series("loss")
    for run in runs[1:]:
        own = run.series("loss")
        steps, here, there = np.intersect1d(own.steps, first.steps, return_indices=True)
        if len(steps):
            apart = own.values[here] - first.values[there]
            label = f"{run.name} - {runs[0].name}, at most {np.abs(apart).max():.2g}"
            axes.plot(steps, apart, color=run.style["color"], linewidth=0.8, label=label)
    axes.axhline(0, color="grey", linewidth=0.5)


def _draw_rates(axes: Any, runs: Sequence[_Curves]) -> None:
    for run in runs:
        axes.plot(*run.series("lr"), **run.style)


def _score_keys(run: _Curves) -> list[str]:
    """The keys of benchmarks' scores: those that have an interval."""
    keys = dict.fromkeys(key for row in run.rows for key in row if key.startswith("eval_"))
    return [key for key in keys if f"{key}_low" in keys]


def _draw_scores(axes: Any, runs: Sequence[_Curves]) -> None:
    for run in runs:
        for key in _score_keys(run):
            (steps, values), (low_steps, lows), (_, highs) = (
                run.series(f"{key}{end}") for end in ("", "_low", "_high")
            )
            label = run.label(key.removeprefix("eval_"))
            (line,) = axes.plot(steps, values, marker=run.marker, linestyle=run.style["linestyle"], label=label)
            axes.fill_between(low_steps, lows, highs, color=line.get_color(), alpha=0.15)


def _scale(axes: Any, values: Sequence[np.ndarray]) -> None:
    """A logarithmic axis for positive values that span much."""
    every = np.concatenate(values)
    if not len(every) or every.min() <= 0 or every.max() / every.min() < _WIDE:
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    if every.max() / every.min() < 1000:  # few powers of ten: their halves and fifths are named as well
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def smoothed(values: np.ndarray) -> np.ndarray:
    """At each of the values, (N,), a line fitted to those around it.

    The window has a twentieth of all values, and less at the start, where a curve is steep. It is centred, but at the
    end, where the line is followed to its last point: so the result does not lag behind a falling curve.
    """
    at = np.arange(len(values))
    half = np.minimum(len(values) // 40, at // 4)
    last = np.minimum(at + half, len(values) - 1)
    first = np.minimum(at - half, last - 2 * half)

    def summed(numbers: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(numbers)])
        return sums[last + 1] - sums[first]

    count = last - first + 1
    place, mean = summed(at) / count, summed(values) / count
    spread, together = summed(at * at) - count * place**2, summed(at * values) - count * place * mean
    slope = np.divide(together, spread, out=np.zeros(len(values)), where=count > 2)
    return mean + slope * (at - place)


def _names(runs: Sequence[Path]) -> list[str]:
    """Directory names, with the path where two are equal."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]
