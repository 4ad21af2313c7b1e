"""Coarse operations made of small ones, with gradients of their own: what a backend has before it has a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from duetvl.core.autograd import Autograd
from duetvl.core.composed.attention import ComposedAttention
from duetvl.core.counter_hash import kept
from duetvl.core.errors import ConfigError

Tensor = Any

LOGIT_BUDGET = 1 << 26  # elements of one block of logits (256 MB in float32)
WEIGHT_BUDGET = 1 << 22  # elements of one block of a weight (16 MB in float32)
LEAST_ROWS = 256  # in a block of logits: fewer would add up the weight's gradient too often


class ComposedOps(ComposedAttention):
    """Inherit from it, add the small functions, override what the framework does better."""

    def __init__(self, autograd: Autograd):
        self.autograd = autograd

    # -- element-wise blocks ---------------------------------------------------------------------------------------

    def quick_gelu(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x * 1.702)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._swiglu(gate, up)

    @cached_property
    def _swiglu(self) -> Any:
        def forward(needs: Any, gate: Tensor, up: Tensor) -> Any:
            return self._gate(gate, up), (gate, up)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return self._gate_grad(d, *residuals)

        return self.autograd.custom_vjp(forward, backward)

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.silu(gate) * up

    def _gate_grad(self, d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        s = self.sigmoid(gate)
        silu = gate * s
        return d * up * (s + silu - silu * s), d * silu

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def forward(needs: Any, x: Tensor) -> Any:
            return self._rotate(x, cos, sin), ()

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return (self._rotate(d, cos, -sin),)

        return self.autograd.custom_vjp(forward, backward)(x)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        wide = self.cast(x, "float32")
        a, b = wide[:, :, :half], wide[:, :, half:]
        cos, sin = cos[:, None, :], sin[:, None, :]
        return self.cast(self.concat([a * cos - b * sin, b * cos + a * sin], -1), self.dtype_of(x))

    # -- low-rank adapters -----------------------------------------------------------------------------------------

    def dropout(
        self, x: Tensor, p: float, key: Sequence[int], rows: np.ndarray | None = None, column: int = 0
    ) -> Tensor:
        numbers = row_numbers(x, rows)
        if p == 0:
            return x

        def forward(needs: Any, x: Tensor) -> Any:
            return self._dropped(x, p, key, numbers, column), ()

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return (self._dropped(d, p, key, numbers, column),)

        return self.autograd.custom_vjp(forward, backward)(x)

    def _dropped(self, x: Tensor, p: float, key: Sequence[int], rows: np.ndarray, column: int) -> Tensor:
        if 0 in x.shape:
            return x
        wide = self.cast(x, "float32")
        chosen = self._kept(x.shape, p, key, rows, column)
        return self.cast(self.where(chosen, wide / (1 - p), self.zeros(x.shape)), self.dtype_of(x))

    def _kept(self, shape: Sequence[int], p: float, key: Sequence[int], rows: np.ndarray, column: int) -> Tensor:
        """Bools of `shape`; computed on the host where a backend has nothing better."""
        return self.from_numpy(kept(shape, p, key, rows, column))

    def low_rank_row_norms(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = max(1, WEIGHT_BUDGET // weight.shape[1])
        sizes = [min(rows, weight.shape[0] - start) for start in range(0, weight.shape[0], rows)]
        with self.autograd.no_grad():
            parts = zip(self.split(weight, sizes, 0), self.split(b, sizes, 0), strict=True)
            squares = [self._row_squares(part, a, factor, scale) for part, factor in parts]
            total = self.concat(squares, 0) + 1e-30
            return total * self.rsqrt(total)

    def _row_squares(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        row = self.cast(weight, "float32") + self.matmul(b, a) * scale
        return self.sum(row * row, 1)

    # -- norms -----------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        def forward(needs: Any, x: Tensor, scale: Tensor) -> Any:
            wide = self.cast(x, "float32")
            inverse = self.rsqrt(self.mean(wide * wide, -1, keepdims=True) + eps)
            y = wide * inverse * self.cast(scale, "float32")
            return self.cast(y, self.dtype_of(x)), (x, scale, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            x, scale, inverse = residuals
            d = self.cast(d, "float32")
            unit = self.cast(x, "float32") * inverse
            dscale = self._reduce_to(d * unit, scale) if needs[1] else None
            if not needs[0]:
                return None, dscale
            g = d * self.cast(scale, "float32")
            dx = (g - unit * self.mean(g * unit, -1, keepdims=True)) * inverse
            return self.cast(dx, self.dtype_of(x)), dscale

        return self.autograd.custom_vjp(forward, backward)(x, scale)

    def layer_norm(self, x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        def forward(needs: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Any:
            wide = self.cast(x, "float32")
            centred = wide - self.mean(wide, -1, keepdims=True)
            inverse = self.rsqrt(self.mean(centred * centred, -1, keepdims=True) + eps)
            unit = centred * inverse
            y = unit * self.cast(scale, "float32") + self.cast(bias, "float32")
            return self.cast(y, self.dtype_of(x)), (scale, bias, unit, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            scale, bias, unit, inverse = residuals
            narrow = self.dtype_of(d)
            d = self.cast(d, "float32")
            dscale, dbias = self._reduce_to(d * unit, scale), self._reduce_to(d, bias)
            if not needs[0]:
                return None, dscale, dbias
            g = d * self.cast(scale, "float32")
            dx = g - self.mean(g, -1, keepdims=True) - unit * self.mean(g * unit, -1, keepdims=True)
            return self.cast(dx * inverse, narrow), dscale, dbias

        return self.autograd.custom_vjp(forward, backward)(x, scale, bias)

    def _reduce_to(self, d: Tensor, scale: Tensor) -> Tensor:
        """Sum of `d` (..., D) over all but its last axis, in scale's dtype."""
        rows = self.reshape(d, (-1, d.shape[-1]))
        return self.cast(self.sum(rows, 0), self.dtype_of(scale))

    # -- the vocabulary --------------------------------------------------------------------------------------------

    def linear_cross_entropy(self, h: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        def forward(needs: Any, h: Tensor, weight: Tensor) -> Any:
            total, dhs, dweight = self.zeros(()), [], None
            if h.shape[0] == 0:  # the weight still takes part in the step
                return total, (self.zeros(h.shape), self.zeros(weight.shape), h, weight)
            for a, b in row_blocks(h.shape[0], weight.shape[0]):
                scale = None if weights is None else weights[a:b, None]
                part, dh, dw = self._cross_entropy_block(needs, h[a:b], weight, labels[a:b], scale)
                total = total + part
                dhs.append(dh)
                dweight = dw if dweight is None or dw is None else dweight + dw
            dh = self.concat(dhs, 0) if needs[0] else None
            return total, (dh, dweight, h, weight)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            dh, dweight, h, weight = residuals
            return (
                None if dh is None else self.cast(dh * d, self.dtype_of(h)),
                None if dweight is None else self.cast(dweight * d, self.dtype_of(weight)),
            )

        return self.autograd.custom_vjp(forward, backward)(h, weight)

    def _cross_entropy_block(
        self, needs: Any, h: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of some rows and its float32 gradients to them and to the weight."""
        logits = self._logits(h, weight)
        lse, p, total = self._softmax_parts(logits)
        logp = self.gather_last(logits, labels)[:, None] - lse
        loss = -self.sum(logp if scale is None else logp * scale)
        if not any(needs):
            return loss, None, None
        factor = 1.0 / total if scale is None else scale / total
        dlogits = self.add_at_last(p * factor, labels, -1.0 if scale is None else -scale[:, 0])
        return loss, *self._logit_grads(needs, dlogits, h, weight)

    def linear_logprobs(self, h: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        def forward(needs: Any, h: Tensor, weight: Tensor) -> Any:
            logps, lses = [], []
            for a, b in row_blocks(h.shape[0], weight.shape[0]):
                logits = self._logits(h[a:b], weight)
                lse = self._softmax_parts(logits)[0][:, 0]
                logps.append(self.gather_last(logits, labels[a:b]) - lse)
                lses.append(lse)
            logp, lse = (self.concat(x, 0) if x else self.zeros((0,)) for x in (logps, lses))
            return (logp, lse), (h, weight, lse)

        def backward(needs: Any, residuals: Any, dlogp: Tensor, dlse: Tensor) -> Any:
            h, weight, lse = residuals
            return self.linear_logprobs_grad(dlogp, h, weight, labels, lse, needs)

        return self.autograd.custom_vjp(forward, backward)(h, weight)

    def linear_logprobs_grad(
        self,
        dlogp: Tensor,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        lse: Tensor,
        needs: tuple[bool, bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        if h.shape[0] == 0:
            dh, dweight = (self.zeros(x.shape, self.dtype_of(x)) for x in (h, weight))
            return dh, dweight
        here = self.cast(labels >= 0, "float32") * self.cast(labels < weight.shape[0], "float32")
        columns, ones = labels * self.cast(here, "int32"), dlogp * here
        dhs, dweight = [], None
        for a, b in row_blocks(h.shape[0], weight.shape[0]):
            logits = self._logits(h[a:b], weight)
            p = self.exp(logits - lse[a:b, None]) * -dlogp[a:b, None]
            dlogits = self.add_at_last(p, columns[a:b], ones[a:b])
            dh, dw = self._logit_grads(needs, dlogits, h[a:b], weight)
            dhs.append(dh)
            dweight = dw if dweight is None or dw is None else dweight + dw
        dh = self.cast(self.concat(dhs, 0), self.dtype_of(h)) if needs[0] else None
        return dh, None if dweight is None else self.cast(dweight, self.dtype_of(weight))

    def _logits(self, h: Tensor, weight: Tensor) -> Tensor:
        return self.cast(self.matmul(h, weight, transpose_b=True), "float32")

    def _softmax_parts(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row: logsumexp (N, 1), exp(logits - largest) (N, V), and the sum of that (N, 1)."""
        top = self.max(logits, -1, keepdims=True)
        p = self.exp(logits - top)
        total = self.sum(p, -1, keepdims=True)
        return top + self.log(total), p, total

    def _logit_grads(
        self, needs: Any, dlogits: Tensor, h: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """float32 gradients to h and weight."""
        narrow = self.cast(dlogits, self.dtype_of(weight))
        dh = self.cast(self.matmul(narrow, weight), "float32") if needs[0] else None
        dw = self.cast(self.matmul(narrow, h, transpose_a=True), "float32") if needs[1] else None
        return dh, dw


def row_numbers(x: Tensor, rows: np.ndarray | None) -> np.ndarray:
    """The numbers of x's rows in the whole tensor, (N,) integers; leading axes count as one."""
    count = math.prod(x.shape[:-1])
    if rows is None:
        return np.arange(count)
    if np.shape(rows) != (count,):
        raise ConfigError(f"dropout of {count} rows with row numbers of shape {np.shape(rows)}: each row needs one")
    return np.asarray(rows)


def row_blocks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks whose logits stay within LOGIT_BUDGET, if that leaves LEAST_ROWS."""
    size = max(LEAST_ROWS, LOGIT_BUDGET // vocabulary)
    for a in range(0, rows, size):
        yield a, min(rows, a + size)
