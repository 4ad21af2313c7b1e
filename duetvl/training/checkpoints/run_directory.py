"""Where a run is kept, and where a new start of it goes on. Nothing that exists is overwritten without a word.

A run directory holds resolved_recipe.yaml, checkpoints/, metrics.jsonl, and as the recipe says tensorboard/, loss.png,
export/ and more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.storage.files import remove_temporaries, write_text
from duetvl.storage.finding import (
    CheckpointRef,
    Verify,
    checkpoints_dir,
    find_checkpoint,
    has_checkpoint,
    is_checkpoint,
    parse_run,
    verify_files,
)
from duetvl.storage.locks import file_lock, made_directory
from duetvl.training.checkpoints.differences import differences, same_validation
from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.yaml_values import read_yaml, write_yaml

RECIPE = "resolved_recipe.yaml"
TRACKERS = "trackers.json"
UNSAVED = ".unsaved"  # is there until the first checkpoint is
EVALS = "evals"  # answers to `eval.tasks`
RESULTS = ("metrics.jsonl", "samples.jsonl", EVALS, "export", "loss.png")
# What a restart sets aside. Checkpoints first: what is left after a kill in between is not taken for a run to resume.
_OURS = ("checkpoints", *RESULTS, "train.log", "tensorboard", "profile", TRACKERS, RECIPE, UNSAVED)
ExportKind = Literal["model", "adapter", "mindspeed_mm"]
# By which of its files an export is known.
_KINDS: Mapping[str, ExportKind] = {
    "latest_checkpointed_iteration.txt": "mindspeed_mm",
    "adapter_config.json": "adapter",
    "config.json": "model",
}
_ADVICE = "give a new directory (train.output_dir=...), or set all that aside and start over with --restart"


@dataclass(frozen=True)
class Start:
    """Where a run starts: from `checkpoint`, or from the model's own weights where it is None.

    `history` is another run's directory whose metrics this one continues. With `anew` what the directory holds is
    set aside first. `notes` are to be told the user.
    """

    run_dir: Path
    checkpoint: CheckpointRef | None = None
    history: Path | None = None
    anew: bool = False
    notes: tuple[str, ...] = ()


def find_start(recipe: Recipe, resume: str | None = None, verify: Verify = verify_files) -> Start:
    """Decide where to start.

    resume None: go on from the newest checkpoint of `train.output_dir` where it has one, else start at the
    beginning. "": the same, but a checkpoint must be there. "DIR" or "DIR@STEP": go on from a checkpoint of that
    run, in this recipe's own directory; "@STEP": from that step of its own run. STEP may be "best". A checkpoint's own
    directory will do.
    `verify` reads the files of a checkpoint (see `find_checkpoint`).
    To decide for a run that is then started, hold `locked`. Raises ConfigError where the recipe is not the one that
    the checkpoint was trained with and where results without a checkpoint would be overwritten, CheckpointError where
    there is no checkpoint.
    """
    own = Path(recipe.train.output_dir)
    if resume is None and not has_checkpoint(own):
        return Start(own, notes=_check_free(own, recipe))
    source, step = parse_run(resume or "", own)
    home = source.resolve().parent.parent if is_checkpoint(source) else source.resolve()
    other = home != own.resolve()
    if other and has_checkpoint(own):
        raise ConfigError(
            f"train.output_dir {own} has checkpoints of its own; leave --resume {source} out to go on from these, or "
            f"give a new directory: train.output_dir=..."
        )
    ref = find_checkpoint(source, step, pass_over=True, verify=verify)
    harmless, grave = differences(recipe, ref.meta.recipe)
    if grave:
        stays = f" ({', '.join(harmless)} may stay)" if harmless else ""
        raise ConfigError(
            f"{ref.path} was trained with another recipe: {', '.join(grave)}; restore "
            f"{'this' if len(grave) == 1 else 'these'} to resume it{stays}, or {from_these_weights(ref, recipe)}"
        )
    if other:
        _check_free(own, recipe)
    notes = [f"damaged, skipped: {text}" for text in ref.rejected]
    notes.append(f"resuming {ref.path} (step {ref.step})")
    if harmless:
        notes.append(f"changed since then: {', '.join(harmless)}")
    if not same_validation(recipe, ref.meta.recipe) and (recipe.train.patience or recipe.checkpoint.keep_best):
        notes.append("the validation data are others now: for patience and keep_best no eval_loss of before counts")
    return Start(own, ref, _run_of(ref) if other else None, notes=tuple(notes))


def check_resumable(start: Start, recipe: Recipe, total: int) -> None:
    """Raise CheckpointError where a run of `total` steps would be resumed from weights alone."""
    ref = start.checkpoint
    if ref is None or not ref.weights_only or ref.step >= total:
        return
    raise CheckpointError(
        f"{ref.path}: has weights alone (checkpoint.save_only_model), and resuming needs AdamW's moments and master "
        f"weights as well; {from_these_weights(ref, recipe)}"
    )


def start_anew(recipe: Recipe) -> Start:
    """Start at the beginning, and set aside what the directory holds.

    ConfigError where a part of that is what the recipe starts from.
    """
    own = Path(recipe.train.output_dir)
    adapter, reference = recipe.lora and recipe.lora.adapter, recipe.dpo and recipe.dpo.reference
    for name, path in (("model.path", recipe.model.path), ("lora.adapter", adapter), ("dpo.reference", reference)):
        if path and any(Path(path).resolve().is_relative_to((own / moved).resolve()) for moved in _OURS):
            raise ConfigError(f"{name} {path} is part of what --restart sets aside; give a new train.output_dir")
    return Start(own, anew=True)


@contextmanager
def locked(run_dir: Path) -> Iterator[tuple[str, ...]]:
    """Create the run directory, and keep every other process from training in it meanwhile. Gives notes for the user.

    A directory that is still empty at the end is removed again.
    """
    with ExitStack() as held:
        try:
            held.enter_context(made_directory(run_dir))
            works = held.enter_context(file_lock(run_dir / ".lock"))
            remove_temporaries(run_dir)
        except BlockingIOError:
            raise ConfigError(
                f"train.output_dir {run_dir}: another process is training there; wait, or choose another directory"
            ) from None
        except OSError as error:
            raise ConfigError(f"train.output_dir {run_dir}: cannot be written: {error.strerror or error}") from None
        yield () if works else (f"warning: {run_dir}: its file system has no locks; start no other run there",)


def begin(start: Start, recipe: Recipe) -> tuple[str, ...]:
    """Write what says how far the run is: its recipe with all defaults spelled out, and whether it has saved yet.

    Gives notes for the user; hold `locked`.
    """
    notes = _set_aside(start.run_dir) if start.anew else ()
    folder = checkpoints_dir(start.run_dir)
    try:
        folder.mkdir(exist_ok=True)  # a file, or a link to a disk that is not mounted, would be found at the first save
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from None
    if start.checkpoint is None:
        (start.run_dir / TRACKERS).unlink(missing_ok=True)  # of a run that ended unsaved: its curves are not these
    saved = start.checkpoint is not None and start.history is None
    note_saved(start.run_dir) if saved else write_text(start.run_dir / UNSAVED, "")
    target, values = start.run_dir / RECIPE, recipe.model_dump(mode="json")
    if not _is_there(target, values):
        write_text(target, write_yaml(values))
    return notes


def note_saved(run_dir: Path) -> None:
    """The run has a checkpoint: should that be removed, its results are not those of a run that may be started over."""
    (run_dir / UNSAVED).unlink(missing_ok=True)


def _set_aside(run_dir: Path) -> tuple[str, ...]:
    """Move what a run has left in a directory to a new one inside of it, and say so."""
    held = [name for name in _OURS if os.path.lexists(run_dir / name)]
    if not held:
        return ()
    place = _unused(run_dir / "before-restart")
    place.mkdir()
    for name in held:
        if (run_dir / name).is_symlink():  # a relative one would lead elsewhere from there
            (place / name).symlink_to((run_dir / name).resolve())
            (run_dir / name).unlink()
        else:
            os.rename(run_dir / name, place / name)
    return (f"starting over; what {run_dir} held is in {place}",)


def export_kind(directory: Path) -> ExportKind | None:
    """What an `export/` holds: "model", "adapter", "mindspeed_mm"; None where it holds none of them."""
    return next((kind for name, kind in _KINDS.items() if (directory / name).is_file()), None)


def wanted_kind(recipe: Recipe) -> ExportKind:
    """What a recipe's run exports, as `export_kind` says it."""
    if recipe.checkpoint.export == "mindspeed_mm":
        return "mindspeed_mm"
    return "adapter" if recipe.lora is not None and recipe.checkpoint.export != "merged" else "model"


