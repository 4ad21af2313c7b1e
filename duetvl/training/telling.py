"""What is said and written of a run's steps and evaluations, and of the records that gave no sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duetvl.data.loading.loader import Step
from duetvl.training.state import RunState
from duetvl.training.step import Evaluation, StepResult
from duetvl.training.watching.callbacks import Callbacks
from duetvl.training.watching.metrics import RESERVED, check_own
from duetvl.training.watching.watch import Quiet

Row = Mapping[str, Any]


class Telling:
    """Makes the rows of metrics, and gives them to this rank's watch and to the callbacks."""

    def __init__(self, state: RunState, watch: Quiet, callbacks: Callbacks, total: int):
        """Of a run of `total` steps."""
        self.state, self.watch, self.callbacks, self.total = state, watch, callbacks, total
        self._reserved = set(RESERVED)

    def step(self, work: Step, result: StepResult | None, lr: float, costs: Row) -> None:
        """A step that has been made; `result` is None where nothing in it was trained."""
        step, totals = self.state.step, self.state.totals
        if result is None:
            names = ", ".join(work.sample_ids)
            self.watch.say(f"warning: step {step} has no trained token and is skipped; samples: {names}")
        elif result.skipped is not None:
            totals["skipped"] += 1
            so_far = f"{totals['skipped']:.0f} so far"
            self.watch.say(f"warning: step {step} makes no update ({so_far}): {result.skipped}")
        self.left_out()
        totals["tokens"] += work.tokens
        totals["trained_tokens"] += work.trained_tokens
        totals["seconds"] += costs["step_s"]
        row = {
            "step": step,
            "loss": result.loss if result else None,
            "grad_norm": result.grad_norm if result else None,
            "lr": lr,
            **(result.values if result else {}),
            **costs,
            **{f"data_{kind}": number for kind, number in work.counts.items()},
            "total_tokens": totals["tokens"],
            "total_skipped": totals["skipped"],
        }
        self._write(row)
        self.watch.show(row)
        self.callbacks.call("on_step", row)

    def evaluation(self, found: Evaluation) -> None:
        """An evaluation after the last step."""
        step = self.state.step
        if not found.weight:
            self.watch.say(f"warning: step {step} has no eval_loss: no token of the validation data is trained")
            return
        values = {f"eval_{name}": value for name, value in found.values.items()}
        row = {"step": step, "eval_loss": found.loss, "eval_tokens": found.tokens, **values}
        self._write(row)
        over = f"over {found.weight:.0f} {self.state.job.objective.unit}"
        self.watch.say(f"step {step}/{self.total}  eval_loss {found.loss:.4f}  {over}")
        self.callbacks.call("on_eval", row)

    def left_out(self) -> None:
        """What has been found in the data since the last time."""
        for line in self.state.feed.news():
            self.watch.say(f"warning: {line}")

    def summary(self) -> None:
        """Of the whole run."""
        totals = self.state.totals
        if seconds := totals["seconds"]:
            tokens = totals["tokens"]
            self.watch.say(f"{tokens:.0f} tokens in {seconds:.0f} s of steps: {tokens / seconds:.0f} tokens/s")
        if summary := self.state.feed.summary():
            self.watch.say(summary)

    def log(self, row: Row) -> None:
        """Numbers of a callback, whose names must not be those of rows of ours."""
        check_own(row, self._reserved)
        self.watch.write({"step": self.state.step, **row})

    def _write(self, row: Row) -> None:
        self._reserved |= row.keys()
        self.watch.write(row)
