"""How many bytes a rank sends in a training step: counted from a layout, as `Collectives.traffic` counts them.

Sums and gathers are counted as a ring does them, which sends the least: all_reduce 2 (n - 1) / n of a tensor,
reduce_scatter and all_gather (n - 1) / n. What is padded where pieces are uneven, and small things (losses, the
softmax statistics), are not; nor are features of pictures that travel along `cp` to the ranks with their tokens: how
many do depends on where a pack has them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import Load, Trained
from duetvl.models.qwen_vl.sharding import Tower, block_of
from duetvl.models.recompute import RUNS_AGAIN, Again, RecomputeMode
from duetvl.parallel.context import shares_of
from duetvl.parallel.division import Division

# Sums of activations that a block makes again in its backward pass, by what runs again there. The last one, behind the
# MLP, gives nothing that the backward pass needs, and need not be made.
_AGAIN: Final[Mapping[Again, int]] = {"nothing": 0, "mlp": 0, "block": 1}


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step: activations and their gradients, gradients of weights, and new weights.

    stages: to the stages before and behind its own; activations: between the ranks of tensor parallelism; pieces:
    between those of context parallelism, which have pieces of the sequences. blocks: the weights of blocks whose rows
    replicas divide, gathered where they run, and their gradients.
    """

    activations: int
    gradients: int
    weights: int
    stages: int = 0
    pieces: int = 0
    blocks: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.gradients + self.weights + self.stages + self.pieces + self.blocks


def step_traffic(
    config: ModelConfig, trained: Trained, division: Division, load: Load, micro_batches: int, recompute: RecomputeMode
) -> Traffic:
    """Of a step of `micro_batches` passes over loads like this one; activations travel in the weights' dtype.

    `trained` are the parameters of the whole model.
    """
    one = pass_traffic(config, trained, division, load, recompute)
    gradients = weights = 0.0
    for axes, numbers in shared_numbers(trained, division).items():
        sent = numbers.sent(len(division.team(axes)), trained.narrow)
        gradients, weights = gradients + sent[0], weights + sent[1]
    return Traffic(
        round(micro_batches * one.activations),
        round(gradients),
        round(weights),
        round(micro_batches * one.stages),
        micro_batches * one.pieces,
        round(micro_batches * one.blocks),
    )


@dataclass(frozen=True)
class PassTraffic:
    """Bytes that one rank sends in a pass forward and backward, named as in `Traffic`."""

    activations: float
    stages: float
    pieces: int
    blocks: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.activations + self.stages + self.pieces + self.blocks


def pass_traffic(
    config: ModelConfig, trained: Trained, division: Division, load: Load, recompute: RecomputeMode
) -> PassTraffic:
    """Of a pass over a load, of which a rank of context parallelism has its share."""
    cp = division.mesh.cp
    load = Load(math.ceil(load.tokens / cp), math.ceil(load.trained / cp), math.ceil(load.patches / cp))
    return PassTraffic(
        _pass(config, trained, division, load, recompute),
        _between_stages(config, trained, division, load),
        _between_pieces(config, trained.narrow, division, load.tokens, recompute),
        _gathered(trained, division, load, recompute),
    )


@dataclass(frozen=True)
class Shared:
    """Trained numbers of which some ranks hold the same, those of adapters apart, which are float32."""

    own: int = 0
    adapters: int = 0

    def sent(self, ranks: int, narrow: int) -> tuple[float, float]:
        """(bytes of gradients, bytes of new weights) that each of them sends in a step."""
        return _ring(ranks) * 4 * (self.own + self.adapters), _ring(ranks) * (narrow * self.own + 4 * self.adapters)


def shared_numbers(trained: Trained, division: Division) -> dict[tuple[str, ...], Shared]:
    """What a rank holds of what is trained, by the axes along which others hold the same (`Sharing.axes`)."""
    held: dict[tuple[str, ...], Shared] = {}
    for path in filter(division.holds, trained.paths):
        sharing = division.sharing(path, trained.shapes[path])
        before, numbers = held.get(sharing.axes, Shared()), math.prod(sharing.unit.shape)
        adapter = is_adapter(path)
        held[sharing.axes] = Shared(before.own + numbers * (not adapter), before.adapters + numbers * adapter)
    return held


