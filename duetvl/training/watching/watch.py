"""What a run shows and logs: rank 0 has the terminal, the logs, trackers and plots, the other ranks are quiet."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from duetvl.core.ranks import Ranks
from duetvl.training.checkpoints.run_directory import Start
from duetvl.training.recipe.sections import Recipe
from duetvl.training.watching.metrics import MetricsLog, read_metrics
from duetvl.training.watching.plots import plot_runs
from duetvl.training.watching.progress import Progress
from duetvl.training.watching.run_log import RunLog
from duetvl.training.watching.trackers import open_trackers

Row = Mapping[str, Any]


class Quiet:
    """What the other ranks have. They show only what concerns one of them alone, under its number."""

    def __init__(self, rank: int):
        self.rank = rank

    def say(self, text: str) -> None:
        """Show a line on the terminal."""

    def warn(self, text: str) -> None:
        """Show a line that concerns this rank alone."""
        with suppress(OSError):
            sys.stderr.write(f"rank {self.rank}: {text}\n")
            sys.stderr.flush()

    def write(self, row: Row) -> None:
        """Add a row to metrics.jsonl and every tracker."""

    def write_answers(self, step: int, rows: Sequence[Row]) -> None:
        """Add texts to samples.jsonl and every tracker."""

    def show(self, row: Row) -> None:
        """Show one step."""

    def plot(self) -> None:
        """Draw the curves, where the recipe asks for it."""


class Watch(Quiet):
    """What rank 0 has, as has a run of one process."""

    def __init__(self, run_dir: Path, progress: Progress, said: RunLog, log: MetricsLog, *, plots: bool):
        """All of it is open; `said` keeps what is shown beside the steps."""
        super().__init__(0)
        self.run_dir, self.plots, self._progress, self._said, self._log = run_dir, plots, progress, said, log

    def say(self, text: str) -> None:
        """See Quiet."""
        self._said.write(text)
        self._progress.say(text)

    def warn(self, text: str) -> None:
        """See Quiet."""
        self.say(text)

    def write(self, row: Row) -> None:
        """See Quiet."""
        self._log.write(row)

    def write_answers(self, step: int, rows: Sequence[Row]) -> None:
        """See Quiet."""
        self._log.write_answers(step, rows)

    def show(self, row: Row) -> None:
        """See Quiet."""
        self._progress.step(dict(row))

    def plot(self) -> None:
        """See Quiet."""
        if self.plots:
            try:
                plot_runs([self.run_dir], self.run_dir / "loss.png")
            except OSError as error:
                self.say(f"warning: {self.run_dir / 'loss.png'} cannot be drawn: {error.strerror or error}")


@contextmanager
def watched(
    recipe: Recipe, run_dir: Path, ranks: Ranks, *, done: int, total: int, start: Start
) -> Iterator[tuple[Quiet, dict[int, float]]]:
    """What this rank has, in a run with `done` of `total` steps behind it; and the eval_loss by step.

    A start from a checkpoint keeps the rows up to there, or takes over those of its `history`; one without keeps none.
    Raises what the logs and trackers raise, on all.
    """
    found: list[Quiet] = [Quiet(ranks.index)]
    with ExitStack() as open_things:

        def opened() -> dict[int, float]:
            progress = Progress(total, done=done, every=recipe.log.every)
            open_things.callback(progress.close)
            trackers = open_trackers(recipe, run_dir, done)
            after = -1 if start.checkpoint is None else done
            log = MetricsLog(run_dir, after=after, history=start.history, trackers=trackers, say=progress.say)
            open_things.callback(log.close)
            found.append(Watch(run_dir, progress, RunLog(run_dir, progress.say), log, plots=recipe.log.plot))
            rows = [row for row in read_metrics(run_dir) if "eval_loss" in row]
            return {row["step"]: math.nan if row["eval_loss"] is None else row["eval_loss"] for row in rows}

        losses = ranks.first(opened)
        yield found[-1], losses
