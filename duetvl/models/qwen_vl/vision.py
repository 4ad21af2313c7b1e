"""The vision tower over packed patches: images and videos of a batch in one pass.

P patches, M merged rows (P / merge^2), D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.models.attention import Attend
from duetvl.models.layout import gathered, stay
from duetvl.models.linear import linear
from duetvl.models.qwen_vl.config import VisionConfig
from duetvl.models.recompute import KEEP, Recompute

Tensor = Any

# of an MLP that is not gated: `hidden_act` in config.json -> the function
ACTIVATIONS: Final[Mapping[str, Callable[[Ops, Tensor], Tensor]]] = {
    "gelu": lambda ops, x: ops.gelu(x),
    "quick_gelu": lambda ops, x: ops.quick_gelu(x),
}


@dataclass(frozen=True, eq=False)
class VisionInput:
    """Patch rows (P, C) in the tower's order, rotary tables (P, K / 2), and who sees whom.

    `recompute` says what is run again in the backward pass; `enter` is where layers divided over ranks begin. Of some
    frames of a batch, `rows` (P,) and `merged_rows` (M,) are the numbers of their rows among those of all.
    """

    pixels: Tensor
    cos: Tensor
    sin: Tensor
    attend: Attend
    rows: np.ndarray | None = None
    merged_rows: np.ndarray | None = None
    recompute: Recompute = KEEP
    enter: Callable[[Tensor], Tensor] = stay


def patch_embedding(ops: Ops, config: VisionConfig, w: Weights, pixels: Tensor) -> Tensor:
    """Patch rows (P, C) -> (P, D): the convolution as a product, as its stride is its kernel."""
    return ops.linear(pixels, ops.reshape(w.proj.weight, (-1, config.patch_row)))


def vision_blocks(
    ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, blocks: range, x_PD: Tensor
) -> Tensor:
    """Some blocks one after the other: (P, D) -> (P, D)."""
    for block in blocks:
        run = partial(vision_block, ops, config, w.blocks[block], given, block)
        x_PD = given.recompute.block(run, x_PD)
    return x_PD


def merger(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, x_PD: Tensor) -> Tensor:
    """Neighbouring patches (P, D) as one token each: (M, out_hidden_size)."""
    return given.recompute.block(partial(_merged, ops, config, w.taken(), given), x_PD)


def _merged(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, x_PD: Tensor) -> Tensor:
    w = gathered(w)
    merged = given.enter(ops.reshape(norm(ops, config, w.ln_q, x_PD), (-1, config.merged_size)))
    return linear(ops, w.mlp[2], ops.gelu(linear(ops, w.mlp[0], merged)))


def vision_block(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, block: int, x_PD: Tensor) -> Tensor:
    """Pre-norm attention and MLP."""
    w = gathered(w)
    h = given.enter(norm(ops, config, w.norm1, x_PD))
    x_PD = x_PD + self_attention(ops, config, w.attn, given, block, h)

    def mlp_after_norm(x: Tensor) -> Tensor:
        return mlp(ops, config, w.mlp, given.enter(norm(ops, config, w.norm2, x)))

    return x_PD + given.recompute.mlp(mlp_after_norm, x_PD)


def self_attention(ops: Ops, config: VisionConfig, w: Weights, given: VisionInput, block: int, x_PD: Tensor) -> Tensor:
    """Attention with rotary positions of height and width."""
    qkv = linear(ops, w.qkv, x_PD)
    patches, width = qkv.shape[0], qkv.shape[1] // 3
    parts = ops.split(qkv, [width] * 3, 1)
    q, k, v = (ops.reshape(part, (patches, width // config.head_dim, config.head_dim)) for part in parts)
    q, k = ops.rope(q, given.cos, given.sin), ops.rope(k, given.cos, given.sin)
    out = given.attend(block, q, k, v)
    return linear(ops, w.proj, ops.reshape(out, (patches, width)))


def norm(ops: Ops, config: VisionConfig, w: Weights, x: Tensor) -> Tensor:
    """The norm that the configuration names."""
    if config.norm == "rms_norm":
        return ops.rms_norm(x, w.weight, eps=config.norm_eps)
    return ops.layer_norm(x, w.weight, w.bias, eps=config.norm_eps)


def mlp(ops: Ops, config: VisionConfig, w: Weights, x: Tensor) -> Tensor:
    """SwiGLU, or two layers with an activation between, as the configuration names it."""
    if config.mlp == "gated":
        return linear(ops, w.down_proj, ops.swiglu(linear(ops, w.gate_proj, x), linear(ops, w.up_proj, x)))
    return linear(ops, w.fc2, ACTIVATIONS[config.activation](ops, linear(ops, w.fc1, x)))
