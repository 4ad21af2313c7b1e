"""How many operations a micro-batch asks for, counted from the configuration.

A product of (n, k) and (k, m) is 2 n k m operations. Counted are the products with weights and those inside attention,
causal where it is causal, windows where there are windows; norms, activations and the optimizer are not. Only tokens
whose next one is trained meet the vocabulary. Nothing is counted twice because it is recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def forward_flops(config: ModelConfig, batch: Batch) -> dict[str, PartFlops]:
    """Operations of one pass forward, by part of the model, in the order of computation."""
    vision, text = config.vision, config.text
    patches, merged = len(batch.pixel_rows), len(batch.pixel_rows) // vision.merge**2
    attended = sum(_attended_pairs(vision, layer, batch.grids) for layer in range(vision.depth))
    lengths = np.diff(batch.cu_seqlens).astype(np.int64)
    causal_pairs = int((lengths * (lengths + 1) // 2).sum())
    return {
        "vision": PartFlops(
            2.0 * patches * _vision_weights(vision),
            4.0 * vision.hidden_size * attended,
            2.0 * patches * vision.patch_row * vision.hidden_size,
        ),
        "projector": PartFlops(2.0 * merged * vision.merged_size * (vision.merged_size + vision.out_hidden_size)),
        "language": PartFlops(
            2.0 * (batch.tokens * _text_weights(text) + batch.trained_tokens * text.hidden_size * text.vocab_size),
            4.0 * text.num_layers * text.num_heads * text.head_dim * causal_pairs,
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


def _vision_weights(vision: VisionConfig) -> int:
    """Numbers in the weights of the blocks, which every patch meets."""
    width = vision.hidden_size
    mlp = (3 if vision.mlp == "gated" else 2) * width * vision.intermediate_size
    return vision.depth * (4 * width**2 + mlp)


def _text_weights(text: TextConfig) -> int:
    """Numbers in the weights of the layers, which every token meets."""
    heads, groups = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention = text.hidden_size * (2 * heads + 2 * groups)
    return text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


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
