"""Attention by a fused kernel that takes some inputs, and a limited number of spans in one call."""

from __future__ import annotations

from typing import Any

from duetvl.core.composed.ops import ComposedOps
from duetvl.core.spans import Spans

Tensor = Any


class FusedAttention(ComposedOps):
    """Put it before the backend's own class, which serves what the kernel does not take."""

    spans_a_call: int

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        """Whether the kernel takes queries of this dtype and shape, and these spans."""
        raise NotImplementedError

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """`_attend` in one call of the kernel."""
        raise NotImplementedError

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        """`_attend_grad` in one call of the kernel."""
        raise NotImplementedError

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        if not self._takes(q, spans):
            return super()._attend(q, k, v, spans)
        found = [self._fused(q[rows], k[keys], v[keys], part) for rows, keys, part in spans.parts(self.spans_a_call)]
        return self.concat([out for out, _ in found], 0), self.concat([lse for _, lse in found], 1)

    def _attend_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._takes(q, spans):
            return super()._attend_grad(dout, q, k, v, out, lse, spans)
        found = [
            self._fused_grad(dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows], part)
            for rows, keys, part in spans.parts(self.spans_a_call)
        ]
        dq, dk, dv = (self.concat(pieces, 0) for pieces in zip(*found, strict=True))
        return dq, dk, dv
