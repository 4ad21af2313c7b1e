"""Every parameter of a model by its published name, with its shape; the parts that they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from duetvl.core.boxes import Shape
from duetvl.core.patterns import Parts
from duetvl.models.qwen_vl.config import ModelConfig, TextConfig, VisionConfig

# What `freeze` names, and the paths that belong to it; in the order of computation.
PARTS: Final[Parts] = {
    "vision": ("visual.patch_embed.", "visual.blocks."),
    "projector": ("visual.merger.",),
    "language": ("model.", "lm_head."),
}


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter by its name in published checkpoints, with its shape there.

    They come in the order of computation. `lm_head.weight` is absent where it is tied to the
    embedding.
    """
    shapes = dict(_vision_shapes(config.vision)) | dict(_text_shapes(config.text))
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.text.vocab_size, config.text.hidden_size)
    return shapes


def count_parameters(shapes: Mapping[str, Shape], prefix: str = "") -> int:
    """Numbers in all parameters whose names start with `prefix`."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _vision_shapes(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, merged = vision.hidden_size, vision.merged_size
    yield (
        "visual.patch_embed.proj.weight",
        (width, vision.channels, vision.temporal, vision.patch, vision.patch),
    )
    for layer in range(vision.depth):
        block = f"visual.blocks.{layer}"
        yield from _norm_shapes(f"{block}.norm1", vision)
        yield from _linear_shapes(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear_shapes(f"{block}.attn.proj", width, width)
        yield from _norm_shapes(f"{block}.norm2", vision)
        yield from _vision_mlp_shapes(f"{block}.mlp", vision)
    yield from _norm_shapes("visual.merger.ln_q", vision)
    yield from _linear_shapes("visual.merger.mlp.0", merged, merged)
    yield from _linear_shapes("visual.merger.mlp.2", vision.out_hidden_size, merged)


def _vision_mlp_shapes(name: str, vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, inner = vision.hidden_size, vision.intermediate_size
    gated = vision.mlp == "gated"
    for part in ("gate_proj", "up_proj") if gated else ("fc1",):
        yield from _linear_shapes(f"{name}.{part}", inner, width)
    yield from _linear_shapes(f"{name}.{'down_proj' if gated else 'fc2'}", width, inner)


def _norm_shapes(name: str, vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (vision.hidden_size,)
    if vision.norm == "layer_norm":
        yield f"{name}.bias", (vision.hidden_size,)


def _linear_shapes(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _text_shapes(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, kv_width = (
        text.hidden_size,
        text.intermediate_size,
        text.num_kv_heads * text.head_dim,
    )
    yield "model.embed_tokens.weight", (text.vocab_size, width)
    for layer in range(text.num_layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (width,)
        yield from _linear_shapes(f"{block}.self_attn.q_proj", width, width)
        yield from _linear_shapes(f"{block}.self_attn.k_proj", kv_width, width)
        yield from _linear_shapes(f"{block}.self_attn.v_proj", kv_width, width)
        yield from _linear_shapes(f"{block}.self_attn.o_proj", width, width, bias=False)
        yield f"{block}.post_attention_layernorm.weight", (width,)
        yield from _linear_shapes(f"{block}.mlp.gate_proj", inner, width, bias=False)
        yield from _linear_shapes(f"{block}.mlp.up_proj", inner, width, bias=False)
        yield from _linear_shapes(f"{block}.mlp.down_proj", width, inner, bias=False)
    yield "model.norm.weight", (width,)
