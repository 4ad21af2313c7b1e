"""The training loop: steps, evaluations, checkpoints, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from duetvl.core.backend import Backend
from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.loading.loader import Step
from duetvl.storage.checkpoint_format import Meta
from duetvl.storage.finding import CheckpointRef
from duetvl.training.checkpoints.checkpoint import (
    Snapshot,
    go_on_from,
    load_checkpoint,
    remove_leftovers,
    take_snapshot,
)
from duetvl.training.checkpoints.run_directory import Start, locked, write_recipe
from duetvl.training.checkpoints.saving import Saver
from duetvl.training.feed import DataSets, Feed
from duetvl.training.job import Job
from duetvl.training.recipe.sections import Recipe
from duetvl.training.schedule import learning_rate, total_steps
from duetvl.training.signals import StopSignals
from duetvl.training.step import StepGivenUp, StepResult, Trainer
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.costs import Meter
from duetvl.training.watching.metrics import MetricsLog, Progress, read_metrics
from duetvl.training.watching.plots import plot_runs
from duetvl.training.watching.trackers import open_trackers


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


class Run:
    """One start of a run, up to its end or a signal. Callbacks see it as `callbacks.Running`."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        backend: Backend,
        start: Start,
        sets: DataSets,
        callbacks: Sequence[Callback] = (),
    ):
        """Put the parts together and go to the start; nothing is written yet."""
        self.recipe, self.job, self.backend, self.callbacks = recipe, job, backend, callbacks
        self.start, self.run_dir = start, start.run_dir
        self.total = total_steps(recipe, sets.per_epoch)
        self.trainer = Trainer(
            job.model,
            job.objective,
            backend,
            recipe.optim,
            reference=job.compared_with,
            seed=recipe.data.seed,
            on_nonfinite=recipe.train.on_nonfinite,
        )
        self.meter = Meter(recipe, backend, job.flops)
        self.step = 0
        self.feed = self._fed(sets, start.checkpoint)
        self.totals: dict[str, float] = {"tokens": 0, "trained_tokens": 0, "seconds": 0.0, "skipped": 0}
        if job.before is not None:
            job.before(self.feed)
        if start.checkpoint is not None:
            self._restore(start.checkpoint)
        self.first_step = self.step
        self.saved: Path | None = start.checkpoint.path if start.checkpoint and not start.history else None
        self.saved_step = self.step if self.saved else -1
        self.stop_reason: str | None = None

    def _fed(self, sets: DataSets, ref: CheckpointRef | None) -> Feed:
        """The data from where the checkpoint left it."""
        try:
            return Feed(self.recipe, sets, self.job.encoder, None if ref is None else ref.meta.data_position)
        except DataError as error:
            files = ", ".join(source.path for source in self.recipe.data.train)
            hint = "restore the data, or begin a new run: train.output_dir=..."
            raise DataError(f"{files}: {error}, of {ref.path if ref else 'the start'}; {hint}") from None

    def run(self) -> TrainResult:
        """Train to the end, or until a signal or a callback asks to stop."""
        with self.feed.started(self.total - self.step), locked(self.run_dir):
            remove_leftovers(self.run_dir)
            write_recipe(self.recipe, self.run_dir)
            if self.start.checkpoint is not None:
                go_on_from(self.start.checkpoint, self.run_dir)
            with self._watched(), self.signals, self._profiled() as self._profile, self._called_back(), self.saver:
                for note in self.start.notes:
                    self.say(note)
                with self._kept():
                    self._steps()
                    self._finish()
        return self._result()

    # -- what is open while it runs, closed however it ends ----------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The terminal, the logs and the saver, which tells what it has done."""
        section = self.recipe.checkpoint
        with ExitStack() as open_things:
            self.progress = Progress(self.total, done=self.step, every=self.recipe.log.every)
            open_things.callback(self.progress.close)
            trackers = open_trackers(self.recipe, self.run_dir, self.step)
            self.log_file = MetricsLog(
                self.run_dir, after=self.step, history=self.start.history, trackers=trackers, say=self.say
            )
            open_things.callback(self.log_file.close)
            evaluations = [row["step"] for row in read_metrics(self.run_dir) if "eval_loss" in row]
            self.evaluated_step = max(evaluations, default=-1)
            self.signals = StopSignals(self._announce_stop, section.grace)
            self.trainer.give_up = self.signals.pressing
            self.saver = Saver(
                self.run_dir,
                on_saved=self._saved,
                warn=self.say,
                background=section.background,
                keep_last=section.keep_last,
            )
            yield

    @contextmanager
    def _called_back(self) -> Iterator[None]:
        with ExitStack() as ends:
            for callback in self.callbacks:
                callback.on_start(self)
                ends.push(_ending(callback, self))
            yield

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """A bad record that is met late, be it of the evaluation, does not cost the steps done before it."""
        try:
            yield
        except DataError:
            if self.step > max(self.first_step, self.saved_step):
                self.saver.save(self._snapshot)
            raise

    @contextmanager
    def _profiled(self) -> Iterator[ExitStack]:
        """Holds the trace that `log.profile` asks for, which a run may end in the middle of."""
        with ExitStack() as trace:
            yield trace

    # -- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        if self.step >= self.total:
            self.say(f"{self.run_dir}: all {self.total} steps are done already")
        while self.step < self.total and self.stop_reason is None and self.signals.caught is None:
            try:
                self._one_step()
            except StepGivenUp:
                self.say(f"step {self.step + 1} is given up to save in time; it will be made again")
                return
            self.saver.poll()
            evaluate, save = self._due(self.recipe.train.eval_every), self._due(self.recipe.checkpoint.every)
            if evaluate:
                self._evaluate()
            if save:
                self.saver.save(self._snapshot)
            if evaluate or save:
                self._plot()

    def _one_step(self) -> None:
        self._profile_from_here()
        begun = time.perf_counter()
        work = self.feed.next_step()
        waited = time.perf_counter() - begun
        lr = learning_rate(self.step, self.total, self.recipe.optim)
        result = self.trainer.step(work, lr, self.step)
        self.backend.device.synchronize()
        seconds = time.perf_counter() - begun
        self.step += 1
        self.feed.done(work)
        self._profile_up_to_here()
        if result is None:
            names = ", ".join(work.sample_ids)
            self.say(f"warning: step {self.step} has no trained token and is skipped; samples: {names}")
        elif result.skipped is not None:
            self.totals["skipped"] += 1
            self.say(
                f"warning: step {self.step} makes no update ({self.totals['skipped']:.0f} so far): {result.skipped}"
            )
        self._tell_left_out()
        self._tell_step(work, result, lr, self.meter.row(work, seconds, waited))

    def _tell_left_out(self) -> None:
        for line in self.feed.news():
            self.say(f"warning: {line}")

    def _tell_step(self, work: Step, result: StepResult | None, lr: float, costs: Mapping[str, Any]) -> None:
        self.totals["tokens"] += work.tokens
        self.totals["trained_tokens"] += work.trained_tokens
        self.totals["seconds"] += costs["step_s"]
        row = {
            "step": self.step,
            "loss": result.loss if result else None,
            "grad_norm": result.grad_norm if result else None,
            "lr": lr,
            **(result.values if result else {}),
            **costs,
            **{f"data_{kind}": number for kind, number in work.counts.items()},
            "total_tokens": self.totals["tokens"],
            "total_skipped": self.totals["skipped"],
        }
        self.log_file.write(row)
        self.progress.step(row)
        self._call("on_step", row)

    def _finish(self) -> None:
        """The last evaluation, checkpoint, plot and export; after a signal the checkpoint alone."""
        if self.signals.caught is None and self.evaluated_step != self.step:  # it may have been killed just before
            self._evaluate()
        self.saver.wait()
        if self.saved_step != self.step:
            self.saver.save_last(self._snapshot)
        if self.signals.caught is not None:
            self.say(f"stopped at step {self.step} of {self.total}; start again to go on from {self.saved}")
            return
        if self.stop_reason is not None:
            self.say(f"stopped at step {self.step} of {self.total}: {self.stop_reason}")
        summary = self.feed.summary()
        if summary:
            self.say(summary)
        self._plot()
        target = self.run_dir / "export"
        if self.recipe.checkpoint.export and (self.step > self.first_step or not target.exists()):
            self.job.export(target)
            self.say(f"exported {target}")

    # -- what callbacks use ------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model in training."""
        return self.job.model

    @property
    def stopping(self) -> bool:
        """Whether a signal asks to stop."""
        return self.signals.caught is not None

    def say(self, text: str) -> None:
        """Show a line to whoever watches."""
        self.progress.say(text)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add numbers to metrics.jsonl and every tracker."""
        self.log_file.write({"step": self.step, **row})

    def log_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add texts to samples.jsonl and every tracker."""
        self.log_file.write_answers(self.step, rows)

    def validation_samples(self, count: int) -> list[Sample | Pair]:
        """The first so many samples of the validation data."""
        return self.feed.val_samples(count)

    def stop(self, reason: str) -> None:
        """End the run after this step as if it were the last one."""
        self.stop_reason = reason

    # -- parts ------------------------------------------------------------------------------------------------------

    def _announce_stop(self, signal_name: str) -> None:
        self.say(f"{signal_name}: finishing this step, then saving; once more stops at once")

    def _call(self, event: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *args)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _evaluate(self) -> None:
        if not self.feed.has_val:
            return
        found = self.trainer.evaluate(takewhile(lambda _: self.signals.caught is None, self.feed.val_batches()))
        self._tell_left_out()
        if self.signals.caught is not None:
            self.say(f"the evaluation after step {self.step} is given up")
            return
        values = {f"eval_{name}": value for name, value in found.values.items()}
        row = {"step": self.step, "eval_loss": found.loss, "eval_tokens": found.tokens, **values}
        self.log_file.write(row)
        over = f"over {found.weight:.0f} {self.job.objective.unit}"
        self.say(f"step {self.step}/{self.total}  eval_loss {found.loss:.4f}  {over}")
        self.evaluated_step = self.step
        self._call("on_eval", row)

    def _snapshot(self, *, copy: bool) -> Snapshot:
        return take_snapshot(
            step=self.step,
            parameters=self.job.checkpointed(),
            optimizer_state=self.trainer.state,
            meta=Meta(
                recipe=self.recipe.model_dump(mode="json"),
                model_config=self.job.model_config,
                data_position=self.feed.position,
                random_state={"seed": self.recipe.data.seed, "step": self.step},
                extra={
                    "totals": dict(self.totals),
                    "trainer": self.trainer.to_json(),
                    "base_model": dict(self.job.base),
                    "reference": dict(self.job.reference),
                },
            ),
            backend=self.backend,
            copy=copy,
        )

    def _saved(self, path: Path, step: int) -> None:
        self.saved, self.saved_step = path, step
        self.say(f"saved {path}")
        self._call("on_save", path)

    def _restore(self, ref: CheckpointRef) -> None:
        _check_same(ref, "base_model", self.job.base, "its adapters belong to")
        _check_same(ref, "reference", self.job.reference, "its policy was compared with")
        load_checkpoint(
            ref,
            parameters=self.job.checkpointed(),
            optimizer_state=self.trainer.state,
            backend=self.backend,
        )
        self.step = ref.step
        self.totals |= ref.meta.extra.get("totals", {})
        self.trainer.restore(ref.meta.extra.get("trainer", {}))

    def _profile_from_here(self) -> None:
        if self.recipe.log.profile is not None and self.step + 1 == self.recipe.log.profile[0]:
            self._profile.enter_context(self.backend.device.profile(self.run_dir / "profile"))

    def _profile_up_to_here(self) -> None:
        if self.recipe.log.profile is not None and self.step == self.recipe.log.profile[1]:
            self._profile.close()
            self.say(f"the trace of steps {list(self.recipe.log.profile)} is in {self.run_dir / 'profile'}")

    def _plot(self) -> None:
        if self.recipe.log.plot:
            try:
                plot_runs([self.run_dir], self.run_dir / "loss.png")
            except OSError as error:
                self.say(f"warning: {self.run_dir / 'loss.png'} cannot be drawn: {error.strerror or error}")

    def _result(self) -> TrainResult:
        rows = read_metrics(self.run_dir)
        return TrainResult(
            run_dir=self.run_dir,
            step=self.step,
            loss=_last(rows, "loss"),
            eval_loss=_last(rows, "eval_loss"),
            checkpoint=self.saved,
            stopped_by=int(self.signals.caught) if self.signals.caught else None,
            stop_reason=self.stop_reason,
        )


def _ending(callback: Callback, run: Run) -> Callable[..., None]:
    """What a `with` calls at its end."""

    def end(kind: Any, error: BaseException | None, trace: Any) -> None:
        callback.on_end(run, error)

    return end


def _check_same(ref: CheckpointRef, key: str, found: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError unless weights that are not in the checkpoint are those that it was trained with."""
    stored = ref.meta.extra.get(key) or {}
    if stored and stored["fingerprint"] != found.get("fingerprint"):
        raise CheckpointError(
            f"{ref.path}: {what} other weights than those of {found.get('path')} now (fingerprint "
            f"{stored['fingerprint']}, found {found.get('fingerprint')}); restore {stored['path']}, or begin a new run"
        )


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
