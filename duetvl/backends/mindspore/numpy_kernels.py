"""Float32 kernels in numpy, over views of MindSpore's CPU tensors.

MindSpore's CPU kernels broadcast one element at a time (x * scale of half a million numbers takes 2 to 4 ms, numpy
0.2 ms), its batched product wants its operands copied into place, and its matrix product keeps a kernel of 0.3 MB for
every shape it has met, which lengths that vary from step to step turn into a leak. numpy works on strided views, in
place, and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from duetvl.backends.mindspore.matrix_product import product, products
from duetvl.core.spans import EqualSpans, Spans

Array = np.ndarray

BLOCK_SCORES = 1 << 21  # numbers in a block of attention scores (8 MB): what two cores' caches take
ADAM_BLOCK = 1 << 15  # numbers of each array in an update's block: 128 KB, so that four of them stay in the cache
CAUSAL_ROWS = 128  # query rows in a causal block: beyond the diagonal nothing is computed


def linear(x: Array, weight: Array) -> Array:
    """x W^T of x (N, I) and weight (O, I)."""
    return product(x, weight.T)


def linear_grad(d: Array, x: Array, weight: Array, needs: tuple[bool, ...]) -> tuple[Array | None, ...]:
    """Gradients of x W^T + b to x (N, I), weight (O, I) and, where `needs` has a third entry, bias (O,)."""
    dx = product(d, weight) if needs[0] else None
    dweight = product(d.T, x) if needs[1] else None
    dbias = tuple(d.sum(0) if needed else None for needed in needs[2:])
    return (dx, dweight, *dbias)


def adamw(
    weight: Array, m: Array, v: Array, gradient: Array, *, scale: float, rate: float, decay: float,
    betas: tuple[float, float], eps: float, step: int,
) -> None:  # fmt: skip
    """One AdamW update in place, torch's formula; flat arrays, a cache's worth at a time."""
    correction1, correction2 = 1.0 - betas[0] ** step, 1.0 - betas[1] ** step
    for start in range(0, weight.size, ADAM_BLOCK):
        w, first, second, g = (x[start : start + ADAM_BLOCK] for x in (weight, m, v, gradient))
        g = g * np.float32(scale)
        w *= np.float32(1.0 - rate * decay)
        first *= np.float32(betas[0])
        first += np.float32(1.0 - betas[0]) * g
        second *= np.float32(betas[1])
        g *= g
        g *= np.float32(1.0 - betas[1])
        second += g
        np.sqrt(second, out=g)
        g *= np.float32(correction2**-0.5)
        g += np.float32(eps)
        np.divide(first, g, out=g)
        g *= np.float32(rate / correction1)
        w -= g


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """The two halves of each head of x (T, H, K) turned by the angles in cos and sin (T, K / 2)."""
    half = x.shape[-1] // 2
    a, b = x[:, :, :half], x[:, :, half:]
    cos, sin = cos[:, None, :], sin[:, None, :]
    y = np.empty(x.shape, np.float32)
    first, second = y[:, :, :half], y[:, :, half:]
    np.multiply(a, cos, out=first)
    first -= b * sin
    np.multiply(b, cos, out=second)
    second += a * sin
    return y


def swiglu(gate: Array, up: Array) -> Array:
    """gate * sigmoid(gate) * up"""
    y = _sigmoid(gate)
    y *= gate
    y *= up
    return y


def swiglu_grad(d: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Gradients to gate and up."""
    s = _sigmoid(gate)
    silu = gate * s
    dup = d * silu
    silu *= 1 - s
    silu += s
    silu *= up
    silu *= d
    return silu, dup


