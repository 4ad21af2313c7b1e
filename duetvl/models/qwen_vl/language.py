"""The language model over packed tokens.

T tokens, D width, H heads, G key-value groups, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.models.attention import Attend
from duetvl.models.layout import ALL_HERE, Rows, gathered
from duetvl.models.linear import linear
from duetvl.models.qwen_vl.config import TextConfig
from duetvl.models.recompute import KEEP, Recompute

Tensor = Any


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the tokens of a pass bring to every layer: rotary tables (T, K / 2), and who sees whom.

    `attend` may keep a cache; `recompute` says what is run again in the backward pass; `rows` is how their rows lie on
    ranks that divide the layers.
    """

    cos: Tensor
    sin: Tensor
    attend: Attend
    recompute: Recompute = KEEP
    rows: Rows = ALL_HERE


def place_features(ops: Ops, x_TD: Tensor, dst: Tensor, features: Tensor) -> Tensor:
    """Put features (V, D) of pictures and videos in the places dst (V,) of their placeholder tokens."""
    return ops.scatter_rows(x_TD, dst, features)


def decoder_layers(ops: Ops, config: TextConfig, w: Weights, tokens: Tokens, layers: range, x_TD: Tensor) -> Tensor:
    """Some layers one after the other: (T, D) -> (T, D). The final norm is not among them."""
    for layer in layers:
        run = partial(decoder_layer, ops, config, w.layers[layer], tokens, layer)
        x_TD = tokens.recompute.block(run, x_TD)
    return x_TD


def decoder_layer(ops: Ops, config: TextConfig, w: Weights, tokens: Tokens, layer: int, x_TD: Tensor) -> Tensor:
    """Pre-norm attention and SwiGLU."""
    w = gathered(w)
    h = tokens.rows.enter(ops.rms_norm(x_TD, w.input_layernorm.weight, eps=config.norm_eps))
    x_TD = x_TD + self_attention(ops, config, w.self_attn, tokens, layer, h)
    return x_TD + tokens.recompute.mlp(partial(mlp, ops, config, w, tokens), x_TD)


def mlp(ops: Ops, config: TextConfig, w: Weights, tokens: Tokens, x_TD: Tensor) -> Tensor:
    """SwiGLU of a layer, with the norm before it."""
    h = tokens.rows.enter(ops.rms_norm(x_TD, w.post_attention_layernorm.weight, eps=config.norm_eps))
    gate, up = linear(ops, w.mlp.gate_proj, h), linear(ops, w.mlp.up_proj, h)
    return linear(ops, w.mlp.down_proj, ops.swiglu(gate, up))


def self_attention(ops: Ops, config: TextConfig, w: Weights, tokens: Tokens, layer: int, x_TD: Tensor) -> Tensor:
    """Grouped-query attention with rotary positions."""
    q, k, v = (
        heads_of(ops, linear(ops, projection, x_TD), config.head_dim) for projection in (w.q_proj, w.k_proj, w.v_proj)
    )
    q, k = ops.rope(q, tokens.cos, tokens.sin), ops.rope(k, tokens.cos, tokens.sin)
    out = tokens.attend(layer, q, k, v)
    return linear(ops, w.o_proj, ops.reshape(out, (out.shape[0], out.shape[1] * config.head_dim)))


def heads_of(ops: Ops, x: Tensor, size: int) -> Tensor:
    """(T, H * K) -> (T, H, K), also of no rows."""
    return ops.reshape(x, (x.shape[0], x.shape[1] // size, size))