def set_other_kind_aside(export: Path, kind: str) -> tuple[str, ...]:
    """Move an `export/` of another kind away: a model, an adapter and a release in one place would be read as one."""
    if export_kind(export) in (None, kind):
        return ()
    place = _unused(export.with_name("export-before"))
    os.rename(export, place)
    return (f"{export} held another kind of export: it is {place} now",)


def _unused(path: Path) -> Path:
    """The first of PATH-1, PATH-2, ... that is not there."""
    return next(one for i in count(1) if not os.path.lexists(one := path.with_name(f"{path.name}-{i}")))


def from_these_weights(ref: CheckpointRef, recipe: Recipe) -> str:
    """How to start a run of its own from a checkpoint's weights, as the end of a sentence: what the command needs."""
    step = f"{_run_of(ref)}@{ref.step}"
    words = [f"model.path={step}", f"train.output_dir={_unused(Path(recipe.train.output_dir))}"]
    if recipe.dpo is not None and recipe.dpo.reference is None:  # else it would be compared with what it starts from
        words.insert(1, f"dpo.reference={recipe.model.path}")
    if recipe.lora is not None and recipe.lora.adapter is not None:  # which is in these weights
        words.insert(1, "lora.adapter=null")
    merged = " (its adapter merged)" if ref.meta.recipe.get("lora") else ""
    return f"start a new run from these weights{merged}: add {' '.join(words)} to the command, without --resume"


