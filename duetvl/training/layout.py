"""A recipe's layout in words: what each rank holds, how much memory that takes, and what a step sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, Literal

from duetvl.core.mesh import AXES
from duetvl.core.stages import even_range
from duetvl.models.lora import Adapters
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import Load, Trained
from duetvl.parallel.division import Division
from duetvl.parallel.traffic import step_traffic
from duetvl.training.checkpoints.space import in_words
from duetvl.training.memory import division_of, estimate, largest_block, stage_ranks
from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.text import show

_LISTED: Final = 8  # ranks of tensor parallelism that are described one by one


def degrees(recipe: Recipe) -> str:
    """`pp 1 x dp 2 x cp 1 x tp 4`"""
    return " x ".join(f"{axis} {getattr(recipe.parallel.mesh, axis)}" for axis in AXES)


def layout_lines(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, load: tuple[Load, int] | None
) -> Iterator[str]:
    """The layout of a recipe for several processes, on whatever machine it is asked for; nothing for one process.

    `load` is the largest micro-batch and how many of them a rank has in a step; memory and bytes are given with it.
    """
    parallel, mesh = recipe.parallel, recipe.parallel.mesh
    if mesh.size == 1:
        return
    placed = {"vision": parallel.vision_layers, "language": parallel.language_layers}
    stages = "".join(f", {name} layers {show(rows)}" for name, rows in placed.items() if rows)
    yield f"layout: {degrees(recipe)} needs {mesh.size} processes{stages}"
    if mesh.pp > 1:
        yield from _stages(recipe, config, adapters, load)
    if mesh.tp > 1:
        yield from _parts(recipe, config, adapters, load)
    if parallel.zero == 3:
        yield _gathered(recipe, config, adapters)
    if load is not None:
        yield _sent(recipe, config, adapters, *load)


def _stages(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, load: tuple[Load, int] | None
) -> Iterator[str]:
    """What each rank of a pipeline has."""
    for place, rank in enumerate(stage_ranks(recipe)):
        division = division_of(recipe, config, rank)
        towers: tuple[Literal["vision", "language"], ...] = ("vision", "language")
        own = {
            tower: [layer for stage in division.own_stages for layer in division.stages.of(tower, stage)]
            for tower in towers
        }
        listed = ", ".join(f"{tower} layers {_ranges(layers)}" for tower, layers in own.items() if layers)
        yield f"  pp {place}: {listed}{_peak(recipe, config, adapters, load, division)}"


def _peak(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, load: tuple[Load, int] | None, division: Division
) -> str:
    if load is None:
        return ""
    memory = estimate(config, recipe, *load, adapters, division)
    return f"; about {in_words(memory.peak)} at the peak, {in_words(memory.weights)} of them weights"


def _parts(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, load: tuple[Load, int] | None
) -> Iterator[str]:
    """What each rank of tensor parallelism holds; those of every replica alike, with a pipeline on its first rank."""
    for place in range(min(recipe.parallel.tp, _LISTED)):
        division = division_of(recipe, config, place)
        yield f"  tp {place}: {_held(config, division)}{_peak(recipe, config, adapters, load, division)}"
    if recipe.parallel.tp > _LISTED:
        yield f"  and so on up to tp {recipe.parallel.tp - 1}"


def _gathered(recipe: Recipe, config: ModelConfig, adapters: Adapters | None) -> str:
    """What rank 0 has of the weights, and what it gathers at a time."""
    every, division = Trained.of(config, recipe.model.dtype, recipe.model.freeze, adapters), division_of(recipe, config)
    sharded = every.only(lambda path: division.is_sharded(path, every.shapes[path]))
    held = sharded.cut(lambda path, shape: division.part(path, shape).shape)
    parts = in_words(held.stored(held.shapes)), in_words(sharded.stored(sharded.shapes))
    largest = in_words(largest_block(every, division)[0])
    return (
        f"  zero 3: a rank holds {parts[0]} of {parts[1]} of weights in blocks, and gathers {largest} at most at a time"
    )


def _held(config: ModelConfig, division: Division) -> str:
    place, tp, heads = division.place("tp"), division.mesh.tp, division.heads
    query, kv = heads.held("head", place, tp), heads.held("kv_head", place, tp)
    assert query is not None and kv is not None, "heads are units of their own"
    vocabulary, inner = (
        len(even_range(size, place, tp)) for size in (config.text.vocab_size, config.text.intermediate_size)
    )
    parts = [
        f"heads {_ranges(query[0])} of {heads.query}",
        f"key-value heads {_ranges(kv[0])} of {heads.kv}",
        f"{inner} of {config.text.intermediate_size} columns of each MLP",
        f"{vocabulary} of {config.text.vocab_size} rows of the vocabulary",
        "its share of the frames" if division.vision == "divide" else "its heads of the vision tower",
    ]
    return ", ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7`"""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _sent(recipe: Recipe, config: ModelConfig, adapters: Adapters | None, load: Load, micro_batches: int) -> str:
    """What rank 0 sends in a step."""
    trained = Trained.of(config, recipe.model.dtype, recipe.model.freeze, adapters)
    division = division_of(recipe, config)
    sent = step_traffic(config, trained, division, load, micro_batches, recipe.train.recompute)
    parts = {
        "activations": sent.activations,
        "what stages hand on": sent.stages,
        "what pieces of sequences exchange": sent.pieces,
        "blocks gathered and their gradients": sent.blocks,
        "gradients": sent.gradients,
        "new weights": sent.weights,
    }
    listed = ", ".join(f"{in_words(number)} of {name}" for name, number in parts.items() if number)
    return f"  a rank sends about {in_words(sent.total)} in a step: {listed or 'nothing'}"
