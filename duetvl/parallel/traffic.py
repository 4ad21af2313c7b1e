"""How many bytes a rank sends in a training step: counted from a layout, as `Collectives.traffic` counts them.

Sums and gathers are counted as a ring does them, which sends the least: all_reduce 2 (n - 1) / n of a tensor,
reduce_scatter and all_gather (n - 1) / n. What is padded where pieces are uneven, and small things (losses, the
softmax statistics), are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from duetvl.core.boxes import Shape
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import Load, Trained
from duetvl.models.recompute import RUNS_AGAIN, Again, RecomputeMode
from duetvl.parallel.division import Division

# Sums of activations that a block makes again in its backward pass, by what runs again there. The last one, behind the
# MLP, gives nothing that the backward pass needs, and need not be made.
_AGAIN: Final[Mapping[Again, int]] = {"nothing": 0, "mlp": 0, "block": 1}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step: between the ranks of tensor parallelism, and gradients and new weights."""

    activations: int
    gradients: int
    weights: int


def step_traffic(
    config: ModelConfig, trained: Trained, division: Division, load: Load, micro_batches: int, recompute: RecomputeMode
) -> Traffic:
    """Of a step of `micro_batches` passes over loads like this one; activations travel in the weights' dtype.

    `trained` are the parameters of the whole model. What goes between stages, and between the ranks that divide a
    sequence, is not counted.
    """
    passes = micro_batches * _pass(config, trained, division, load, recompute)
    shared = [_shared(trained, division, path) for path in trained.paths if division.holds(path)]
    gradients = sum(4 * share * math.prod(unit) for share, unit, _ in shared)
    weights = sum(narrow * share * math.prod(unit) for share, unit, narrow in shared)
    return Traffic(round(passes), round(gradients), round(weights))


def _shared(trained: Trained, division: Division, path: str) -> tuple[float, Shape, int]:
    """((n - 1) / n of the n ranks that share a parameter, the shape of what they share, bytes of a number)"""
    sharing = division.sharing(path, trained.shapes[path])
    team = division.team(sharing.axes)
    narrow = trained.stored([path]) // max(1, trained.numbers([path]))
    return _ring(len(team)), sharing.unit.shape, narrow


def _own_layers(division: Division, tower: Literal["vision", "language"], layers: int) -> int:
    if division.stages.count == 1:
        return layers
    return sum(len(division.stages.of(tower, stage)) for stage in division.own_stages)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _pass(config: ModelConfig, trained: Trained, division: Division, load: Load, recompute: RecomputeMode) -> float:
    """Bytes of a pass forward and backward between the ranks of tensor parallelism.

    Attention and MLP of a block each cross into a divided region and out of it: one sum of a residual's size each way,
    whether it is an all_reduce or, along a divided sequence, a gather and a reduce_scatter.
    """
    vision_mode, language_mode = RUNS_AGAIN[recompute]
    text, narrow, ring = config.text, trained.narrow, _ring(division.mesh.tp)
    row = narrow * text.hidden_size
    crossings = _own_layers(division, "language", text.num_layers) * (4 + _AGAIN[language_mode])
    sums = load.tokens * (crossings + 1)  # the embedding's as well
    sums = sums + load.trained  # and the gradients of rows that meet the vocabulary
    tower = _vision(config, division, load.patches, narrow, vision_mode) if load.patches else 0.0
    return 2 * ring * row * sums + tower


def _vision(config: ModelConfig, division: Division, patches: int, narrow: int, mode: Again) -> float:
    if division.vision == "divide":
        return 0.0  # features travel with the embedding's sum
    vision, ring = config.vision, _ring(division.mesh.tp)
    merged = patches // vision.merge**2
    features = ring * narrow * merged * vision.out_hidden_size
    blocks = _own_layers(division, "vision", vision.depth) * (4 + _AGAIN[mode]) * narrow * patches * vision.hidden_size
    into_merger = 2 * ring * narrow * patches * vision.hidden_size
    return 2 * ring * blocks + 2 * features + into_merger