def _run_of(ref: CheckpointRef) -> Path:
    return ref.path.parent.parent


def _check_free(run_dir: Path, recipe: Recipe) -> tuple[str, ...]:
    """Whether a run may begin in a directory without checkpoints: ConfigError where something would be lost.

    A run that was killed before its first checkpoint is started over, if by the same recipe.
    """
    unsaved = (run_dir / UNSAVED).exists()
    kept = unsaved or _is_there(run_dir / RECIPE, recipe.model_dump(mode="json"))  # stays as it is
    found = [name for name in (*RESULTS, *(() if kept else (RECIPE,))) if _holds_something(run_dir / name)]
    if not found:
        return ()
    if not unsaved:
        raise ConfigError(
            f"train.output_dir {run_dir}: holds {', '.join(found)} and no checkpoint to go on from; {_ADVICE}"
        )
    stored = read_yaml(run_dir / RECIPE)
    _, grave = differences(recipe, stored if isinstance(stored, Mapping) else {})
    if grave:
        raise ConfigError(
            f"train.output_dir {run_dir}: holds a run by another recipe ({', '.join(grave)}) that ended before its "
            f"first checkpoint; {_ADVICE}"
        )
    return (f"{run_dir} holds a run that has saved no checkpoint: starting it over from step 0",)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path) and path.stat().st_size > 0


def _is_there(file: Path, values: Any) -> bool:
    """Whether a YAML file has these values: then it stays as it is, with the comments that somebody put in."""
    try:
        return bool(read_yaml(file) == values)
    except ConfigError:
        return False
