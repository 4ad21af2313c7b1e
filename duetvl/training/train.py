"""The entry point of training: from a recipe to a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import ConfigError
from duetvl.core.ranks import Ranks
from duetvl.storage.finding import found_by_all
from duetvl.training.agreement import check_model, check_one_disk, check_program, same_data
from duetvl.training.checkpoints.run_directory import find_start, locked, start_anew
from duetvl.training.dtype import on_device
from duetvl.training.ending import TrainResult
from duetvl.training.failures import ending_alone, leaving_together, set_failures_aside
from duetvl.training.job import Job
from duetvl.training.loop import Run
from duetvl.training.recipe.reading import for_world, load_recipe, make_recipe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.trackers import check_trackers


def train(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    resume: str | None = None,
    restart: bool = False,
    prepare: Callable[[Recipe, Backend], Job] | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Run a recipe: a file, a mapping of its sections, or a `Recipe`.

    `overrides` are texts `section.key=value`; `backend` replaces the recipe's backend. A run directory with checkpoints
    is resumed; `resume` is "DIR", "DIR@STEP" or "DIR@best" to resume from another run or checkpoint, and `restart` sets
    the directory's contents aside and starts at step 0. `prepare` builds the training job from a recipe in which
    `model.dtype` is resolved (never auto); by default supervised fine-tuning of the recipe's model. If it communicates
    with other ranks other than through `Ranks`, no rank may fail by itself before that. `callbacks` are called during
    the run. However the run ends, no file is left half-written.
    """
    given = read_recipe(recipe, overrides)
    if restart and resume is not None:
        raise ConfigError("--restart starts from step 0 and --resume from a checkpoint; give one of them")
    backend = backend or load_backend(given.backend.name, given.backend.device)
    backend.collectives.start()
    ranks = Ranks(backend.collectives)
    run_dir = Path(given.train.output_dir)
    with ending_alone(ranks, run_dir), leaving_together(ranks):
        check_program(ranks, given, backend)
        given = ranks.together(lambda: for_world(given, ranks.count))
        given = ranks.together(lambda: on_device(given, backend.device))
        ranks.first(lambda: check_trackers(given.log))
        with ExitStack() as held:  # before looking for checkpoints: while this loads, another may train and end
            notes = ranks.first(lambda: held.enter_context(locked(run_dir)))
            check_one_disk(ranks, run_dir)
            ranks.first(lambda: set_failures_aside(run_dir))
            if restart:
                start = ranks.first(lambda: start_anew(given))
            else:
                start = found_by_all(ranks, lambda verify: find_start(given, resume, verify))
            sets = same_data(ranks, given.data)
            job = _job(prepare, given, backend, ranks)
            return Run(given, job, backend, replace(start, notes=(*notes, *start.notes)), sets, callbacks).run()


def _job(prepare: Callable[[Recipe, Backend], Job] | None, recipe: Recipe, backend: Backend, ranks: Ranks) -> Job:
    """What is trained. The model is compared before any rank loads it, which may take minutes."""
    if prepare is None:
        check_model(ranks, recipe)
    return ranks.together(lambda: (prepare or _sft)(recipe, backend))


def _sft(recipe: Recipe, backend: Backend) -> Job:
    from duetvl.training.sft import prepare

    return prepare(recipe, backend)


def read_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from whatever `train` takes."""
    if isinstance(recipe, Recipe):
        return make_recipe(recipe.model_dump(mode="json"), overrides) if overrides else recipe
    return make_recipe(recipe, overrides) if isinstance(recipe, Mapping) else load_recipe(recipe, overrides)
