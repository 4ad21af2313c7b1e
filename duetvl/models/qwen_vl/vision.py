"""The vision tower over packed patches: images and videos of a batch in one pass.

P patches, M merged rows (P / merge^2), D width, H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.core.spans import Spans
from duetvl.models.linear import linear
from duetvl.models.qwen_vl.config import VisionConfig
from duetvl.models.qwen_vl.host import VisionTables
from duetvl.models.recompute import KEEP, Recompute

Tensor = Any


@dataclass(frozen=True, eq=False)
class VisionInput:
    """Patch rows (P, C) in the tower's order, rotary tables (P, K / 2), and who attends to whom.

    `recompute` says what is run again on the way back.
    """

    pixels: Tensor
    cos: Tensor
    sin: Tensor
    frame_spans: Spans
    window_spans: Spans
    recompute: Recompute = KEEP


def vision_input(ops: Ops, pixel_rows: np.ndarray, tables: VisionTables, dtype: str) -> VisionInput:
    """Move a batch's patches to the device, in window order."""
    rows = pixel_rows if tables.order is None else pixel_rows[tables.order]
    return VisionInput(
        pixels=ops.from_numpy(rows, dtype),
        cos=ops.from_numpy(tables.cos),
        sin=ops.from_numpy(tables.sin),
        frame_spans=tables.frame_spans,
        window_spans=tables.window_spans,
    )


def vision_tower(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput) -> Tensor:
    """Merged features (M, out_hidden_size), still in the tower's order."""
    kernel = w.patch_embed.proj.weight
    x_PD = ops.linear(given.pixels, ops.reshape(kernel, (config.hidden_size, config.patch_row)))
    for layer in range(config.depth):
        spans = given.frame_spans if config.sees_frame(layer) else given.window_spans
        x_PD = given.recompute.block(partial(vision_block, ops, config, w.blocks[layer], given, spans), x_PD)
    x_PD = norm(ops, config, w.merger.ln_q, x_PD)
    merged = ops.reshape(x_PD, (-1, config.merged_size))
    return linear(ops, w.merger.mlp[2], ops.gelu(linear(ops, w.merger.mlp[0], merged)))


def vision_block(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, spans: Spans, x_PD: Tensor) -> Tensor:
    """Pre-norm attention and MLP; `spans` bounds who may attend to whom."""
    x_PD = x_PD + attend(ops, config, w.attn, norm(ops, config, w.norm1, x_PD), given, spans)
    return x_PD + given.recompute.mlp(lambda x: mlp(ops, config, w.mlp, norm(ops, config, w.norm2, x)), x_PD)


def attend(ops: Ops, config: VisionConfig, w: Weights, x_PD: Tensor, given: VisionInput, spans: Spans) -> Tensor:
    """Self-attention with rotary positions of height and width."""
    width, shape = config.hidden_size, (-1, config.num_heads, config.head_dim)
    q, k, v = (ops.reshape(part, shape) for part in ops.split(linear(ops, w.qkv, x_PD), [width] * 3, 1))
    q, k = ops.rope(q, given.cos, given.sin), ops.rope(k, given.cos, given.sin)
    out, _ = ops.attention(q, k, v, spans)
    return linear(ops, w.proj, ops.reshape(out, (-1, width)))


def norm(ops: Ops, config: VisionConfig, w: Weights, x: Tensor) -> Tensor:
    """The norm that the configuration names."""
    if config.norm == "rms_norm":
        return ops.rms_norm(x, w.weight, eps=config.norm_eps)
    return ops.layer_norm(x, w.weight, w.bias, eps=config.norm_eps)


def mlp(ops: Ops, config: VisionConfig, w: Weights, x: Tensor) -> Tensor:
    """SwiGLU, or two layers with an activation between, as the configuration names it."""
    if config.mlp == "gated":
        return linear(ops, w.down_proj, ops.swiglu(linear(ops, w.gate_proj, x), linear(ops, w.up_proj, x)))
    return linear(ops, w.fc2, getattr(ops, config.activation)(linear(ops, w.fc1, x)))
