"""Attention of small operations: blocks of query rows, one batched product for each run of equal spans."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from duetvl.core.autograd import Autograd
from duetvl.core.errors import ConfigError
from duetvl.core.ops import Ops
from duetvl.core.spans import EqualSpans, Spans

Tensor = Any

SCORE_BUDGET = 1 << 22  # elements of one block of attention scores (16 MB in float32)


class ComposedAttention(Ops):
    """`attention` and its gradient. A backend with a kernel overrides `_attend` and `_attend_grad`.

    These two get spans that all see something: each has query rows and keys, and a causal one at least as many keys
    as query rows.
    """

    autograd: Autograd

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        check_attention(q, k, v, spans)

        def forward(needs: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            out, lse = self._attend_seeing(q, k, v, spans)
            return (out, lse), (q, k, v, out, lse)

        def backward(needs: Any, residuals: Any, dout: Tensor, dlse: Tensor) -> Any:
            q, k, v, out, lse = residuals
            return self.attention_grad(dout, q, k, v, out, lse, spans)

        return self.autograd.custom_vjp(forward, backward)(q, k, v)

    def attention_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_attention(q, k, v, spans)
        seeing, places = spans.seeing
        if not seeing.rows:
            dq, dk, dv = (self.zeros(x.shape, self.dtype_of(x)) for x in (q, k, v))
            return dq, dk, dv
        if places is None:
            return self._attend_grad(dout, q, k, v, out, lse, seeing)
        rows, keys = map(self.from_numpy, places)
        by_row = [self.take_rows(x, rows) for x in (dout, q, out)]
        by_key = [self.take_rows(x, keys) for x in (k, v)]
        lse = self._swapped(self.take_rows(self._swapped(lse), rows))
        dq, dk, dv = self._attend_grad(by_row[0], by_row[1], by_key[0], by_key[1], by_row[2], lse, seeing)
        return self._placed(dq, rows, q), self._placed(dk, keys, k), self._placed(dv, keys, v)

    def _attend_seeing(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """`attention` without a gradient. Rows that see no key have out 0 and lse -inf."""
        seeing, places = spans.seeing
        if seeing.rows and places is None:
            return self._attend(q, k, v, seeing)
        lse = self.from_numpy(np.full((q.shape[0], q.shape[1]), -np.inf, np.float32))
        if places is None or not seeing.rows:
            return self.zeros(q.shape, self.dtype_of(q)), self._swapped(lse)
        rows, keys = map(self.from_numpy, places)
        out, seen = self._attend(self.take_rows(q, rows), self.take_rows(k, keys), self.take_rows(v, keys), seeing)
        return self._placed(out, rows, q), self._swapped(self.scatter_rows(lse, rows, self._swapped(seen)))

    def _placed(self, part: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """Zeros of the shape of `like` with `part` in the rows `index`."""
        return self.scatter_rows(self.zeros(like.shape, self.dtype_of(like)), index, part)

    def _swapped(self, x: Tensor) -> Tensor:
        return self.transpose(x, (1, 0))

    # -- one softmax a block of query rows -------------------------------------------------------------------------

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """out (T, H, K) and lse (H, T); there is at least one span."""
        outs, lses, heads = [], [], q.shape[1]
        for run in spans.runs:
            qs = self._heads_first(q[run.start : run.stop], run.count, heads) * q.shape[-1] ** -0.5
            ks, vs = (self._heads_first(x[run.key_start : run.key_stop], run.count, heads) for x in (k, v))
            blocks = [
                self._softmax_block(qs[:, a:b], ks[:, :end], vs[:, :end], self._mask(a, b, end, run, spans))
                for a, b, end in query_blocks(run, heads, spans.causal)
            ]
            out = self._rows_first(self.concat([o for o, _ in blocks], 1), run.count)
            outs.append(self.cast(out, self.dtype_of(q)))
            lses.append(self._heads_by_rows(self.concat([m for _, m in blocks], 1), run, heads))
        return self.concat(outs, 0), self.concat(lses, 1)

    def _attend_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients to q, k and v; there is at least one span."""
        heads = q.shape[1]
        dqs, dks, dvs = [], [], []
        for run in spans.runs:
            rows, keys = slice(run.start, run.stop), slice(run.key_start, run.key_stop)
            by_row = [self._heads_first(x[rows], run.count, heads) for x in (dout, q, out)]
            by_key = [self._heads_first(x[keys], run.count, heads) for x in (k, v)]
            dq, dk, dv = self._run_grad(by_row, by_key, self._lse_of_run(lse, run, heads), run, spans)
            dqs.append(self.cast(self._rows_first(dq, run.count), self.dtype_of(q)))
            dks.append(self.cast(self._sum_groups(dk, run.count, k.shape[1]), self.dtype_of(k)))
            dvs.append(self.cast(self._sum_groups(dv, run.count, v.shape[1]), self.dtype_of(v)))
        return self.concat(dqs, 0), self.concat(dks, 0), self.concat(dvs, 0)

    def _run_grad(
        self, by_row: list[Tensor], by_key: list[Tensor], lse: Tensor, run: EqualSpans, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients (B, L, K) of one run; each block of scores is recomputed from lse."""
        (dout, q, out), (k, v) = by_row, by_key
        scale = q.shape[-1] ** -0.5
        delta = self.sum(dout * out, -1, keepdims=True)
        dqs: list[Tensor] = []
        dk = dv = None
        for a, b, end in query_blocks(run, q.shape[0] // run.count, spans.causal):
            scores = self.matmul(q[:, a:b] * scale, k[:, :end], transpose_b=True)
            p = self._masked_exp(scores - lse[:, a:b, None], self._mask(a, b, end, run, spans))
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

    def _mask(self, a: int, b: int, end: int, run: EqualSpans, spans: Spans) -> Tensor | None:
        """(b - a, end) float32: 0 where query row a + i may see key j, a large negative number elsewhere."""
        if not spans.causal:
            return None
        hidden = np.arange(end)[None, :] > np.arange(a, b)[:, None] + run.shift
        return self.from_numpy(np.where(hidden, np.float32(-1e30), np.float32(0)))

    # -- rows of spans, and heads ----------------------------------------------------------------------------------

    def _heads_first(self, x: Tensor, count: int, heads: int) -> Tensor:
        """Rows (count * L, G, K) of a run as float32 (count * heads, L, K), groups repeated."""
        groups, size, length = x.shape[1], x.shape[2], x.shape[0] // count
        rows = self.reshape(self.cast(x, "float32"), (count, length, groups, size))
        by_head = self.transpose(rows, (0, 2, 1, 3))
        if groups != heads:
            spread = self.reshape(by_head, (count, groups, 1, length, size))
            by_head = self.broadcast_to(spread, (count, groups, heads // groups, length, size))
        return self.reshape(by_head, (count * heads, length, size))

    def _rows_first(self, x: Tensor, count: int) -> Tensor:
        """(count * heads, L, K) as rows (count * L, heads, K)."""
        heads, length, size = x.shape[0] // count, x.shape[1], x.shape[2]
        by_head = self.reshape(x, (count, heads, length, size))
        return self.reshape(self.transpose(by_head, (0, 2, 1, 3)), (count * length, heads, size))

    def _sum_groups(self, x: Tensor, count: int, groups: int) -> Tensor:
        """(count * heads, L, K) as rows (count * L, groups, K), the heads of a group added."""
        heads, length, size = x.shape[0] // count, x.shape[1], x.shape[2]
        if heads != groups:
            x = self.sum(self.reshape(x, (count * groups, heads // groups, length, size)), 1)
        return self._rows_first(x, count)

    def _heads_by_rows(self, lse: Tensor, run: EqualSpans, heads: int) -> Tensor:
        """(count * heads, length) as (heads, count * length)."""
        split = self.reshape(lse, (run.count, heads, run.length))
        return self.reshape(self.transpose(split, (1, 0, 2)), (heads, run.count * run.length))

    def _lse_of_run(self, lse: Tensor, run: EqualSpans, heads: int) -> Tensor:
        """The columns of one run of (heads, T) as (count * heads, length)."""
        split = self.reshape(lse[:, run.start : run.stop], (heads, run.count, run.length))
        return self.reshape(self.transpose(split, (1, 0, 2)), (run.count * heads, run.length))


def check_groups(heads: int, groups: int) -> None:
    """Raise ConfigError unless each of the key-value groups serves the same number of query heads."""
    if groups < 1 or heads % groups:
        raise ConfigError(
            f"attention of {heads} query heads with {groups} key-value groups: each group must serve the same number "
            f"of heads, so the groups must divide them"
        )


def check_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> None:
    """Raise ConfigError where heads, groups, head sizes or rows do not fit together."""
    check_groups(q.shape[1], k.shape[1])
    if tuple(k.shape) != tuple(v.shape) or q.shape[2] != k.shape[2]:
        raise ConfigError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}: k and v must have one shape, "
            f"and the head size of q"
        )
    if (spans.rows, spans.key_rows) != (q.shape[0], k.shape[0]):
        raise ConfigError(
            f"attention over {q.shape[0]} query and {k.shape[0]} key rows with spans of {spans.rows} and "
            f"{spans.key_rows}: the spans must cover all rows"
        )


def query_blocks(run: EqualSpans, heads: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """(first row, end row, keys seen) of blocks of query rows whose scores stay within SCORE_BUDGET."""
    size = max(16, SCORE_BUDGET // max(1, run.count * heads * run.keys))
    for a in range(0, run.length, size):
        b = min(run.length, a + size)
        yield a, b, (b + run.shift if causal else run.keys)
