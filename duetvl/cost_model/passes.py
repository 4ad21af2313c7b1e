"""What a rank computes in a pass of a micro-batch through each of its stages, in operations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from duetvl.core.stages import Stages
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.flops import (
    Amounts,
    LayerFlops,
    language_layer,
    merger_flops,
    pixel_flops,
    vision_layer,
    vocabulary_flops,
)
from duetvl.models.qwen_vl.memory import Trained
from duetvl.models.qwen_vl.sharding import block_of
from duetvl.models.recompute import RUNS_AGAIN, Again, RecomputeMode
from duetvl.parallel.context import shares_of
from duetvl.parallel.division import Division


@dataclass(frozen=True)
class Operations:
    """Of one pass through a stage: forward, backward without what is computed again there, and that."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.again

    def scaled(self, share: float) -> Operations:
        """Of a rank that has this share of them."""
        return Operations(share * self.forward, share * self.backward, share * self.again)


@dataclass(frozen=True)
class _Back:
    """What a layer's backward pass asks for, as multiples of its forward pass."""

    weights: float
    attention: float
    again: Again


@dataclass(frozen=True)
class Share:
    """What a rank computes of each layer: of what falls with query heads, key and value heads, and the MLP's columns,
    and of attention."""

    queries: float = 1.0
    keys: float = 1.0
    mlp: float = 1.0
    attention: float = 1.0


class Passes:
    """A model's layers in operations, with what is trained in them; the same for every layout of a recipe."""

    def __init__(self, config: ModelConfig, trained: Trained, amounts: Amounts, recompute: RecomputeMode, frame: int):
        """`amounts` of a micro-batch; `frame`: the patches of its largest frame, which lies on one rank."""
        self.config, self.amounts = config, amounts
        self.frame = frame / amounts.patches if amounts.patches else 0.0
        vision_mode, language_mode = RUNS_AGAIN[recompute]
        shares, self._flows = _trained_shares(trained), False
        self._updated: Counter[str] = Counter()
        for path in trained.paths:
            self._updated[_owner(path)] += math.prod(trained.shapes[path])
        self._tower: list[tuple[LayerFlops, _Back]] = []
        self._pixels = self._one(pixel_flops(config.vision, amounts), shares, "visual.patch_embed", flows=False)
        for layer in range(config.vision.depth):
            back = self._back(shares.get(f"visual.blocks.{layer}"), vision_mode)
            self._tower.append((vision_layer(config.vision, amounts, layer), back))
        self._merger = self._one(merger_flops(config.vision, amounts), shares, "visual.merger")
        self._flows = (self._flows and amounts.patches > 0) or "model.embed_tokens.weight" in shares
        layer_flops = language_layer(config.text, amounts)
        self._language = [
            (layer_flops, self._back(shares.get(f"model.layers.{layer}"), language_mode))
            for layer in range(config.text.num_layers)
        ]
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._head = self._one(vocabulary_flops(config.text, amounts), shares, head)

    def _back(self, share: float | None, mode: Again) -> _Back:
        """Of the next layer, of whose weights `share` is trained; None: nothing of it is."""
        self._flows = self._flows or share is not None
        return _Back(self._flows + (share or 0.0), 2.0 * self._flows, mode if self._flows else "nothing")

    def _one(self, forward: float, shares: dict[str, float], path: str, *, flows: bool = True) -> Operations:
        """A product by itself; without `flows` nothing before it is trained."""
        back = self._back(shares.get(path), "nothing")
        return Operations(forward, forward * (back.weights if flows else shares.get(path, 0.0)))

    def of_rank(self, division: Division) -> dict[int, Operations]:
        """What a rank computes for each of its stages."""
        tower, decoder, stages = self.tower(division), self.decoder(division), division.stages
        if stages.count == 1:
            return {0: sum([*tower, *decoder], Operations())}
        return {
            stage: sum(
                [tower[n] for n in stages.of("vision", stage)] + [decoder[n] for n in stages.of("language", stage)],
                Operations(),
            )
            for stage in division.own_stages
        }

    def updated(self, stages: Stages, stage: int) -> int:
        """How many numbers of a stage's blocks are trained."""
        blocks = [f"visual.blocks.{layer}" for layer in stages.of("vision", stage)]
        blocks += [f"model.layers.{layer}" for layer in stages.of("language", stage)]
        return sum(self._updated[block] for block in blocks)

    def tower(self, division: Division) -> list[Operations]:
        """What a rank computes of each block of the vision tower, patch embedding and merger with its ends."""
        tp, cp, vision = division.mesh.tp, division.mesh.cp, self.config.vision
        if not self.amounts.patches:
            return [Operations()] * vision.depth
        rows = max(1 / (tp * cp if division.vision == "divide" else cp), self.frame)
        if division.vision == "divide":
            share = Share(rows, rows, rows, rows)
        else:
            heads, columns = _even(vision.num_heads, tp) * rows, _even(vision.intermediate_size, tp) * rows
            share = Share(heads, heads, columns, heads)
        layers = [_operations(*layer, share) for layer in self._tower]
        layers[0] = layers[0] + self._pixels.scaled(rows)
        layers[-1] = layers[-1] + self._merger.scaled(share.mlp)
        return layers

    def decoder(self, division: Division) -> list[Operations]:
        """The same of each decoder layer, the last one with the product with the vocabulary."""
        share = language_share(division, self.config)
        layers = [_operations(*layer, share) for layer in self._language]
        rows = _even(self.config.text.vocab_size, division.mesh.tp) / division.mesh.cp
        layers[-1] = layers[-1] + self._head.scaled(rows)
        return layers


