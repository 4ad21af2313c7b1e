"""The training loop: steps, evaluations, checkpoints, and what is told of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from duetvl.core.backend import Backend, load_backend
from duetvl.core.checkpoint_format import Meta
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.loader import Batcher, Encode, Step, StepLoader, passes
from duetvl.data.packing import Order, Position
from duetvl.data.records import Records
from duetvl.training.checkpoint import CheckpointRef, load_checkpoint, save_checkpoint
from duetvl.training.metrics import MetricsLog, Progress, plot_runs, read_metrics
from duetvl.training.objective import Objective
from duetvl.training.recipe import check_world, load_recipe, make_recipe
from duetvl.training.run_directory import Start, find_start, locked, write_recipe
from duetvl.training.schedule import learning_rate
from duetvl.training.sections import Recipe
from duetvl.training.signals import StopSignals
from duetvl.training.step import TrainableModel, Trainer


@dataclass(frozen=True)
class Job:
    """What is trained: a model, to which end, how a record becomes a sample of it, how it is written for others."""

    model: TrainableModel
    objective: Objective
    encode: Encode
    export: Callable[[Path], None]
    model_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. Losses are means over tokens: of the last step, and of the last evaluation."""

    run_dir: Path
    step: int
    loss: float | None
    eval_loss: float | None
    checkpoint: Path | None
    stopped_by: int | None = None  # the number of the signal that ended it before its time


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    resume: str | None = None,
    prepare: Callable[[Recipe, Backend], Job] | None = None,
) -> TrainResult:
    """Run a recipe: a file, a mapping of its sections, or a `Recipe`.

    `overrides` are texts `section.key=value`; `backend` replaces the one that the recipe names. A run directory with
    checkpoints is resumed; `resume` is "DIR" or "DIR@STEP" to go on from another run or an earlier step.
    `prepare` builds what is trained; by default supervised fine-tuning of the recipe's model.
    """
    given = read_recipe(recipe, overrides)
    check_world(given, world_size())
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        # msrun runs the same program as its scheduler; one worker needs none, and two must not train in one place.
        raise SystemExit(0)
    start = find_start(given, resume)
    records = Records([source.path for source in given.data.train])
    val = Records([source.path for source in given.data.val]) if given.data.val else None
    backend = backend or load_backend(given.backend.name, given.backend.device)
    job = (prepare or _sft)(given, backend)
    return Run(given, job, backend, start, records, val).run()


def _sft(recipe: Recipe, backend: Backend) -> Job:
    from duetvl.training.sft import prepare

    return prepare(recipe, backend)


def read_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from whatever `train` takes."""
    if isinstance(recipe, Recipe):
        return make_recipe(recipe.model_dump(mode="json"), overrides) if overrides else recipe
    return make_recipe(recipe, overrides) if isinstance(recipe, Mapping) else load_recipe(recipe, overrides)


def world_size() -> int:
    """Processes that torchrun or msrun has started."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("MS_WORKER_NUM") or 1)


