"""What is left of a run once its steps are over: the export, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duetvl.storage.checkpoint_format import MANIFEST
from duetvl.storage.finding import CheckpointRef, find_checkpoint
from duetvl.training.checkpoints.run_directory import export_kind, set_other_kind_aside, wanted_kind
from duetvl.training.recipe.sections import Recipe
from duetvl.training.watching.metrics import read_metrics


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are means over tokens: of the last step, and of the last evaluation."""

    run_dir: Path
    step: int
    loss: float | None
    eval_loss: float | None
    checkpoint: Path | None
    stopped_by: int | None = None  # the number of the signal that ended it before its time
    stop_reason: str | None = None  # what a callback said that did so


def last_losses(run_dir: Path) -> tuple[float | None, float | None]:
    """The losses of the last step and of the last evaluation."""
    rows = read_metrics(run_dir)
    return _last(rows, "loss"), _last(rows, "eval_loss")


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


@dataclass(frozen=True)
class Export:
    """`export/` of a run; one process writes it. `write` is the job's, which makes it of a checkpoint."""

    recipe: Recipe
    directory: Path
    write: Callable[[CheckpointRef, Path], None]

    def is_due(self, resumed: CheckpointRef | None) -> bool:
        """Whether it is asked for, and is not there as the recipe and the last checkpoint want it.

        `resumed` is that checkpoint where this start has found it and made no step.
        """
        if not self.recipe.checkpoint.export:
            return False
        if resumed is None or not self.directory.exists():
            return True
        older = self.directory.stat().st_mtime_ns < (resumed.path / MANIFEST).stat().st_mtime_ns
        return older or export_kind(self.directory) != wanted_kind(self.recipe)

    def make(self, checkpoint: Path) -> Iterator[str]:
        """Write it, in the place of one of the same kind. Gives notes for the user."""
        yield from set_other_kind_aside(self.directory, wanted_kind(self.recipe))
        self.write(find_checkpoint(checkpoint, kinds=("weights",)), self.directory)
        yield f"exported {self.directory}"
