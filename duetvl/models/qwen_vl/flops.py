"""How many operations a micro-batch asks for, counted from the configuration.

A product of (n, k) and (k, m) is 2 n k m operations. Counted are the products with weights and those inside attention,
causal where it is causal, windows where there are windows; norms, activations and the optimizer are not. Only tokens
whose next one is trained meet the vocabulary. Nothing is counted twice because it is recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from duetvl.core.batch import Batch
from duetvl.core.boxes import Shape
from duetvl.models.qwen_vl.config import ModelConfig, TextConfig, VisionConfig
from duetvl.models.qwen_vl.parameters import PARTS


@dataclass(frozen=True)
class PartFlops:
    """One pass forward through a part: products with weights, those inside attention, and those of pixels."""

    weights: float
    attention: float = 0.0
    pixels: float = 0.0


@dataclass(frozen=True)
class Amounts:
    """What a micro-batch asks a model for, as far as operations depend on it.

    trained: tokens whose next one is trained. pairs: of a token and one that it sees; attended: the same of patches, in
    each layer of the vision tower.
    """

    tokens: float
    trained: float
    patches: float
    pairs: float
    attended: tuple[float, ...]

    @classmethod
    def of(cls, config: ModelConfig, batch: Batch) -> Amounts:
        """Those of a batch."""
        counts = batch.tokens, batch.trained_tokens, len(batch.pixel_rows)
        return cls.of_sizes(config, *counts, np.diff(batch.cu_seqlens).tolist(), batch.grids)

    @classmethod
    def of_sizes(
        cls,
        config: ModelConfig,
        tokens: float,
        trained: float,
        patches: float,
        lengths: Sequence[int],
        grids: np.ndarray,
    ) -> Amounts:
        """From the lengths of sequences, and grids (N, 3) of pictures and videos."""
        vision = config.vision
        attended = (float(_attended_pairs(vision, layer, grids)) for layer in range(vision.depth))
        return cls(tokens, trained, patches, sum(n * (n + 1) // 2 for n in lengths), tuple(attended))

    def scaled(self, share: float) -> Amounts:
        """Of a share of the same samples."""
        tokens, trained, patches, pairs = (share * one for one in (self.tokens, self.trained, self.patches, self.pairs))
        return Amounts(tokens, trained, patches, pairs, tuple(share * one for one in self.attended))


@dataclass(frozen=True)
class LayerFlops:
    """One pass forward through a layer, by what it falls with: query heads, key and value heads, the MLP's columns."""

    queries: float
    keys: float
    mlp: float
    attention: float

    @property
    def weights(self) -> float:
        """All products with weights."""
        return self.queries + self.keys + self.mlp


def language_layer(text: TextConfig, amounts: Amounts) -> LayerFlops:
    """Of a decoder layer; they are alike."""
    heads, groups = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    row = 2.0 * amounts.tokens * text.hidden_size
    return LayerFlops(row * 2 * heads, row * 2 * groups, row * 3 * text.intermediate_size, 4.0 * heads * amounts.pairs)


def vision_layer(vision: VisionConfig, amounts: Amounts, layer: int) -> LayerFlops:
    """Of a block of the vision tower."""
    width = vision.hidden_size
    row = 2.0 * amounts.patches * width
    mlp = (3 if vision.mlp == "gated" else 2) * vision.intermediate_size
    return LayerFlops(row * 2 * width, row * 2 * width, row * mlp, 4.0 * width * amounts.attended[layer])


def pixel_flops(vision: VisionConfig, amounts: Amounts) -> float:
    """Of the patch embedding."""
    return 2.0 * amounts.patches * vision.patch_row * vision.hidden_size


def merger_flops(vision: VisionConfig, amounts: Amounts) -> float:
    """Of the projector behind the vision tower."""
    merged = amounts.patches / vision.merge**2
    return 2.0 * merged * vision.merged_size * (vision.merged_size + vision.out_hidden_size)


def vocabulary_flops(text: TextConfig, amounts: Amounts) -> float:
    """Of the last product."""
    return 2.0 * amounts.trained * text.hidden_size * text.vocab_size


def forward_flops(config: ModelConfig, batch: Batch) -> dict[str, PartFlops]:
    """Operations of one pass forward, by part of the model, in the order of computation."""
    vision, text, amounts = config.vision, config.text, Amounts.of(config, batch)
    blocks = [vision_layer(vision, amounts, layer) for layer in range(vision.depth)]
    layer = language_layer(text, amounts)
    return {
        "vision": PartFlops(
            sum(block.weights for block in blocks),
            sum(block.attention for block in blocks),
            pixel_flops(vision, amounts),
        ),
        "projector": PartFlops(merger_flops(vision, amounts)),
        "language": PartFlops(
            text.num_layers * layer.weights + vocabulary_flops(text, amounts), text.num_layers * layer.attention
        ),
    }


def inference_flops(config: ModelConfig, batch: Batch) -> float:
    """Operations of one pass forward alone."""
    return sum(cost.weights + cost.attention + cost.pixels for cost in forward_flops(config, batch).values())


class Weight(Protocol):
    """A parameter as far as it is counted."""

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        ...

    @property
    def trainable(self) -> bool:
        """Whether it is trained."""
        ...


def training_flops(config: ModelConfig, parameters: Mapping[str, Weight], batch: Batch) -> float:
    """Operations of one pass forward and backward of a model with all these parameters.

    Backward, a product asks for the gradient of its input where one flows there (never to pixels), and for that of its
    weight where that is trained; adapters themselves are not counted, what flows through their part is.
    """
    total, flows = 0.0, False  # gradients flow through a part where it or one before it is trained
    for part, cost in forward_flops(config, batch).items():
        own = {path: p for path, p in parameters.items() if path.startswith(PARTS[part])}
        flows = flows or any(p.trainable for p in own.values())
        share = _trained_share(own)
        total += cost.weights * (1 + flows + share) + cost.attention * (1 + 2 * flows) + cost.pixels * (1 + share)
    return total


def _trained_share(parameters: Mapping[str, Weight]) -> float:
    """Of the weights that are matrices, how many are trained."""
    matrices = [p for path, p in parameters.items() if len(p.shape) > 1 and "lora_" not in path]
    sizes = [(float(np.prod(p.shape)), p.trainable) for p in matrices]
    return sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)


def _attended_pairs(vision: VisionConfig, layer: int, grids: np.ndarray) -> int:
    """Pairs of patches that see each other: all of a frame, or of a window."""
    unit = vision.merge**2
    pairs = 0
    for frames, height, width in np.asarray(grids).tolist():
        rows, columns = height // vision.merge, width // vision.merge
        side = max(rows, columns, 1) if vision.window is None or vision.sees_frame(layer) else vision.window_merged
        pairs += frames * unit**2 * _squares(rows, side) * _squares(columns, side)
    return pairs


def _squares(length: int, side: int) -> int:
    """Sum of the squared lengths of the pieces that `side` cuts a length into."""
    whole, rest = divmod(length, side)
    return whole * side**2 + rest**2