def total_steps(recipe: Recipe, records: int) -> int:
    """Optimizer steps of a whole run over so many records."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    epochs = 1.0 if recipe.train.epochs is None else recipe.train.epochs
    return math.ceil(epochs * records / recipe.train.global_batch)


class Run:
    """One start of a run, up to its end or a signal."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        backend: Backend,
        start: Start,
        records: Records,
        val: Records | None = None,
    ):
        """Put the parts together and go to the start; nothing is written yet."""
        self.recipe, self.job, self.backend = recipe, job, backend
        self.records, self.val = records, val
        self.run_dir = start.run_dir
        self.total = total_steps(recipe, len(records))
        self.trainer = Trainer(job.model, job.objective, backend, recipe.optim, seed=recipe.data.seed)
        self.step, self.position = 0, Position()
        if start.checkpoint is not None:
            self._restore(start.checkpoint)
        self.first_step = self.step
        self.saved: Path | None = start.checkpoint.path if start.checkpoint and not start.history else None
        self.saved_step = self.step if self.saved else -1
        self.start = start

    def run(self) -> TrainResult:
        """Train to the end, or until a signal asks to stop."""
        with self._loader() as loader, locked(self.run_dir):
            write_recipe(self.recipe, self.run_dir)
            log = self.recipe.log
            history = self.start.history
            self.log = MetricsLog(self.run_dir, after=self.step, history=history, tensorboard=log.tensorboard)
            self.progress = Progress(self.total, done=self.step, every=log.every)
            try:
                for note in self.start.notes:
                    self.progress.say(note)
                with StopSignals(self._announce_stop) as stop:
                    self._steps(loader, stop)
                    self._finish(stop)
            finally:
                self.progress.close()
                self.log.close()
        return self._result(stop)

    @contextmanager
    def _loader(self) -> Iterator[StepLoader]:
        """The steps from here on. The first is made before anything is written: most bad data shows there."""
        data = self.recipe.data
        order = Order(len(self.records), seed=data.seed, shuffle=data.shuffle)
        loader = StepLoader(self._batcher(self.records), order, self.recipe.train.global_batch, self.position)
        try:
            loader.wait()
            yield loader
        finally:
            loader.close()

    def _announce_stop(self, signal_name: str) -> None:
        self.progress.say(f"{signal_name}: finishing this step, then saving; once more stops at once")

    def _steps(self, loader: StepLoader, stop: StopSignals) -> None:
        if self.step >= self.total:
            self.progress.say(f"{self.run_dir}: all {self.total} steps are done already")
        while self.step < self.total and stop.caught is None:
            self._one_step(loader)
            evaluate, save = self._due(self.recipe.train.eval_every), self._due(self.recipe.checkpoint.every)
            if evaluate:
                self._evaluate()
            if save:
                self._save_and_go_on()
            if evaluate or save:
                self._plot()

    def _one_step(self, loader: StepLoader) -> None:
        begun = time.perf_counter()
        work = loader.next_step(last=self.step + 1 >= self.total)
        lr = learning_rate(self.step, self.total, self.recipe.optim)
        result = self.trainer.step(work, lr, self.step)
        self.backend.device.synchronize()
        self.step, self.position = self.step + 1, work.end
        if result is None:
            names = ", ".join(work.sample_ids)
            self.progress.say(f"warning: step {self.step} has no trained token and is skipped; samples: {names}")
        seconds = time.perf_counter() - begun
        row = {
            "step": self.step,
            "loss": result.loss if result else None,
            "grad_norm": result.grad_norm if result else None,
            "lr": lr,
            **(result.values if result else {}),
            **_costs(work, seconds, self.backend),
        }
        self.log.write(row)
        self.progress.step(row)

    def _finish(self, stop: StopSignals) -> None:
        """The last evaluation, checkpoint, plot and export; after a signal the checkpoint alone."""
        if stop.caught is None and self.step > self.first_step and not self._due(self.recipe.train.eval_every):
            self._evaluate()
        if self.saved_step != self.step:
            self._save()
        if stop.caught is not None:
            self.progress.say(f"stopped at step {self.step} of {self.total}; start again to go on from {self.saved}")
            return
        self._plot()
        target = self.run_dir / "export"
        if self.recipe.checkpoint.export and (self.step > self.first_step or not target.exists()):
            self.job.export(target)
            self.progress.say(f"exported {target}")

    # -- parts ------------------------------------------------------------------------------------------------------

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _batcher(self, records: Records) -> Batcher:
        data = self.recipe.data
        return Batcher(records, self.job.encode, self.job.model.pack, data.pack_tokens, data.longest)

    def _evaluate(self) -> None:
        if self.val is None:
            return
        found = self.trainer.evaluate(passes(self._batcher(self.val), self.recipe.train.global_batch))
        values = {f"eval_{name}": value for name, value in found.values.items()}
        self.log.write({"step": self.step, "eval_loss": found.loss, "eval_tokens": found.tokens, **values})
        self.progress.say(f"step {self.step}/{self.total}  eval_loss {found.loss:.4f}  over {found.tokens} tokens")

    def _save_and_go_on(self) -> None:
        """A checkpoint that cannot be written does not end a run that may yet write a later one."""
        try:
            self._save()
        except CheckpointError as error:
            self.progress.say(f"warning: {error}")

    def _save(self) -> None:
        self.saved = save_checkpoint(
            self.run_dir,
            step=self.step,
            parameters=self.job.model.parameters.values(),
            optimizer_state=self.trainer.state,
            meta=Meta(
                recipe=self.recipe.model_dump(mode="json"),
                model_config=self.job.model_config,
                data_position={**asdict(self.position), "records": len(self.records)},
                random_state={"seed": self.recipe.data.seed},
            ),
            backend=self.backend,
            keep_last=self.recipe.checkpoint.keep_last,
        )
        self.saved_step = self.step
        self.progress.say(f"saved {self.saved}")

    def _restore(self, ref: CheckpointRef) -> None:
        stored = dict(ref.meta.data_position)
        records = stored.pop("records")
        if records != len(self.records):
            files = ", ".join(source.path for source in self.recipe.data.train)
            raise DataError(
                f"{files}: has {len(self.records)} records, but {ref.path} was trained "
                f"with {records}; restore the data, or begin a new run: train.output_dir=..."
            )
        load_checkpoint(
            ref,
            parameters=self.job.model.parameters.values(),
            optimizer_state=self.trainer.state,
            backend=self.backend,
        )
        self.step, self.position = ref.step, Position(**stored)

    def _plot(self) -> None:
        if self.recipe.log.plot:
            plot_runs([self.run_dir], self.run_dir / "loss.png")

    def _result(self, stop: StopSignals) -> TrainResult:
        rows = read_metrics(self.run_dir)
        return TrainResult(
            run_dir=self.run_dir,
            step=self.step,
            loss=_last(rows, "loss"),
            eval_loss=_last(rows, "eval_loss"),
            checkpoint=self.saved,
            stopped_by=int(stop.caught) if stop.caught else None,
        )


def _costs(work: Step, seconds: float, backend: Backend) -> dict[str, Any]:
    return {
        "tokens": work.tokens,
        "trained_tokens": work.trained_tokens,
        "micro_batches": len(work.batches),
        "tokens_per_s": work.tokens / seconds,
        "step_s": seconds,
        "peak_memory": backend.device.peak_memory(),
    }


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)
