"""What each operation should give, written plainly on float64 torch tensors; none of our code is used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

torch = pytest.importorskip("torch")

Tensor = torch.Tensor


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return condition * a + ~condition * b


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def quick_gelu(x: Tensor) -> Tensor:
    return x * sigmoid(1.702 * x)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * scale


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * scale + bias


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = []
    for head in range(x.shape[1]):
        a, b = x[:, head].chunk(2, -1)
        heads.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
    return torch.stack(heads, 1)


def scatter_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    where_from = dict(zip(index.tolist(), range(len(index)), strict=True))
    picked = [rows[where_from[t]] if t in where_from else x[t] for t in range(x.shape[0])]
    return torch.stack(picked) if picked else x


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return torch.stack([flat[i, n] for i, n in enumerate(index.reshape(-1).tolist())]).reshape(index.shape)


def dropout_factor(shape: Sequence[int], p: float, key: Sequence[int], rows: Sequence[int], column: int) -> np.ndarray:
    """0 or 1 / (1 - p) for each element, by counter_hash.py's text in Python's own integers."""
    columns = shape[-1]
    factors = [dropout_element(row, column + n, p, key) for row in rows for n in range(columns)]
    return np.array(factors, np.float64).reshape(shape)


def dropout_element(row: int, column: int, p: float, key: Sequence[int]) -> float:
    x = element_bits(row, column, key)
    signed = x - (1 << 32) if x >> 31 else x
    return 1 / (1 - p) if signed >= round(p * 2**32) - 2**31 else 0.0


def element_bits(row: int, column: int, key: Sequence[int]) -> int:
    word = (1 << 32) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = (x ^ x >> 15) * 0x846CA68B & word
        return x ^ x >> 16

    def fold(lane: int) -> int:
        s = 0
        for n in (lane, *key):
            for part in (n & word, n >> 32):
                s = mix((s + 0x9E3779B9 & word) ^ part)
        return s

    a, b = (mix(fold(lane) ^ row & word) for lane in (1, 2))
    x = column ^ a
    x = ((x ^ x >> 16) * 0x7FEB352D + b) & word
    x = (x ^ x >> 15) * 0x846CA68B & word
    return x ^ x >> 16


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, keys: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    heads, groups = q.shape[1], k.shape[1]
    outs, lses, start, key_start = [], [], 0, 0
    for length, count in zip(lengths, lengths if keys is None else keys, strict=True):
        rows, cols = slice(start, start + length), slice(key_start, key_start + count)
        start, key_start = start + length, key_start + count
        hidden = torch.ones(length, count, dtype=torch.bool).triu(1 + count - length) & causal
        by_head = [
            one_head(q[rows, h], k[cols, h * groups // heads], v[cols, h * groups // heads], hidden)
            for h in range(heads)
        ]
        outs.append(torch.stack([out for out, _ in by_head], 1))
        lses.append(torch.stack([lse for _, lse in by_head], 0))
    if not outs:
        return q * 1, q.new_zeros(heads, 0)
    return torch.cat(outs, 0), torch.cat(lses, 1)


def one_head(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row what it sees: 0 and -inf where that is nothing."""
    outs, lses = [], []
    for i in range(q.shape[0]):
        seen = ~hidden[i]
        scores = k[seen] @ q[i] / math.sqrt(q.shape[-1])
        outs.append(torch.softmax(scores, -1) @ v[seen])
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outs) if outs else q * 1, torch.stack(lses) if lses else q.new_zeros(0)


def attention_cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last rows of one sequence: q (N, H, K) against k and v (M, G, K)."""
    new, rows, heads, groups = q.shape[0], k.shape[0], q.shape[1], k.shape[1]
    hidden = torch.ones(new, rows, dtype=torch.bool).triu(rows - new + 1)
    return torch.stack(
        [one_head(q[:, h], k[:, h * groups // heads], v[:, h * groups // heads], hidden)[0] for h in range(heads)], 1
    )


def linear_logprobs(h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = h @ weight.T
    lse = torch.logsumexp(logits, -1)
    return logits[torch.arange(len(labels)), labels.long()] - lse, lse


def linear_logprobs_grad(
    dlogp: Tensor, h: Tensor, weight: Tensor, labels: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    one_hot = (labels.long()[:, None] == torch.arange(len(weight))).double()
    dlogits = dlogp[:, None] * (one_hot - torch.exp(h @ weight.T - lse[:, None]))
    return dlogits @ weight, dlogits.T @ h


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    losses = -linear_logprobs(h, weight, labels)[0]
    return (losses if weights is None else losses * weights).sum()


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values that a tensor of this dtype holds, as float64."""
    return torch.tensor(array).to(getattr(torch, dtype)).double().numpy()
