"""Callbacks: functions of the user that are called during a run, and may stop it.

class StopWhenGood(Callback):
    def on_eval(self, run, row):
        if row["eval_loss"] < 0.5:
            run.stop("good enough")

duetvl.train("recipe.yaml", callbacks=[StopWhenGood()])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from duetvl.core.backend import Backend
from duetvl.core.batch import Pair, Sample
from duetvl.training.recipe.sections import Recipe

Row = Mapping[str, Any]


class Running(Protocol):
    """The run as callbacks see it."""

    recipe: Recipe
    backend: Backend
    run_dir: Path
    total: int  # optimizer steps of the whole run

    @property
    def step(self) -> int:
        """Number of completed optimizer steps."""
        ...

    @property
    def model(self) -> Any:
        """The model in training. Its tensors must not be modified."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether a signal asks any rank to stop: abort long work, so that the run can save.

        Every rank must read it together.
        """
        ...

    def say(self, text: str) -> None:
        """Print a line."""
        ...

    def log(self, row: Row) -> None:
        """Add numbers to metrics.jsonl and every tracker; `step` is added."""
        ...

    def log_answers(self, rows: Sequence[Row]) -> None:
        """Add texts (`sample`, `prompt`, `answer`, `expected`) to samples.jsonl and every tracker."""
        ...

    def validation_samples(self, count: int) -> list[Sample | Pair]:
        """The first `count` samples of the validation data, [] without such data. Every rank must call it."""
        ...

    def stop(self, reason: str) -> None:
        """End the run after this step as after the last one: evaluate, save, export."""
        ...


class Callback:
    """Base class with empty methods; override what you need. They are called by the training thread between two steps.

    Every rank of a run calls them in the same order, so that a model divided over ranks can be used in them. Only rank
    0's output and logging count. An exception ends the run: one process saves the completed steps first; many ranks
    resume from their last checkpoint. No file is left half-written.
    """

    def on_start(self, run: Running) -> None:
        """Before the first step of this start; `run.step` is not 0 if it resumes from a checkpoint."""

    def on_step(self, run: Running, row: Row) -> None:
        """After a step; `row` is its row in metrics.jsonl."""

    def on_eval(self, run: Running, row: Row) -> None:
        """After an evaluation; `row` has `eval_loss` and `eval_tokens`."""

    def on_save(self, run: Running, path: Path) -> None:
        """A checkpoint is on disk; in the background, some steps after it was taken."""

    def on_finish(self, run: Running) -> None:
        """The steps are over, and the last evaluation and checkpoint come next. Not where a signal ends them."""

    def on_end(self, run: Running, error: BaseException | None) -> None:
        """Once, however the run ended: `error` is None where it ended well, which a polite stop is."""


class Callbacks:
    """All callbacks of a run."""

    def __init__(self, each: Sequence[Callback], run: Running):
        """None is called yet."""
        self.each, self.run = each, run

    def call(self, event: str, *args: Any) -> None:
        """Call `event`, such as "on_step", of each."""
        for callback in self.each:
            getattr(callback, event)(self.run, *args)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Start them; at the end each that was started is ended."""
        with ExitStack() as ends:
            for callback in self.each:
                callback.on_start(self.run)
                ends.push(self._ending(callback))
            yield

    def _ending(self, callback: Callback) -> Callable[..., None]:
        """What a `with` calls at its end. An error of `on_end` does not hide the one that the run ends with."""

        def end(kind: Any, error: BaseException | None, trace: Any) -> None:
            with told(error, f"on_end of {type(callback).__name__}", self.run.say):
                callback.on_end(self.run, error)

        return end


@contextmanager
def told(error: BaseException | None, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """While an `error` is on its way out, another one is said and not raised: it would hide the first."""
    try:
        yield
    except Exception as second:
        if error is None:
            raise
        say(f"warning: {what}: {type(second).__name__}: {second}")
