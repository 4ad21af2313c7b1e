"""The language model over packed tokens.

T tokens, D width, H heads, G key-value groups, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.models.linear import linear
from duetvl.models.qwen_vl.config import TextConfig

Tensor = Any
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q, k, v) -> out (T, H, K)


@dataclass(frozen=True, eq=False)
class Positions:
    """Rotary tables (T, K / 2) of the tokens in a pass."""

    cos: Tensor
    sin: Tensor


def decoder(ops: Ops, config: TextConfig, w: Weights, x_TD: Tensor, at: Positions, attend: Attend) -> Tensor:
    """All layers, before the final norm: (T, D) -> (T, D)."""
    for layer in range(config.num_layers):
        x_TD = decoder_layer(ops, config, w.layers[layer], x_TD, at, lambda q, k, v, n=layer: attend(n, q, k, v))
    return x_TD


def decoder_layer(
    ops: Ops, config: TextConfig, w: Weights, x_TD: Tensor, at: Positions, attend: Callable[..., Tensor]
) -> Tensor:
    """Pre-norm attention and SwiGLU."""
    h = ops.rms_norm(x_TD, w.input_layernorm.weight, eps=config.norm_eps)
    x_TD = x_TD + self_attention(ops, config, w.self_attn, h, at, attend)
    h = ops.rms_norm(x_TD, w.post_attention_layernorm.weight, eps=config.norm_eps)
    gate, up = linear(ops, w.mlp.gate_proj, h), linear(ops, w.mlp.up_proj, h)
    return x_TD + linear(ops, w.mlp.down_proj, ops.swiglu(gate, up))


def self_attention(
    ops: Ops, config: TextConfig, w: Weights, x_TD: Tensor, at: Positions, attend: Callable[..., Tensor]
) -> Tensor:
    """Grouped-query attention with rotary positions; `attend` decides who sees whom, and may cache."""
    q, k, v = (
        ops.reshape(linear(ops, projection, x_TD), (x_TD.shape[0], -1, config.head_dim))
        for projection in (w.q_proj, w.k_proj, w.v_proj)
    )
    out = attend(ops.rope(q, at.cos, at.sin), ops.rope(k, at.cos, at.sin), v)
    return linear(ops, w.o_proj, ops.reshape(out, (x_TD.shape[0], -1)))