def _gathered(trained: Trained, division: Division, load: Load, recompute: RecomputeMode) -> float:
    """Bytes of a pass that gathers blocks: their weights, once more where the backward pass runs them again, and
    float32 gradients of those that are trained."""
    modes, sent, flows = RUNS_AGAIN[recompute], 0.0, False
    trained_blocks = {block_of(path) or path for path in trained.paths}
    for path, shape in trained.shapes.items():
        vision = path.startswith("visual.")
        if is_adapter(path) or (vision and not load.patches):
            continue
        flows = flows or (block_of(path) or path) in trained_blocks
        if division.is_sharded(path, shape):
            sharing = division.sharing_used(path, shape)
            again = flows and modes[0 if vision else 1] == "block"
            each = trained.narrow * (1 + again) + 4 * (path in trained.paths)
            sent = sent + each * _ring(len(division.team(sharing.axes))) * math.prod(sharing.unit.shape)
    return sent


def _between_stages(config: ModelConfig, trained: Trained, division: Division, load: Load) -> float:
    """Bytes of a pass through a rank's stages: what each hands on, and gradients of what it was handed."""
    if division.mesh.pp == 1:
        return 0.0
    last, first_trained = division.stages.count - 1, first_to_learn(trained, division)
    numbers = sum(crossing(config, division, stage, load) for stage in division.own_stages if stage < last)
    back = sum(crossing(config, division, stage - 1, load) for stage in division.own_stages if stage > first_trained)
    return trained.narrow * (numbers + back)


def first_to_learn(trained: Trained, division: Division) -> int:
    """The first stage with anything that is trained: gradients flow back over every boundary behind it."""
    return min((division.stages_of(path)[0] for path in trained.paths), default=division.stages.count)


def crossing(config: ModelConfig, division: Division, stage: int, load: Load) -> float:
    """Numbers that cross the boundary behind a stage: patch rows, merged features, or hidden rows."""
    stages, vision, tp = division.stages, config.vision, division.mesh.tp
    if any(stages.language[: stage + 1]):
        return load.tokens * config.text.hidden_size / (tp if division.sequence else 1)
    patches = load.patches / (tp if division.vision == "divide" else 1)
    if sum(stages.vision[: stage + 1]) < vision.depth:
        return patches * vision.hidden_size
    return patches / vision.merge**2 * vision.out_hidden_size


def _between_pieces(config: ModelConfig, narrow: int, division: Division, rows: int, recompute: RecomputeMode) -> int:
    """Bytes of a pass forward and backward between the pieces of sequences, of which this rank has `rows`.

    Heads go out for rows before attention and come back behind it; in the backward pass their gradients go the other
    way. Keys and values go round a ring in both passes, in the second one with their gradients, which are float32.
    """
    place, shares = division.place("cp") % division.ulysses, shares_of(division)
    own, others = shares[place], [*shares[:place], *shares[place + 1 :]]
    out = sum(share.heads for share in others) + len(others) * len(own.queries)
    back = len(others) * own.heads + sum(len(share.queries) for share in others)
    around = (division.mesh.cp // division.ulysses - 1) * division.ulysses * 2 * len(own.keys)
    forward = 1 + (RUNS_AGAIN[recompute][1] == "block")
    row = narrow * (forward * (out + around) + back + around) + 4 * around
    return rows * config.text.head_dim * row * len(_layers(division, "language", config.text.num_layers))


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
    layers = _layers(division, "language", text.num_layers)
    sums = load.tokens * len(layers) * (4 + _AGAIN[language_mode])
    sums = sums + load.tokens * (0 in layers)  # the embedding's as well
    sums = sums + load.trained * (text.num_layers - 1 in layers)  # and gradients of rows that meet the vocabulary
    tower = _vision(config, division, load.patches, narrow, vision_mode) if load.patches else 0.0
    return 2 * ring * row * sums + tower


def _layers(division: Division, tower: Tower, depth: int) -> Collection[int]:
    """The layers of a tower that a rank runs."""
    if division.mesh.pp == 1:
        return range(depth)
    return [layer for stage in division.own_stages for layer in division.stages.of(tower, stage)]


def _vision(config: ModelConfig, division: Division, patches: int, narrow: int, mode: Again) -> float:
    if division.vision == "divide":
        return 0.0  # features travel with the embedding's sum
    vision, ring = config.vision, _ring(division.mesh.tp)
    layers, merged = _layers(division, "vision", vision.depth), patches // vision.merge**2
    last = vision.depth - 1 in layers
    features = last * ring * narrow * merged * vision.out_hidden_size
    blocks = len(layers) * (4 + _AGAIN[mode]) * narrow * patches * vision.hidden_size
    into_merger = last * 2 * ring * narrow * patches * vision.hidden_size
    return 2 * ring * blocks + 2 * features + into_merger
