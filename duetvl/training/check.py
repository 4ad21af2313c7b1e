"""`duetvl check`: everything about a recipe that can be wrong before the first step, at the price of a few records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duetvl.core.weights_dir import open_weights
from duetvl.data.loader import Encode, check_length
from duetvl.data.records import Records
from duetvl.models.hub import is_id, model_directory
from duetvl.models.qwen_vl.config import load_config, parameter_shapes
from duetvl.models.qwen_vl.model import PARTS
from duetvl.models.qwen_vl.names import canonical_names
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
    records = Records([source.path for source in given.data.train])
    steps = total_steps(given, len(records))
    seen = steps * given.train.global_batch
    yield f"recipe: {steps} steps of {given.train.global_batch} samples, {seen / len(records):.2f} epochs"
    start = find_start(given)
    yield from start.notes or (f"run directory: {start.run_dir}, new",)
    yield from _model_lines(given)
    if given.dpo is not None:
        yield describe(given, load_config(model_directory(given.model.path, weights=False)))
    encode = record_encoder(given)
    yield _records_line("data.train", records, encode, given)
    if given.data.val:
        yield _records_line("data.val", Records([source.path for source in given.data.val]), encode, given)
    check_world(given, world_size())  # last: a layout for many processes is looked at on one, up to here


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


def _records_line(name: str, records: Records, encode: Encode, recipe: Recipe) -> str:
    samples = [encode(records[number]) for number in range(min(FIRST, len(records)))]
    for sample in samples:
        check_length(sample, recipe.data.longest)
    lengths = [len(sample) for sample in samples]
    return (
        f"{name}: {len(records)} records; of the first {len(samples)}: {sum(lengths) / len(lengths):.0f} tokens on "
        f"average, {max(lengths)} in the longest"
    )
