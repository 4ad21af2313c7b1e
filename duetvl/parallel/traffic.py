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
    cp = division.mesh.cp
    load = Load(math.ceil(load.tokens / cp), math.ceil(load.trained / cp), math.ceil(load.patches / cp))
    passes = micro_batches * _pass(config, trained, division, load, recompute)
    between = micro_batches * _between_stages(config, trained, division, load)
    pieces = micro_batches * _between_pieces(config, trained.narrow, division, load.tokens, recompute)
    shared = shared_bytes(trained, division).values()
    gradients, weights = (sum(numbers) for numbers in zip(*shared, strict=True)) if shared else (0.0, 0.0)
    blocks = micro_batches * _gathered(trained, division, load, recompute)
    return Traffic(round(passes), round(gradients), round(weights), round(between), pieces, round(blocks))


def shared_bytes(trained: Trained, division: Division) -> dict[tuple[str, ...], tuple[float, float]]:
    """(bytes of gradients, bytes of new weights) that this rank sends in a step, by the axes that it sends them along
    (`Sharing.axes`)."""
    sent: dict[tuple[str, ...], tuple[float, float]] = {}
    for path in filter(division.holds, trained.paths):
        sharing = division.sharing(path, trained.shapes[path])
        numbers = _ring(len(division.team(sharing.axes))) * math.prod(sharing.unit.shape)
        gradients, weights = sent.get(sharing.axes, (0.0, 0.0))
        narrow = 4 if is_adapter(path) else trained.narrow
        sent[sharing.axes] = gradients + 4 * numbers, weights + narrow * numbers
    return sent


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
    crossings = [crossing(config, division, stage, load) for stage in range(division.stages.count - 1)]
    flows = [flows_back(trained, division, stage) for stage in range(division.stages.count - 1)]
    numbers = sum(crossings[stage] for stage in division.own_stages if stage < len(crossings))
    back = sum(crossings[stage - 1] * flows[stage - 1] for stage in division.own_stages if stage > 0)
    return trained.narrow * (numbers + back) * (division.mesh.pp > 1)


def flows_back(trained: Trained, division: Division, stage: int) -> bool:
    """Whether gradients flow back over the boundary behind a stage: whether it or one before it is trained."""
    return any(division.stages_of(path)[0] <= stage for path in trained.paths)


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
