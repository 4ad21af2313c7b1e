"""The training loop: steps, evaluations, checkpoints, and what is logged of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from duetvl.core.backend import Backend
from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.loading.loader import Step
from duetvl.data.loading.peers import Peers
from duetvl.storage.finding import saved_steps
from duetvl.training.checkpoints.checkpoint import go_on_from
from duetvl.training.checkpoints.run_directory import (
    Start,
    begin,
    check_resumable,
    note_saved,
)
from duetvl.training.checkpoints.saving import Saver
from duetvl.training.checkpoints.writing import note_best, remove_leftovers
from duetvl.training.ending import Export, TrainResult, last_losses
from duetvl.training.evaluations import Evaluations
from duetvl.training.failures import ending_alone
from duetvl.training.feed import DataSets
from duetvl.training.introduction import introduction
from duetvl.training.job import Job
from duetvl.training.recipe.sections import Recipe
from duetvl.training.room import memory_estimate, room_warnings
from duetvl.training.schedule import learning_rate, stretched, total_steps
from duetvl.training.signals import StopSignals
from duetvl.training.state import RunState, feed_from
from duetvl.training.step import Outlook, StepGivenUp, Trainer
from duetvl.training.telling import Telling
from duetvl.training.watching.callbacks import Callback, Callbacks, told
from duetvl.training.watching.costs import Meter
from duetvl.training.watching.forecast import Forecast
from duetvl.training.watching.trace import Trace
from duetvl.training.watching.watch import watched


@dataclass(frozen=True)
class _Ahead:
    """Before a step: its work, None where this rank is to stop; what all ranks know of it; the seconds that this rank
    has waited for its data, and those that all of this took."""

    work: Step | None
    outlook: Outlook
    waited: float
    seconds: float


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
        self.recipe, self.job, self.backend = recipe, job, backend
        self.callbacks = Callbacks(callbacks, self)
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
            division=job.division,
        )
        self.ranks = self.trainer.ranks
        self.meter = Meter(recipe, backend, job.flops)
        self.ranks.together(lambda: check_resumable(start, recipe, self.total))
        engine = backend.collectives
        peers = Peers.meet(recipe.parallel.mesh, engine.rank, engine.meeting_host(), self.ranks.each)
        self.feed = self.ranks.together(lambda: feed_from(start.checkpoint, recipe, job, sets, peers))
        self.state = RunState(recipe, job, self.trainer, self.feed, backend)
        self.forecast = Forecast(job.seconds, self.feed.first_drafts)
        if job.before is not None:
            job.before(self.feed)
        self.notes = start.notes
        if start.checkpoint is not None:
            self.ranks.together(partial(self.state.restore, start.checkpoint))
            rate = stretched(recipe, start.checkpoint.meta.recipe, sets.per_epoch, self.step)
            self.notes += (rate,) if rate and self.step < self.total else ()
        self.first_step = self.step
        self.saved: Path | None = start.checkpoint.path if start.checkpoint and not start.history else None
        self.saved_step = self.step if self.saved else -1
        self.stop_reason: str | None = None
        self.caught: signal.Signals | None = None  # once the steps are over, the signal that any rank has had
        self.trace = Trace(recipe.log.profile, backend.device, self.run_dir / "profile", self.say)
        self.export = Export(recipe, self.run_dir / "export", job.export)
        self.complete = False

    def run(self) -> TrainResult:
        """Train to the end, or until a signal or a callback asks to stop."""
        steps = max(self.total - self.step, 0)  # a recipe may ask for fewer than are done
        with ExitStack() as feeding:
            self.ranks.together(lambda: feeding.enter_context(self.feed.started(steps)))
            estimate = memory_estimate(self.state, self.ranks) if steps > 0 else None
            warnings = room_warnings(self.state, self.ranks, steps, estimate)
            notes = self.ranks.first(self._begin)
            with self._watched(), self.signals, self.trace:
                for line in (*introduction(self.state, self.total, estimate), *notes, *self.notes, *warnings):
                    self.say(line)
                with (
                    self.callbacks.started(),
                    self.saver,
                    self._kept(),
                    ending_alone(self.ranks, self.run_dir, lambda: self.step + 1),
                ):
                    self._steps()
                    self._finish()
                    result = self.ranks.first(self._result)
                    if self.complete and self.ranks.writes and self._export_due():
                        self._export()  # the last of all: the others do not wait for it, however long it takes
        return result

    def _begin(self) -> tuple[str, ...]:
        """Make the directory that of this start. Gives notes for the user."""
        remove_leftovers(self.run_dir)
        notes = begin(self.start, self.recipe)
        if self.start.checkpoint is not None:
            go_on_from(self.start.checkpoint, self.run_dir)
        return notes

    # -- what is open while it runs, closed however it ends ----------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The watch, the signals and the saver."""
        section = self.recipe.checkpoint
        with watched(self.recipe, self.run_dir, self.ranks, done=self.step, total=self.total, start=self.start) as (
            self.watch,
            losses,
        ):
            self.evaluations = Evaluations(losses, self.state.evaluated_since)
            self.telling = Telling(self.state, self.watch, self.callbacks, self.total)
            self.signals = StopSignals(self._announce_stop, section.grace)
            if self.ranks.count == 1:  # many agree on it at the edge of a step
                self.trainer.give_up = self.signals.pressing
            self.saver = Saver(
                self.run_dir,
                ranks=self.ranks,
                on_saved=self._saved,
                warn=self.watch.warn,
                background=section.background,
                keep_last=section.keep_last,
            )
            yield

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """What ends the run before its time does not cost the steps since the last checkpoint."""
        try:
            yield
        except Exception as error:
            self._rescue(error)
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            if self.signals.caught is None:  # not by a second signal, which wants the end at once
                self._rescue(error)
            raise

    def _rescue(self, error: BaseException) -> None:
        """Save what there is while an error is on its way out, unless it is that this cannot be written."""
        with told(error, "the checkpoint in the background", self.say):
            self.saver.wait()
        known = self.ranks.agree(self.step <= max(self.first_step, self.saved_step))
        if known or isinstance(error, CheckpointError):
            return
        with told(error, f"step {self.step} could not be saved", self.say):
            if self.trainer.is_sound():
                self.saver.save_last(self.state.snapshot, rotate=False)
            else:
                self.say(f"step {self.step} is not saved: its weights are not finite, or an update was under way")

    # -- steps -------------------------------------------------------------------------------------------------------

    def _steps(self) -> None:
        if self.step >= self.total:
            more = f"; it is at step {self.step}" if self.step > self.total else ""
            self.say(f"{self.run_dir}: all {self.total} steps are done already{more}")
        section = self.recipe.checkpoint
        self._last_save = self.step, time.monotonic()
        if self.step < self.total and self.evaluations.owed(self.step, self.recipe.train):
            self._evaluate()
        self._note_best()  # it may have been killed between a checkpoint and its note
        self._stop_early()  # a run that ended so before, unless it may go on for longer now
        while self.step < self.total:
            ahead = self._look_ahead()
            if ahead.outlook.late:
                self._save()
            if ahead.work is None or ahead.outlook.stops:
                return
            try:
                self._one_step(ahead.work, ahead)
            except StepGivenUp:
                self.say(f"step {self.step + 1} is abandoned to save in time; it will be repeated")
                return
            self.saver.poll()
            evaluate, save = self._due(self.recipe.train.eval_every), self._due(section.every)
            if evaluate:
                self._evaluate()
                self._stop_early()
                save = save or (section.keep_best is not None and self.evaluations.improved_at(self.step))
            if save:
                self._save()
            elif evaluate:
                self.watch.plot()

    def _look_ahead(self) -> _Ahead:
        """The next step's work, unless this rank is to stop, and what all ranks know before it."""
        begun = time.perf_counter()
        own = Outlook(stops=self._to_stop(), late=self._late())
        work = None
        if not own.stops:
            self.trace.before(self.step + 1)
            with self.ranks.telling(DataError):  # what ends the run for all, also for one that wishes to stop
                work = self.feed.next_step()
        waited = time.perf_counter() - begun
        outlook = self.trainer.outlook(work, own)
        return _Ahead(work, outlook, waited, time.perf_counter() - begun)

    def _save(self) -> None:
        self.saver.save(self.state.snapshot)
        self._last_save = self.step, time.monotonic()
        self.watch.plot()

    def _to_stop(self) -> bool:
        return self.stop_reason is not None or self.signals.caught is not None

    def _one_step(self, work: Step, ahead: _Ahead) -> None:
        begun = time.perf_counter() - ahead.seconds
        lr = learning_rate(self.step, self.total, self.recipe.optim)
        result = self.trainer.step(work, lr, self.step, ahead.outlook)
        seconds = time.perf_counter() - begun
        self.state.step += 1
        self.feed.done(work)
        self.trace.after(self.step)
        costs = self.meter.row(work, seconds, ahead.waited, result.peak_memory if result else 0)
        self.telling.step(work, result, lr, costs)
        if self.ranks.writes and (line := self.forecast.after(self.step, costs)):
            self.say(line)

    def _finish(self) -> None:
        """The last evaluation, checkpoint and plot; after a signal the checkpoint alone."""
        self._agree_on_end()
        if self.caught is None:
            self.callbacks.call("on_finish")
            if self.evaluations.last_step != self.step:  # it may have been killed just before
                self._evaluate()
        self.saver.wait()
        if self.saved_step != self.step:
            self.saver.save_last(self.state.snapshot)
        self._note_best()
        self._agree_on_end()
        if self.caught is not None and self._unfinished():
            self.say(f"stopped at step {self.step} of {self.total}; start again to resume from {self.saved}")
            return
        if self.stop_reason is not None:
            self.say(f"stopped at step {self.step} of {self.total}: {self.stop_reason}")
        self.telling.summary()
        self.watch.plot()
        self.complete = True

    def _agree_on_end(self) -> None:
        """What any rank knows of why the steps are over, all know."""
        causes = self.ranks.each((self.signals.caught, self.stop_reason))
        self.caught = next((caught for caught, _ in causes if caught is not None), None)
        self.stop_reason = next((reason for _, reason in causes if reason is not None), None)

    def _export_due(self) -> bool:
        return self.export.is_due(None if self.step > self.first_step else self.start.checkpoint)

    def _export(self) -> None:
        assert self.saved is not None, "the last step is saved"
        for note in self.export.make(self.saved):
            self.say(note)

    def _unfinished(self) -> bool:
        """Whether a signal has kept the run from something."""
        ended = self.step >= self.total or self.stop_reason is not None
        evaluated = not self.feed.has_val or self.evaluations.last_step == self.step
        return not ended or not evaluated or self.ranks.first(self._export_due)

    # -- what callbacks use ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def model(self) -> Any:
        """The model in training."""
        return self.job.model

    @property
    def stopping(self) -> bool:
        """Whether a signal asks any rank to stop."""
        return self.ranks.any(self.signals.caught is not None)

    def say(self, text: str) -> None:
        """Show a line on the terminal."""
        self.watch.say(text)

    def log(self, row: Mapping[str, Any]) -> None:
        """Add numbers to metrics.jsonl and every tracker."""
        self.telling.log(row)

    def log_answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add texts to samples.jsonl and every tracker."""
        self.watch.write_answers(self.step, rows)

    def validation_samples(self, count: int) -> list[Sample | Pair]:
        """The first `count` samples of the validation data, read by rank 0."""
        return self.ranks.first(lambda: self.feed.val_samples(count))

    def stop(self, reason: str) -> None:
        """End the run after this step as if it were the last one."""
        self.stop_reason = reason

    # -- parts ------------------------------------------------------------------------------------------------------

    def _announce_stop(self, signal_name: str) -> None:
        self.say(f"{signal_name}: finishing this step, then saving; a second signal stops at once")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _late(self) -> bool:
        """Whether it is time to save, by this rank's clock."""
        minutes, (step, then) = self.recipe.checkpoint.minutes, self._last_save
        return minutes is not None and self.step > step and time.monotonic() - then >= 60 * minutes

    def _evaluate(self) -> None:
        if not self.feed.has_val:
            return
        with self.ranks.telling(DataError):
            groups = takewhile(lambda _: not self.stopping, self.feed.val_batches())
            evaluation = self.trainer.evaluate_groups(groups)
        self.telling.left_out()
        if self.stopping:
            self.say(f"the evaluation after step {self.step} is given up")
            return
        self.state.evaluated_since = min(self.state.evaluated_since, self.step - 1)
        self.evaluations.add(self.step, evaluation.loss if evaluation.weight else None)
        self.telling.evaluation(evaluation)

    def _stop_early(self) -> None:
        """End the run before its last step where the validation loss has not become better for long enough."""
        if self.step < self.total and self.stop_reason is None:
            self.stop_reason = self.evaluations.reason_to_stop(self.recipe.train.patience)

    def _saved(self, path: Path, step: int) -> None:
        self.saved, self.saved_step = path, step
        if self.ranks.writes:
            note_saved(self.run_dir)
        self._note_best()
        self.say(f"saved {path}")
        self.callbacks.call("on_save", path)

    def _note_best(self) -> None:
        """Note which of the checkpoints that are there has the lowest eval_loss, where the recipe keeps it."""
        if not self.ranks.writes:
            return
        section, best = self.recipe.checkpoint, None
        if section.keep_best:
            best = self.evaluations.best(saved_steps(self.run_dir))
            if best is None and self.state.evaluated_since >= 0:
                return  # that of the validation data of before stays until there is one of these
        try:
            note_best(self.run_dir, best, section.keep_last)
        except OSError as error:
            self.watch.warn(f"warning: the best checkpoint cannot be noted: {error.strerror or error}")

    def _result(self) -> TrainResult:
        loss, eval_loss = last_losses(self.run_dir)
        stopped_by = None if self.caught is None or self.complete else int(self.caught)
        return TrainResult(self.run_dir, self.step, loss, eval_loss, self.saved, stopped_by, self.stop_reason)