def _operations(layer: LayerFlops, back: _Back, share: Share) -> Operations:
    mlp = share.mlp * layer.mlp
    weights = share.queries * layer.queries + share.keys * layer.keys + mlp
    attention = share.attention * layer.attention
    again = {"nothing": 0.0, "mlp": mlp, "block": weights + attention}[back.again]
    return Operations(weights + attention, back.weights * weights + back.attention * attention, again)


def language_share(division: Division, config: ModelConfig) -> Share:
    """What a rank computes of a decoder layer; with heads that do not fall evenly it is more than one of its ranks."""
    heads, tp, cp = division.heads, division.mesh.tp, division.mesh.cp
    place = division.place("tp")
    queries, kv = heads.held("head", place, tp), heads.held("kv_head", place, tp)
    assert queries is not None and kv is not None, "heads are units of their own"
    attention = division.ulysses * len(shares_of(division)[0].queries) / heads.query
    return Share(
        len(queries[0]) / heads.query / cp,
        len(kv[0]) / heads.kv / cp,
        _even(config.text.intermediate_size, tp) / cp,
        attention / cp,
    )


def _even(size: int, ranks: int) -> float:
    """The largest share of an even split."""
    return math.ceil(size / ranks) / size


def _trained_shares(trained: Trained) -> dict[str, float]:
    """Of each block, and each parameter outside of one, in which anything is trained: how much of its matrices.

    Adapters are not counted.
    """
    every: Counter[str] = Counter()
    own: Counter[str] = Counter()
    touched = set()
    for owner, path, size in _matrices(trained):
        every[owner] += size
        own[owner] += size * (path in trained.paths)
    for path in trained.paths:
        touched.add(_owner(path))
    return {owner: own[owner] / every[owner] if every[owner] else 0.0 for owner in touched}


def _matrices(trained: Trained) -> Iterator[tuple[str, str, int]]:
    for path, shape in trained.shapes.items():
        if len(shape) > 1 and not is_adapter(path):
            yield _owner(path), path, math.prod(shape)


def _owner(path: str) -> str:
    patches = "visual.patch_embed"
    return patches if path.startswith(patches) else block_of(path) or path
