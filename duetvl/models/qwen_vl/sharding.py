"""How Qwen2-VL and Qwen2.5-VL are divided: the one table that loading, checkpoints, export and mm-convert ask.

Tensor parallelism is Megatron's (arXiv:1909.08053): a column-parallel layer is cut along its outputs (axis 0 of a
weight as it is stored), the row-parallel layer behind it along its inputs (axis 1); the bias of a row-parallel layer is
added after the sum over the ranks, so every rank has all of it. Embedding and head are cut along the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal

from duetvl.core.boxes import Box, Shape, Slices
from duetvl.core.stages import even_range
from duetvl.models.qwen_vl.config import ModelConfig

Unit = Literal["number", "head", "kv_head", "vision_head"]
Tower = Literal["vision", "language"]


@dataclass(frozen=True)
class Shard:
    """How a tensor is divided over the ranks of tensor parallelism.

    axis: the one that is cut; None: every rank has all of it. parts: how many tensors are stacked along it, each of
    which is cut ([q; k; v]). unit: what is never cut.
    """

    axis: int | None = None
    parts: int = 1
    unit: Unit = "number"


WHOLE: Final = Shard()
FEATURES: Final = "visual.merger.mlp.2"  # the layer that features come out of
_COLUMN, _ROW = 0, 1

# Path, `*` being the number of a layer, without its leaf -> how weight and bias of a column-parallel layer are cut.
_COLUMN_PARALLEL: Final[Mapping[str, Shard]] = {
    "visual.blocks.*.attn.qkv": Shard(_COLUMN, 3, "vision_head"),
    "visual.blocks.*.mlp.gate_proj": Shard(_COLUMN),
    "visual.blocks.*.mlp.up_proj": Shard(_COLUMN),
    "visual.blocks.*.mlp.fc1": Shard(_COLUMN),
    "visual.merger.mlp.0": Shard(_COLUMN),
    "model.embed_tokens": Shard(_COLUMN),
    "model.layers.*.self_attn.q_proj": Shard(_COLUMN, unit="head"),
    "model.layers.*.self_attn.k_proj": Shard(_COLUMN, unit="kv_head"),
    "model.layers.*.self_attn.v_proj": Shard(_COLUMN, unit="kv_head"),
    "model.layers.*.mlp.gate_proj": Shard(_COLUMN),
    "model.layers.*.mlp.up_proj": Shard(_COLUMN),
    "lm_head": Shard(_COLUMN),
}
# The same -> how the weight of a row-parallel layer is cut.
_ROW_PARALLEL: Final[Mapping[str, Shard]] = {
    "visual.blocks.*.attn.proj": Shard(_ROW, unit="vision_head"),
    "visual.blocks.*.mlp.down_proj": Shard(_ROW),
    "visual.blocks.*.mlp.fc2": Shard(_ROW),
    "visual.merger.mlp.2": Shard(_ROW),
    "model.layers.*.self_attn.o_proj": Shard(_ROW, unit="head"),
    "model.layers.*.mlp.down_proj": Shard(_ROW),
}
_LAYER: Final = re.compile(r"(visual\.blocks|model\.layers)\.(\d+)\.")
_LORA: Final = re.compile(r"(?P<module>.+)\.(?P<leaf>lora_A|lora_B|lora_magnitude_vector)\.weight")


@cache
def shard_of(path: str) -> Shard:
    """How the parameter of this path is divided, that of a low-rank adapter too.

    An adapter's A (rank, in) is cut where its layer is by inputs; B (out, rank) and DoRA's magnitudes (out,) where it
    is by outputs.
    """
    if adapter := _LORA.fullmatch(path):
        layer = shard_of(f"{adapter['module']}.weight")
        return layer if layer.axis == (_ROW if adapter["leaf"] == "lora_A" else _COLUMN) else WHOLE
    module, _, leaf = _LAYER.sub(r"\1.*.", path).rpartition(".")
    if module in _COLUMN_PARALLEL:
        return _COLUMN_PARALLEL[module]
    return _ROW_PARALLEL.get(module, WHOLE) if leaf == "weight" else WHOLE


@dataclass(frozen=True)
class Owner:
    """The stage of a pipeline that has a tensor: that of a layer of a tower, or of the first or last one it has."""

    tower: Tower
    layer: int | Literal["first", "last"]


@cache
def owner_of(path: str) -> Owner:
    """Who has the parameter of this path; a tied embedding, which serves as the head too, is the first stage's."""
    tower: Tower = "vision" if path.startswith("visual.") else "language"
    if match := _LAYER.match(path):
        return Owner(tower, int(match[2]))
    first = path.startswith(("visual.patch_embed.", "model.embed_tokens."))
    return Owner(tower, "first" if first else "last")


@cache
def block_of(path: str) -> str | None:
    """The path of the block that has a parameter: of what a tower runs again as one; None: it is in none of them."""
    if match := _LAYER.match(path):
        return f"{match[1]}.{match[2]}"
    return "visual.merger" if path.startswith("visual.merger.") else None


@dataclass(frozen=True)
class Heads:
    """Heads of attention in the language model and in the vision tower; `kv` of keys and values."""

    query: int
    kv: int
    vision: int

    @classmethod
    def of(cls, config: ModelConfig) -> Heads:
        """Those of a model."""
        return cls(config.text.num_heads, config.text.num_kv_heads, config.vision.num_heads)

    def held(self, unit: Unit, rank: int, ranks: int) -> tuple[range, int] | None:
        """(the units that a rank has, how many there are); None where numbers are divided one by one.

        Query heads are divided as evenly as can be, the first ranks having one more. A rank has every key and value
        head that one of its query heads needs, so that with more ranks than such heads each is held several times.
        """
        if unit == "number":
            return None
        if unit == "vision_head":
            return even_range(self.vision, rank, ranks), self.vision
        queries = even_range(self.query, rank, ranks)
        if unit == "head":
            return queries, self.query
        group = self.query // self.kv
        return range(queries.start // group, -(-queries.stop // group)), self.kv


def slices_of(path: str, shape: Shape, heads: Heads, rank: int, ranks: int) -> Slices:
    """The part of a parameter of this shape that one of `ranks` ranks of tensor parallelism has."""
    shard = shard_of(path)
    if shard.axis is None or ranks == 1:
        return Slices.whole(shape)
    length = shape[shard.axis] // shard.parts
    held = heads.held(shard.unit, rank, ranks)
    own = even_range(length, rank, ranks) if held is None else _scaled(held[0], length // held[1])
    boxes = []
    for part in range(shard.parts):
        offset, size = [0] * len(shape), list(shape)
        offset[shard.axis], size[shard.axis] = part * length + own.start, len(own)
        boxes.append(Box(tuple(offset), tuple(size)))
    return Slices(tuple(boxes), shard.axis)


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)
