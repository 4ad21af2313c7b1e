"""Where a recipe's layout puts a model: the layers of each stage, and how the ranks of a sequence see all of it."""

from __future__ import annotations

from itertools import chain
from typing import Literal

from duetvl.core.errors import ConfigError
from duetvl.core.stages import Rows, Stages, even_split
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.training.recipe.parallel_section import ParallelSection
from duetvl.training.recipe.text import show


def stages_of(parallel: ParallelSection, config: ModelConfig) -> Stages:
    """The layers of each stage; of a tower without a list, where it lies by default.

    The vision tower is on the first stage. The language model is divided evenly over the stages from the last one with
    vision layers on. Raises ConfigError for lists that do not add up to the model's layers, and where a rank would
    have no layer of either tower; a single stage may have none.
    """
    vision, language = config.vision.depth, config.text.num_layers
    _check_sum("vision", parallel.vision_layers, vision, parallel.pp)
    _check_sum("language", parallel.language_layers, language, parallel.pp)
    count = parallel.pp * parallel.virtual
    seen = tuple(chain(*parallel.vision_layers)) if parallel.vision_layers else (vision,)
    seen = (*seen, *[0] * (count - len(seen)))
    if parallel.language_layers:
        stages = Stages(seen, tuple(chain(*parallel.language_layers)))
    else:
        before = max(stage for stage, layers in enumerate(seen) if layers)
        stages = Stages(seen, (*[0] * before, *even_split(language, count - before)))
    _check_ranks(parallel, stages)
    return stages


def _check_sum(tower: Literal["vision", "language"], rows: Rows | None, layers: int, pp: int) -> None:
    if rows is not None and (total := sum(map(sum, rows))) != layers:
        stages = pp * len(rows)
        part = {"vision": "vision tower", "language": "language model"}[tower]
        raise ConfigError(
            f"parallel.{tower}_layers {show(rows)} places {total} layers, the {part} has {layers}; "
            f"evenly over {stages} stages they would be {list(even_split(layers, stages))}"
        )


def _check_ranks(parallel: ParallelSection, stages: Stages) -> None:
    """A rank without any layer would wait for a whole run."""
    both = [sum(pair) for pair in zip(stages.vision, stages.language, strict=True)]
    empty = [rank for rank in range(parallel.pp) if not any(both[rank :: parallel.pp])]
    if not empty:
        return
    if parallel.language_layers or parallel.vision_layers:
        way = (
            "give it some in parallel.vision_layers or parallel.language_layers, or take fewer stages with parallel.pp"
        )
    else:
        way = f"possible without lists are 1 to {stages.layers[1]}"
    raise ConfigError(f"parallel.pp {parallel.pp}: rank {empty[0]} of the pipeline has no layer of the model; {way}")


def exchanging(parallel: ParallelSection, config: ModelConfig) -> int:
    """How many ranks of context parallelism exchange heads with each other (`Division.ulysses`).

    Each needs one at least of the query heads that a rank of tensor parallelism has. Raises ConfigError otherwise.
    """
    heads = max(1, config.text.num_heads // parallel.tp)  # at least: where they do not fall evenly, some have one more
    divisors = [n for n in range(1, parallel.cp + 1) if parallel.cp % n == 0]
    if parallel.cp_algorithm == "ring":
        return 1
    if parallel.cp_algorithm == "hybrid":
        fitting = [n for n in divisors if n <= heads]
        if parallel.ulysses is not None and parallel.ulysses not in fitting:
            raise ConfigError(
                f"parallel.ulysses {parallel.ulysses}: {_have(parallel, heads)}; "
                f"possible are {', '.join(map(str, fitting))}"
            )
        return parallel.ulysses or fitting[-1]
    if parallel.cp > heads:
        raise ConfigError(
            f"parallel.cp {parallel.cp} with parallel.cp_algorithm ulysses: {_have(parallel, heads)}; possible are "
            f"1 to {heads}, or any number with parallel.cp_algorithm=hybrid or ring"
        )
    return parallel.cp


def _have(parallel: ParallelSection, heads: int) -> str:
    """What limits the ranks that exchange heads."""
    some = "a rank" if parallel.tp > 1 else "the model"
    return f"{some} has {heads} query heads, of which each rank that exchanges them needs one at least"
