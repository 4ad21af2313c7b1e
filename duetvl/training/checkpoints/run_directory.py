"""Where a run is kept, and where a new start of it goes on. Nothing that exists is overwritten without a word.

A run directory holds recipe.yaml, checkpoints/, metrics.jsonl, and as the recipe says tensorboard/, loss.png, export/.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.storage.files import write_text
from duetvl.storage.finding import CheckpointRef, find_checkpoint, has_checkpoint, parse_run
from duetvl.training.recipe.sections import DataSource, Recipe
from duetvl.training.recipe.yaml_values import write_yaml

# What may differ between a checkpoint and the recipe that goes on from it. The split into micro-batches changes no
# result beyond rounding; a new length changes the schedule from here on.
PACKING = frozenset({"data.pack", "data.pack_tokens", "data.pack_patches"})
HARMLESS = frozenset(
    {
        "train.steps",
        "train.epochs",
        "train.eval_every",
        "train.output_dir",
        "train.on_nonfinite",
        "optim.offload",
        "train.recompute",
        "data.val",
        "data.val_max_samples",
        *PACKING,
        "data.workers",
        "data.prefetch",
        "data.cache",
        "data.on_bad_sample",  # what a run that has met a bad record is resumed with
        "dpo.cache",
        # A run may be gone on with where things lie elsewhere. What they are is known by other means: the model by
        # the checkpoint's own weights or a fingerprint, the data by the number of their records.
        "model.path",
        "dpo.reference",
        "data.image_root",
    }
)
PLACES = frozenset({"path", "image_root"})  # of a data set
LENGTHS = frozenset({"data.cutoff_len", "data.too_long"})
HARMLESS_SECTIONS = frozenset({"backend", "checkpoint", "log"})


@dataclass(frozen=True)
class Start:
    """Where a run starts: from `checkpoint`, or from the model's own weights where it is None.

    `history` is another run's directory whose metrics this one goes on from. `notes` are to be told the user.
    """

    run_dir: Path
    checkpoint: CheckpointRef | None = None
    history: Path | None = None
    notes: tuple[str, ...] = ()


def find_start(recipe: Recipe, resume: str | None = None) -> Start:
    """Decide where to start.

    resume None: go on from the newest checkpoint of `train.output_dir` where it has one, else start at the
    beginning. "": the same, but a checkpoint must be there. "DIR" or "DIR@STEP": go on from a checkpoint of that
    run, in this recipe's own directory; "@STEP": from that step of its own run.
    Raises ConfigError where the recipe is not the one that the checkpoint was trained with, CheckpointError where
    there is no checkpoint.
    """
    own = Path(recipe.train.output_dir)
    if resume is None and not has_checkpoint(own):
        return Start(own, notes=_restart_notes(own))
    source, step = parse_run(resume or "", own)
    other = source.resolve() != own.resolve()
    if other and has_checkpoint(own):
        raise ConfigError(
            f"train.output_dir {own} has checkpoints of its own; to go on from {source} give a new directory: "
            f"train.output_dir=..."
        )
    ref = find_checkpoint(source, step, pass_over=True)
    changed = _refuse_other_recipe(recipe, ref)
    notes = [f"damaged, passed over: {text}" for text in ref.rejected]
    notes.append(f"resuming {ref.path} (step {ref.step})")
    if changed:
        notes.append(f"changed since then: {', '.join(changed)}")
    return Start(own, ref, _run_of(ref) if other else None, tuple(notes))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Create the run directory, and keep every other process from training in it meanwhile."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "w")  # noqa: SIM115  held open to the end
    except OSError as error:
        raise ConfigError(f"train.output_dir {run_dir}: cannot be written: {error.strerror or error}") from None
    with lock:  # the lock goes with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"train.output_dir {run_dir}: another process is training there; wait, or choose another directory"
            ) from None
        yield


def write_recipe(recipe: Recipe, run_dir: Path) -> None:
    """Write the run's recipe, all defaults spelled out."""
    write_text(run_dir / "recipe.yaml", write_yaml(recipe.model_dump(mode="json")))


def _run_of(ref: CheckpointRef) -> Path:
    return ref.path.parent.parent


def _restart_notes(run_dir: Path) -> tuple[str, ...]:
    if not (run_dir / "metrics.jsonl").is_file():
        return ()
    return (f"{run_dir} holds a run that has saved no checkpoint: starting it over from step 0",)


def _refuse_other_recipe(recipe: Recipe, ref: CheckpointRef) -> list[str]:
    """The harmless differences to the recipe of a checkpoint, as text; ConfigError where there are others."""
    old, new = {**_defaults(), **dict(_flat(ref.meta.recipe))}, dict(_flat(recipe.model_dump(mode="json")))
    for values in (old, new):  # the longest sample follows the packs where it is not given
        values["data.cutoff_len"] = values["data.cutoff_len"] or values["data.pack_tokens"]
    # A section that is absent now is one key here and several there; what only an old version knew has no meaning now.
    removed = [key for key in old if key not in new and key.partition(".")[0] in new]
    differences = {
        key: f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in (*new, *removed)
        if old.get(key) != new.get(key)
    }
    grave = [text for key, text in differences.items() if not _harmless(key, old, recipe)]
    if grave:
        raise ConfigError(
            f"{ref.path} was trained with another recipe: {', '.join(grave)}; restore these to go on, "
            f"or begin a new run: train.output_dir=..."
        )
    return [text for key, text in differences.items() if key != "train.output_dir"]


def _shown(value: Any) -> str:
    """A value of a recipe in a line; of a data source the fields that are not the defaults."""
    if not isinstance(value, list):
        return str(value)
    blank = DataSource(path="-").model_dump(mode="json")
    short = [{k: v for k, v in one.items() if v != blank.get(k)} if isinstance(one, dict) else one for one in value]
    return str([one["path"] if isinstance(one, dict) and list(one) == ["path"] else one for one in short])


def _harmless(key: str, old: Mapping[str, Any], recipe: Recipe) -> bool:
    if key == "data.train":
        sources = [source.model_dump(mode="json") for source in recipe.data.train]
        return _without_places(old[key]) == _without_places(sources)
    if key in LENGTHS:  # so far no sample was too long, or none of those was used
        return bool(old["data.too_long"] == "error")
    if key in PACKING and recipe.train.loss == "micro_batch":  # a loss that the micro-batches have a part in
        return False
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_SECTIONS


def _without_places(sources: Any) -> list[Any]:
    """Data sets by all but where they lie; old checkpoints name them by their paths alone."""
    blank = DataSource(path="-").model_dump(mode="json")
    whole = [one if isinstance(one, dict) else blank for one in sources]
    return [{key: value for key, value in one.items() if key not in PLACES} for one in whole]


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, fields in recipe.items():
        if fields is None:
            yield section, None
        for key, value in (fields or {}).items():
            yield f"{section}.{key}", value


def _defaults() -> dict[str, Any]:
    """What a checkpoint of an earlier version, without a field, was trained with."""
    blank = Recipe.model_validate({"model": {"path": "-"}, "data": {"train": "-"}})
    return dict(_flat(blank.model_dump(mode="json")))
