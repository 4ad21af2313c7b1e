"""The validation losses of a run so far, and what follows from them: its end, and the checkpoint that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping

from duetvl.training.recipe.sections import TrainSection


class Evaluations:
    """The eval_loss of every evaluation, by step. All ranks have the same, so what they decide by it is the same."""

    def __init__(self, losses: Mapping[int, float], since: int = -1):
        """`losses` of the evaluations before this start of the run, in the order of their steps.

        Those up to step `since` are of other validation data, and do not count.
        """
        self.losses = {step: loss for step, loss in losses.items() if step > since}
        self.last_step = max(self.losses, default=-1)

    def add(self, step: int, loss: float | None) -> None:
        """An evaluation after `step`; `loss` is None where no token was trained in it, and then it does not count."""
        self.last_step = step
        if loss is not None:
            self.losses[step] = loss

    def owed(self, step: int, section: TrainSection) -> bool:
        """Whether the weights that a start finds are to be evaluated: untrained, or where a signal kept one from it."""
        due = step % section.eval_every == 0 if step and section.eval_every else section.eval_first and not step
        return due and self.last_step < step

    def best(self, steps: set[int] | None = None) -> int | None:
        """The step with the lowest loss, the first of several; among `steps` where they are given; None: of none."""
        known = {step: loss for step, loss in self.losses.items() if steps is None or step in steps}
        finite = {step: loss for step, loss in known.items() if math.isfinite(loss)}
        return min(finite, key=lambda step: (finite[step], step), default=None)

    def improved_at(self, step: int) -> bool:
        """Whether the weights after `step`, of those trained in this run, are the best so far."""
        return step == self.best({known for known in self.losses if known > 0})

    def reason_to_stop(self, patience: int | None) -> str | None:
        """Why the run ends, where as many evaluations as `patience` have come since the best; else None."""
        best = self.best()
        since = sum(1 for step in self.losses if best is None or step > best)
        if patience is None or since < patience:
            return None
        lowest = "no finite one before" if best is None else f"the lowest is {self.losses[best]:.4f} at step {best}"
        return f"no better eval_loss in {since} evaluation{'s' if since > 1 else ''} ({lowest})"
