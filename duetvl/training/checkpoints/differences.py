"""What a recipe has otherwise than the one that a run was trained with, and what of that may change on resuming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from duetvl.training.recipe.data_section import DataSource
from duetvl.training.recipe.sections import Recipe

# What may differ between a checkpoint and the recipe that resumes from it. The split into micro-batches changes no
# result beyond rounding; a new length changes the schedule from here on.
PACKING = frozenset({"data.pack", "data.pack_tokens", "data.pack_patches"})
HARMLESS = frozenset(
    {
        "train.steps",
        "train.epochs",
        "train.eval_every",
        "train.eval_first",
        "train.patience",
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
        # A run may be resumed where things lie elsewhere. What they are is known by other means: the model by
        # the checkpoint's own weights or a fingerprint, the data by the number of their records.
        "model.path",
        "model.base",
        "dpo.reference",
        "dpo.reference_base",
        "data.image_root",
    }
)
PLACES = frozenset({"path", "image_root"})  # of a data set
BOUNDS = ("data.max_pixels", "data.video_max_pixels", "data.video_total_pixels")
DIRECTORY = "the number of the model directory"  # what null stood for
LENGTHS = frozenset({"data.cutoff_len", "data.too_long"})
# A checkpoint knows no layout: any can resume from it.
HARMLESS_SECTIONS = frozenset({"backend", "checkpoint", "eval", "log", "parallel"})


def differences(recipe: Recipe, stored: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a recipe has otherwise than the one that a run was trained with, as texts: harmless, and not."""
    old, new = {**_defaults(), **dict(_flat(stored))}, dict(_flat(recipe.model_dump(mode="json")))
    data = stored.get("data", {})
    if data and "system" not in data and old["data.resize"] != "llamafactory":  # before training had its own bounds
        old.update(dict.fromkeys((key for key in BOUNDS if old[key] is None), DIRECTORY))
    for values in (old, new):  # the longest sample follows the packs where it is not given
        values["data.cutoff_len"] = values["data.cutoff_len"] or values["data.pack_tokens"]
    # A section that is absent now is one key here and several there; what only an old version knew has no meaning now.
    removed = [key for key in old if key not in new and key.partition(".")[0] in new]
    texts = {
        key: f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in (*new, *removed)
        if old.get(key) != new.get(key)
    }
    harmless = [key for key in texts if _harmless(key, old, recipe)]
    grave = [text for key, text in texts.items() if key not in harmless]
    return [texts[key] for key in harmless if key != "train.output_dir"], grave


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
    if key in BOUNDS and old[key] == DIRECTORY:  # harmless where the recipe writes out what the directory says
        return getattr(recipe.data, key.partition(".")[2]) is not None
    if key in LENGTHS:  # so far no sample was too long, or none of those was used
        return bool(old["data.too_long"] == "error")
    if key in PACKING and recipe.train.loss == "micro_batch":  # a loss that the micro-batches have a part in
        return False
    return key in HARMLESS or key.partition(".")[0] in HARMLESS_SECTIONS


def same_validation(recipe: Recipe, stored: Mapping[str, Any]) -> bool:
    """Whether losses of a stored recipe's validation data may be compared with those of this one's.

    Files that have only moved are recognised by their names.
    """
    now, then = recipe.model_dump(mode="json")["data"], stored.get("data", {})
    one, other = ((_names(data.get("val")), data.get("val_max_samples")) for data in (now, then))
    return one == other


def _names(sources: Any) -> list[Any]:
    paths = [one["path"] if isinstance(one, dict) else one for one in sources or ()]
    return [[Path(path).name for path in paths], _without_places(sources or ())]


def _without_places(sources: Any) -> list[Any]:
    """Data sets by all but where they lie; old checkpoints name them by their paths alone."""
    blank = DataSource(path="-").model_dump(mode="json")
    whole = [one if isinstance(one, dict) else blank for one in sources]
    return [{key: value for key, value in one.items() if key not in PLACES} for one in whole]


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, fields in recipe.items():
        if fields is None:
            yield section, None
        for key, value in (fields if isinstance(fields, Mapping) else {}).items():
            yield f"{section}.{key}", value


def _defaults() -> dict[str, Any]:
    """What a checkpoint of an earlier version, without a field, was trained with."""
    blank = Recipe.model_validate({"model": {"path": "-"}, "data": {"train": "-"}})
    return dict(_flat(blank.model_dump(mode="json")))
