"""Coarse operations made of small ones, with gradients of their own: what a backend has before it has a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from duetvl.core.autograd import Autograd
from duetvl.core.counter_hash import kept
from duetvl.core.ops import Ops
from duetvl.core.spans import Run, Spans

Tensor = Any

SCORE_BUDGET = 1 << 22  # elements of one block of attention scores (16 MB in float32)
LOGIT_BUDGET = 1 << 26  # elements of one block of logits (256 MB in float32)
WEIGHT_BUDGET = 1 << 22  # elements of one block of a weight (16 MB in float32)
LEAST_ROWS = 256  # in a block of logits: fewer would add up the weight's gradient too often


class ComposedOps(Ops):
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
            return self.silu(gate) * up, (gate, up)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            gate, up = residuals
            s = self.sigmoid(gate)
            silu = gate * s
            return d * up * (s + silu - silu * s), d * silu

        return self.autograd.custom_vjp(forward, backward)

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

    def dropout(self, x: Tensor, p: float, key: Sequence[int], origin: tuple[int, int] = (0, 0)) -> Tensor:
        if p == 0:
            return x

        def forward(needs: Any, x: Tensor) -> Any:
            return self._dropped(x, p, key, origin), ()

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return (self._dropped(d, p, key, origin),)

        return self.autograd.custom_vjp(forward, backward)(x)

    def _dropped(self, x: Tensor, p: float, key: Sequence[int], origin: tuple[int, int]) -> Tensor:
        if 0 in x.shape:
            return x
        wide = self.cast(x, "float32")
        chosen = self._kept(x.shape, p, key, origin)
        return self.cast(self.where(chosen, wide / (1 - p), self.zeros(x.shape)), self.dtype_of(x))

    def _kept(self, shape: Sequence[int], p: float, key: Sequence[int], origin: tuple[int, int]) -> Tensor:
        """Bools of `shape`; computed on the host where a backend has nothing better."""
        return self.from_numpy(kept(shape, p, key, origin))

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

    # -- attention -------------------------------------------------------------------------------------------------

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        def forward(needs: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = self.attention_forward(q, k, v, spans)
            return (out, lse), (q, k, v, out, lse)

        def backward(needs: Any, residuals: Any, dout: Tensor, dlse: Tensor) -> Any:
            q, k, v, out, lse = residuals
            return self.attention_grad(dout, q, k, v, out, lse, spans)

        return self.autograd.custom_vjp(forward, backward)(q, k, v)

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """`attention` without a gradient: softmax over blocks of query rows, one batched product a run of spans."""
        outs, lses = [], []
        scale = q.shape[-1] ** -0.5
        for run in spans.runs:
            qs, ks, vs = (self._heads_first(x, run, q.shape[1]) for x in (q, k, v))
            blocks = [
                self._softmax_block(qs[:, a:b] * scale, ks[:, :end], vs[:, :end], self._mask(a, b, end, spans))
                for a, b, end in query_blocks(run, q.shape[1], spans.causal)
            ]
            out = self.concat([o for o, _ in blocks], 1)
            lse = self.concat([m for _, m in blocks], 1)
            outs.append(self.cast(self._rows_first(out, run, q.shape[1]), self.dtype_of(q)))
            lses.append(self._heads_by_rows(lse, run, q.shape[1]))
        if not outs:
            return q, self.zeros((q.shape[1], 0))
        return self.concat(outs, 0), self.concat(lses, 1)

    def attention_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = q.shape[1]
        dqs, dks, dvs = [], [], []
        for run in spans.runs:
            tensors = [self._heads_first(x, run, heads) for x in (dout, q, k, v, out)]
            run_lse = self._lse_of_run(lse, run, heads)
            dq, dk, dv = self._run_grad(tensors, run_lse, run, spans)
            dqs.append(self.cast(self._rows_first(dq, run, heads), self.dtype_of(q)))
            dks.append(self.cast(self._sum_groups(dk, run, heads, k.shape[1]), self.dtype_of(k)))
            dvs.append(self.cast(self._sum_groups(dv, run, heads, v.shape[1]), self.dtype_of(v)))
        if not dqs:
            return dout, k, v
        return self.concat(dqs, 0), self.concat(dks, 0), self.concat(dvs, 0)

    def _run_grad(self, tensors: list[Tensor], lse: Tensor, run: Run, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients (B, L, K) of one run; each block of scores is made again from lse."""
        dout, q, k, v, out = tensors
        scale = q.shape[-1] ** -0.5
        delta = self.sum(dout * out, -1, keepdims=True)
        dqs: list[Tensor] = []
        dk = dv = None
        for a, b, end in query_blocks(run, q.shape[0] // run.count, spans.causal):
            scores = self.matmul(q[:, a:b] * scale, k[:, :end], transpose_b=True)
            p = self._masked_exp(scores - lse[:, a:b, None], self._mask(a, b, end, spans))
            ds = p * (self.matmul(dout[:, a:b], v[:, :end], transpose_b=True) - delta[:, a:b])
            dqs.append(self.matmul(ds, k[:, :end]) * scale)
            dk = self._grow(dk, self.matmul(ds, q[:, a:b], transpose_a=True) * scale)
            dv = self._grow(dv, self.matmul(p, dout[:, a:b], transpose_a=True))
        return self.concat(dqs, 1), dk, dv

    def _grow(self, total: Tensor | None, part: Tensor) -> Tensor:
        """total + part, where total may have fewer rows (causal blocks reach further and further)."""
        if total is None:
            return part
        known = total.shape[1]
        if part.shape[1] == known:
            return total + part
        return self.concat([total + part[:, :known], part[:, known:]], 1)

    def _softmax_block(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) of query rows already scaled: q (B, A, K), k and v (B, E, K), float32."""
        scores = self.matmul(q, k, transpose_b=True)
        if mask is not None:
            scores = scores + mask
        top = self.max(scores, -1, keepdims=True)
        p = self.exp(scores - top)
        total = self.sum(p, -1, keepdims=True)
        return self.matmul(p, v) / total, (top + self.log(total))[:, :, 0]

    def _masked_exp(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return self.exp(scores if mask is None else scores + mask)

    def _mask(self, a: int, b: int, end: int, spans: Spans) -> Tensor | None:
        """(b - a, end) float32: 0 where row a + i may see row j, a large negative number elsewhere."""
        return self.causal_mask(a, b, end) if spans.causal else None

    def causal_mask(self, a: int, b: int, end: int) -> Tensor:
        """The causal mask of query rows a..b against key rows 0..end."""
        import numpy as np

        hidden = np.arange(end)[None, :] > np.arange(a, b)[:, None]
        return self.from_numpy(np.where(hidden, np.float32(-1e30), np.float32(0)))

    def _heads_first(self, x: Tensor, run: Run, heads: int) -> Tensor:
        """Rows of one run (count * length, G, K) as float32 (count * heads, length, K), groups repeated."""
        groups, size = x.shape[1], x.shape[2]
        rows = self.reshape(self.cast(x[run.start : run.stop], "float32"), (run.count, run.length, groups, size))
        by_head = self.transpose(rows, (0, 2, 1, 3))
        if groups != heads:
            spread = self.reshape(by_head, (run.count, groups, 1, run.length, size))
            by_head = self.broadcast_to(spread, (run.count, groups, heads // groups, run.length, size))
        return self.reshape(by_head, (run.count * heads, run.length, size))

    def _rows_first(self, x: Tensor, run: Run, heads: int) -> Tensor:
        """(count * heads, length, K) as rows (count * length, heads, K)."""
        by_head = self.reshape(x, (run.count, heads, run.length, x.shape[-1]))
        return self.reshape(self.transpose(by_head, (0, 2, 1, 3)), (run.count * run.length, heads, x.shape[-1]))

    def _sum_groups(self, x: Tensor, run: Run, heads: int, groups: int) -> Tensor:
        """(count * heads, length, K) as rows (count * length, groups, K), the heads of a group added."""
        if heads != groups:
            split = self.reshape(x, (run.count * groups, heads // groups, run.length, x.shape[-1]))
            x = self.sum(split, 1)
        return self._rows_first(x, run, groups)

    def _heads_by_rows(self, lse: Tensor, run: Run, heads: int) -> Tensor:
        """(count * heads, length) as (heads, count * length)."""
        split = self.reshape(lse, (run.count, heads, run.length))
        return self.reshape(self.transpose(split, (1, 0, 2)), (heads, run.count * run.length))

    def _lse_of_run(self, lse: Tensor, run: Run, heads: int) -> Tensor:
        """The columns of one run of (heads, T) as (count * heads, length)."""
        split = self.reshape(lse[:, run.start : run.stop], (heads, run.count, run.length))
        return self.reshape(self.transpose(split, (1, 0, 2)), (run.count * heads, run.length))

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
            if h.shape[0] == 0:
                return tuple(self.zeros(x.shape, self.dtype_of(x)) for x in (h, weight))
            dhs, dweight = [], None
            for a, b in row_blocks(h.shape[0], weight.shape[0]):
                logits = self._logits(h[a:b], weight)
                p = self.exp(logits - lse[a:b, None]) * -dlogp[a:b, None]
                dlogits = self.add_at_last(p, labels[a:b], dlogp[a:b])
                dh, dw = self._logit_grads(needs, dlogits, h[a:b], weight)
                dhs.append(dh)
                dweight = dw if dweight is None or dw is None else dweight + dw
            dh = self.cast(self.concat(dhs, 0), self.dtype_of(h)) if needs[0] else None
            return dh, None if dweight is None else self.cast(dweight, self.dtype_of(weight))

        return self.autograd.custom_vjp(forward, backward)(h, weight)

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


def row_blocks(rows: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Cut rows into blocks whose logits stay within LOGIT_BUDGET, if that leaves LEAST_ROWS."""
    size = max(LEAST_ROWS, LOGIT_BUDGET // vocabulary)
    for a in range(0, rows, size):
        yield a, min(rows, a + size)


def query_blocks(run: Run, heads: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, keys seen) of blocks of query rows whose scores stay within SCORE_BUDGET."""
    size = max(16, SCORE_BUDGET // max(1, run.count * heads * run.length))
    for a in range(0, run.length, size):
        b = min(run.length, a + size)
        yield a, b, (b if causal else run.length)