def rms_norm(x: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    """y (N, D), and 1 / root mean square (N, 1)."""
    inverse = _inverse_root(x, eps)
    y = x * inverse
    y *= scale
    return y, inverse


def rms_norm_grad(d: Array, x: Array, scale: Array, inverse: Array) -> tuple[Array, Array]:
    """Gradients to x (N, D) and scale (D,)."""
    unit = x * inverse
    dscale = np.einsum("nd,nd->d", d, unit)
    g = d * scale
    unit *= _mean_product(g, unit)
    g -= unit
    g *= inverse
    return g, dscale


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """y (N, D), x scaled to mean 0 and variance 1 (N, D), and 1 / standard deviation (N, 1)."""
    unit = x - x.mean(-1, keepdims=True)
    inverse = _inverse_root(unit, eps)
    unit *= inverse
    y = unit * scale
    y += bias
    return y, unit, inverse


def layer_norm_grad(d: Array, unit: Array, scale: Array, inverse: Array) -> tuple[Array, Array, Array]:
    """Gradients to x (N, D), scale (D,) and bias (D,)."""
    dscale, dbias = np.einsum("nd,nd->d", d, unit), d.sum(0)
    g = d * scale
    correction = unit * _mean_product(g, unit)
    correction += g.mean(-1, keepdims=True)
    g -= correction
    g *= inverse
    return g, dscale, dbias


def attention(q: Array, k: Array, v: Array, spans: Spans) -> tuple[Array, Array]:
    """out (T, H, K) and lse (H, T) of softmax attention inside spans that all see something (`Spans.seeing`)."""
    out = np.empty(q.shape, np.float32)
    lse = np.empty((q.shape[1], q.shape[0]), np.float32)
    scale, groups = np.float32(q.shape[-1] ** -0.5), k.shape[1]
    for run in blocks_of_spans(spans, q.shape[1]):
        qs, outs = (_queries(x, run, groups) for x in (q, out))
        ks, vs = (_keys(x, run) for x in (k, v))
        lses = _lse_by_head(lse, run, groups)
        for a, b, end in query_rows(run, q.shape[1], spans.causal):
            p = _scores(_stacked(qs[..., a:b, :]) * scale, ks[..., :end, :], b - a, spans.causal)
            top = p.max(-1, keepdims=True)
            p -= top
            np.exp(p, out=p)
            total = p.sum(-1, keepdims=True)
            block = outs[..., a:b, :]
            block[:] = (products(p, vs[..., :end, :]) / total).reshape(block.shape)
            lses[..., a:b] = (top + np.log(total)).reshape(lses[..., a:b].shape)
    return out, lse


def attention_of_last(q: Array, k: Array, v: Array, out: Array) -> None:
    """Write into out what q (N, H, K), the last N rows of a sequence, see of all its rows, k and v (M, G, K)."""
    if len(q) > 1:
        out[:] = attention(q, k, v, Spans.of_lengths([len(q)], [len(k)], causal=True))[0]
        return
    by_group = (k.shape[1], -1, q.shape[2])  # the heads of a group are rows of one product
    p = np.matmul(q.reshape(by_group) * np.float32(q.shape[2] ** -0.5), k.transpose(1, 2, 0))
    p -= p.max(-1, keepdims=True)
    np.exp(p, out=p)
    total = p.sum(-1, keepdims=True)
    np.divide(np.matmul(p, v.transpose(1, 0, 2)), total, out=out.reshape(by_group))


def attention_grad(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, spans: Spans
) -> tuple[Array, Array, Array]:
    """Gradients to q, k and v; scores are recomputed from lse, block by block."""
    dq = np.empty(q.shape, np.float32)
    dk, dv = np.zeros(k.shape, np.float32), np.zeros(v.shape, np.float32)
    delta = np.ascontiguousarray(np.einsum("thk,thk->ht", dout, out))
    scale, groups = np.float32(q.shape[-1] ** -0.5), k.shape[1]
    for run in blocks_of_spans(spans, q.shape[1]):
        qs, douts, dqs = (_queries(x, run, groups) for x in (q, dout, dq))
        ks, vs, dks, dvs = (_keys(x, run) for x in (k, v, dk, dv))
        lses, deltas = (_lse_by_head(x, run, groups)[..., None] for x in (lse, delta))
        for a, b, end in query_rows(run, q.shape[1], spans.causal):
            scaled, d = _stacked(qs[..., a:b, :]) * scale, _stacked(douts[..., a:b, :])
            p = _scores(scaled, ks[..., :end, :], b - a, spans.causal)
            p -= _stacked(lses[..., a:b, :])
            np.exp(p, out=p)
            dvs[..., :end, :] += products(p.swapaxes(-1, -2), d)
            ds = products(d, vs[..., :end, :].swapaxes(-1, -2))
            ds -= _stacked(deltas[..., a:b, :])
            ds *= p
            block = dqs[..., a:b, :]
            np.multiply(products(ds, ks[..., :end, :]).reshape(block.shape), scale, out=block)
            dks[..., :end, :] += products(ds.swapaxes(-1, -2), scaled)
    return dq, dk, dv


def blocks_of_spans(spans: Spans, heads: int) -> Iterator[EqualSpans]:
    """The runs of `spans`, cut so that the scores of whole spans stay within BLOCK_SCORES where they can."""
    for run in spans.runs:
        count = max(1, BLOCK_SCORES // (heads * run.length * run.keys))
        for first in range(0, run.count, count):
            start, key_start = run.start + first * run.length, run.key_start + first * run.keys
            yield EqualSpans(start, min(count, run.count - first), run.length, key_start, run.keys)


def query_rows(run: EqualSpans, heads: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, keys seen) of blocks of query rows."""
    size = max(16, BLOCK_SCORES // (run.count * heads * run.keys))
    size = min(size, CAUSAL_ROWS) if causal else size
    for a in range(0, run.length, size):
        b = min(run.length, a + size)
        yield a, b, (b + run.shift if causal else run.keys)


def _scores(q: Array, k: Array, rows: int, causal: bool) -> Array:
    """(B, G, R * rows, keys): products of scaled queries and keys, minus infinity where a causal row may not look.

    Of the keys the last row sees all, so that only the last `rows` columns can be hidden.
    """
    s = products(q, k.swapaxes(-1, -2))
    if causal:
        hidden = np.arange(rows)[None, :] > np.arange(rows)[:, None]
        by_head = s.reshape(*s.shape[:2], -1, rows, s.shape[-1])
        np.copyto(by_head[..., -rows:], -np.inf, where=hidden)
    return s


def _stacked(x: Array) -> Array:
    """(B, G, R, rows, n) -> (B, G, R * rows, n), a copy: the heads of a group are rows of one product."""
    return np.ascontiguousarray(x).reshape(*x.shape[:2], -1, x.shape[-1])


def _queries(x: Array, run: EqualSpans, groups: int) -> Array:
    """The query rows of a run as a view (count, G, heads of a group, length, K)."""
    return _by_head(x[run.start : run.stop], run.count, groups)


def _keys(x: Array, run: EqualSpans) -> Array:
    """The key rows of a run as a view (count, G, keys, K)."""
    return _by_head(x[run.key_start : run.key_stop], run.count, x.shape[1])[:, :, 0]


def _by_head(rows: Array, count: int, groups: int) -> Array:
    length, heads, size = rows.shape[0] // count, rows.shape[1], rows.shape[2]
    return rows.reshape(count, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)


def _lse_by_head(lse: Array, run: EqualSpans, groups: int) -> Array:
    """The columns of a run of (H, T) as a view (count, G, heads of a group, length)."""
    return lse[:, run.start : run.stop].reshape(groups, -1, run.count, run.length).transpose(2, 0, 1, 3)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):  # of what is far below zero it is zero
        y = np.exp(-x)
    y += 1
    return np.divide(np.float32(1), y, out=y)


def _inverse_root(x: Array, eps: float) -> Array:
    return 1.0 / np.sqrt(_mean_product(x, x) + np.float32(eps))


def _mean_product(a: Array, b: Array) -> Array:
    """(N, 1): mean over the last axis of a * b."""
    return np.einsum("nd,nd->n", a, b)[:, None] / np.float32(a.shape[-1])
