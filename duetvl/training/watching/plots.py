"""Drawing the curves of runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.storage.files import write_bytes
from duetvl.training.watching.metrics import read_metrics

Row = Mapping[str, Any]


def plot_runs(runs: Sequence[Path], target: Path, keys: Sequence[str] = ()) -> None:
    """Draw curves of runs into a PNG, which appears whole or not at all.

    By default losses (of steps and of evaluations) above learning rates, and below them the scores of benchmarks with
    their intervals, where there are some; with `keys` one part for each of these numbers of metrics.jsonl.
    ConfigError for a key that no run has.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [read_metrics(run) for run in runs]
    labels = [""] if len(runs) == 1 else [f"{name}: " for name in _names(runs)]
    _check_keys(keys, rows)
    scores = [] if keys else _scores(rows)
    names = [*keys] or ["loss", "learning rate", *["score, %"] * bool(scores)]
    heights = [1] * len(keys) or [3, 1, 2][: len(names)]
    figure = Figure(figsize=(9, 6.5 if len(names) < 3 else 2.6 * len(names)), layout="constrained")
    parts = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    for one, label in zip(rows, labels, strict=True):
        if keys:
            _draw_keys(parts, keys, one, label)
        else:
            _draw_run(parts[0], parts[1], one, label)
            _draw_scores(parts[-1], scores, one, label)
    for axes, name in zip(parts, names, strict=True):
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    parts[-1].set_xlabel("step")
    for axes in parts:
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    FigureCanvasAgg(figure).print_png(content := io.BytesIO())
    write_bytes(target, content.getvalue())


def _check_keys(keys: Sequence[str], runs: Sequence[Sequence[Row]]) -> None:
    known = {key for rows in runs for row in rows for key, value in row.items() if isinstance(value, int | float)}
    for key in keys:
        if key not in known:
            raise ConfigError(f"no run has a value {key!r} in its metrics{did_you_mean(key, known - {'step'})}")


def _draw_keys(parts: Sequence[Any], keys: Sequence[str], rows: Sequence[Row], label: str) -> None:
    for axes, key in zip(parts, keys, strict=True):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if points:
            sparse = "o" if len(points) < 50 else ""
            axes.plot(*zip(*points, strict=True), marker=sparse, markersize=3, linewidth=1, label=f"{label}{key}")


def _draw_run(loss: Any, rate: Any, rows: Sequence[Row], label: str) -> None:
    train = [(row["step"], row["loss"], row["lr"]) for row in rows if row.get("loss") is not None]
    held = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if train:
        steps, losses, rates = zip(*train, strict=True)
        (raw,) = loss.plot(steps, losses, alpha=0.35, linewidth=1)
        loss.plot(steps, _smoothed(losses), color=raw.get_color(), label=f"{label}train, smoothed")
        rate.plot(steps, rates, color=raw.get_color())
    if held:
        loss.plot(*zip(*held, strict=True), marker="o", linestyle="--", label=f"{label}evaluation")


def _scores(runs: Sequence[Sequence[Row]]) -> list[str]:
    """The keys of benchmarks' scores: those that have an interval."""
    keys = dict.fromkeys(key for rows in runs for row in rows for key in row if key.startswith("eval_"))
    return [key for key in keys if f"{key}_low" in keys]


def _draw_scores(axes: Any, keys: Sequence[str], rows: Sequence[Row], label: str) -> None:
    for key in keys:
        names = (key, f"{key}_low", f"{key}_high")
        points = [(row["step"], *(row[name] for name in names)) for row in rows if row.get(key) is not None]
        if points:
            steps, values, lows, highs = zip(*points, strict=True)
            (line,) = axes.plot(steps, values, marker="o", label=f"{label}{key.removeprefix('eval_')}")
            axes.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15)


def _smoothed(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over about a fortieth of the run; its start is not biased towards zero."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 40)
    mean = weight = 0.0
    smooth = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth


def _names(runs: Sequence[Path]) -> list[str]:
    """Directory names, with the path where two are equal."""
    names = [run.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]
