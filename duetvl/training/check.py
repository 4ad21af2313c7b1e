"""`duetvl check`: everything about a recipe that can be wrong before the first step, at the price of a few records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

from duetvl.core.weights_dir import open_weights
from duetvl.data.draft import Draft, Dropped
from duetvl.data.records import Ref
from duetvl.data.samples import SampleMaker
from duetvl.models.hub import is_id, model_directory
from duetvl.models.qwen_vl.config import load_config, parameter_shapes
from duetvl.models.qwen_vl.model import PARTS
from duetvl.models.qwen_vl.names import canonical_names
from duetvl.training.feed import DataSets
from duetvl.training.groups import check_patterns
from duetvl.training.loop import read_recipe, total_steps, world_size
from duetvl.training.lora import plan_adapters
from duetvl.training.recipe import check_layers, check_world
from duetvl.training.reference import describe
from duetvl.training.run_directory import find_start
from duetvl.training.sections import Recipe
from duetvl.training.sft import record_encoder

FIRST = 16  # records of each file set that are encoded


def check(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Iterator[str]:
    """What the recipe will do, line by line. Raises whatever training would meet at its start."""
    given = read_recipe(recipe, overrides)
    sets = DataSets(given.data)
    yield _steps_line(given, sets.per_epoch)
    start = find_start(given)
    yield from start.notes or (f"run directory: {start.run_dir}, new",)
    yield from _model_lines(given)
    if given.dpo is not None:
        yield describe(given, load_config(model_directory(given.model.path, weights=False)))
    maker = SampleMaker(sets.files, record_encoder(given))
    yield _records_line("data.train", sets.train_count, sets.train_refs(), maker)
    val = sets.val_refs()
    if val is not None:
        yield _records_line("data.val", sets.val_count, val, maker)
    check_world(given, world_size())  # last: a layout for many processes is looked at on one, up to here


def _steps_line(recipe: Recipe, per_epoch: Fraction | None) -> str:
    steps, group = total_steps(recipe, per_epoch), recipe.train.global_batch
    if per_epoch is None:
        return f"recipe: {steps} steps of {group} samples of a stream"
    return f"recipe: {steps} steps of {group} samples, {steps * group / float(per_epoch):.2f} epochs"


def _model_lines(recipe: Recipe) -> Iterator[str]:
    """Configuration, the headers of the weights, and adapters."""
    path = model_directory(recipe.model.path, weights=False)
    config = load_config(path)
    check_layers(recipe.parallel, config)
    shapes = parameter_shapes(config)
    plan = plan_adapters(recipe, config)
    adapters = plan.adapters.shapes(shapes) if plan else {}
    check_patterns([*shapes, *adapters], recipe.model.freeze, recipe.optim, PARTS)
    fetched = not is_id(recipe.model.path) or any(path.glob("*.safetensors"))
    if fetched:
        open_weights(path, canonical_names(config.tie_word_embeddings)).check(shapes)
    numbers = sum(_volume(shape) for shape in shapes.values())
    known = f"{config.model_type}, {numbers / 1e6:.1f} million parameters in {recipe.model.dtype}"
    yield f"model: {path}, {known}{'' if fetched else '; its weights are fetched when it is trained'}"
    if plan:
        yield plan.describe(config)


def _volume(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _records_line(name: str, count: int | None, refs: Iterator[Ref], maker: SampleMaker) -> str:
    """How many records there are, and the sizes of the first. Raises DataError for a bad one."""
    known = f"{name}: a stream" if count is None else f"{name}: {count} records"
    lengths = []
    for outcome in maker.drafts(list(islice(refs, FIRST))):
        if isinstance(outcome, Draft):
            lengths.append(outcome.tokens)
        elif not isinstance(outcome, Dropped):
            raise outcome
    if not lengths:
        return f"{known}; the first {FIRST} are all left out by the recipe's rules"
    return (
        f"{known}; of the first {len(lengths)}: {sum(lengths) / len(lengths):.0f} tokens on average, "
        f"{max(lengths)} in the longest"
    )
