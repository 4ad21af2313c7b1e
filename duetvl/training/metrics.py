"""What a run tells: metrics.jsonl, TensorBoard events, a plot, and lines or a progress bar on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from duetvl.core.files import write_text

Row = dict[str, Any]
FILE = "metrics.jsonl"
_IN_LINES = ("loss", "grad_norm", "lr", "tokens_per_s", "eval_loss")


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run's metrics.jsonl; a last line that a kill has cut off is left out."""
    file = run / FILE
    if not file.is_file():
        return []
    rows: list[Row] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Writes the rows of a run to all its places. A row is a mapping with `step`, the number of updates done."""

    def __init__(self, run: Path, *, after: int = 0, history: Path | None = None, tensorboard: bool = False):
        """Start after step `after`: rows of later steps, from a run that was killed, are removed.

        `history` is the run whose rows up to there are taken over, where it is not this one.
        """
        self.run = run
        kept = [row for row in read_metrics(history or run) if row["step"] <= after]
        write_text(run / FILE, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(run / FILE, "a", encoding="utf-8")  # noqa: SIM115  closed by `close`
        self._board = _summary_writer(run / "tensorboard", after) if tensorboard else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row, on disk as soon as the system writes; numbers that are not finite become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in clean.items():
                if key != "step" and value is not None:
                    self._board.add_scalar(_tag(key), value, row["step"])

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _tag(key: str) -> str:
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _summary_writer(directory: Path, after: int) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=after + 1 if after else None)


class Progress:
    """Shows a run: a bar with the time left on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, total: int, *, done: int = 0, every: int = 1, stream: IO[str] | None = None):
        """`done` steps of `total` are behind."""
        self.stream = stream or sys.stdout
        self.total, self.every, self.started_at = total, every, done
        self.started = time.monotonic()
        self._bar: Any = None
        if _has_room(self.stream):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", file=self.stream, dynamic_ncols=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """Show one step."""
        step = row["step"]
        if self._bar is not None:
            self._bar.set_postfix_str(_numbers(row), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.every == 0 or step == self.total:
            self.say(f"step {step}/{self.total}  {_numbers(row)}  left {self._left(step)}")

    def say(self, text: str) -> None:
        """Show a line without disturbing the bar. A run does not end because nobody reads it any more."""
        if self._bar is not None:
            self._bar.write(text, file=self.stream)
            return
        try:
            self.stream.write(text + "\n")
            self.stream.flush()
        except BrokenPipeError:  # `duetvl train ... | head`
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        per_step = (time.monotonic() - self.started) / max(1, step - self.started_at)
        seconds = round(per_step * (self.total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _has_room(stream: IO[str]) -> bool:
    """Whether a bar would be seen: pseudo-terminals of build machines often have no size."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return True


def _numbers(row: Mapping[str, Any]) -> str:
    """Loss to so many places that a small improvement shows, the rest short."""
    forms = {"loss": ".4f", "eval_loss": ".4f", "grad_norm": ".3g", "lr": ".3g", "tokens_per_s": ".0f"}
    return "  ".join(f"{key} {row[key]:{forms[key]}}" for key in _IN_LINES if row.get(key) is not None)


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_runs(runs: Sequence[Path], target: Path) -> None:
    """Draw the losses and learning rates of runs into a PNG, which appears whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for run, name in zip(runs, _names(runs), strict=True):
        _draw_run(loss, rate, read_metrics(run), "" if len(runs) == 1 else f"{name}: ")
    loss.set_ylabel("loss per trained token")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    if loss.get_legend_handles_labels()[1]:
        loss.legend()
    temporary = target.with_name(f".{target.name}.tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, target)


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
