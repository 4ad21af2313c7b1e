"""What Ascend's fused attention wants of either framework: the layout TND, a fixed mask, statistics in an order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from duetvl.core.composed.fused_attention import FusedAttention
from duetvl.core.spans import Spans

Tensor = Any

MASK_SIDE = 2048  # of the compressed causal mask that sparse modes 2 and 3 take, whatever the lengths
STATISTIC_WIDTH = 8  # softmax_max and softmax_sum repeat each number this often
FULL, RIGHT_DOWN_CAUSAL = 0, 3  # sparse_mode


class AscendAttention(FusedAttention):
    """Put it before the backend's own class. The kernels want spans as `Spans.seeing` gives them."""

    spans_a_call = 1024  # the TND layout takes no more

    @cached_property
    def hidden_later(self) -> Tensor:
        """(2048, 2048) bool, True where a column is hidden from a row."""
        return self.from_numpy(np.triu(np.ones((MASK_SIDE, MASK_SIDE), dtype=np.bool_), 1))

    def layout_of(self, spans: Spans) -> dict[str, Any]:
        """The arguments that forward and gradient share. Ends of spans come without the leading zero."""
        return {
            "atten_mask": self.hidden_later if spans.causal else None,
            "sparse_mode": RIGHT_DOWN_CAUSAL if spans.causal else FULL,
            "actual_seq_qlen": spans.cu_seqlens[1:].tolist(),
            "actual_seq_kvlen": spans.key_offsets[1:].tolist(),
        }

    def lse_of(self, top: Tensor, total: Tensor, spans: Spans) -> Tensor:
        """(H, T) float32 from the kernel's softmax_max and softmax_sum, both (T, H, 8)."""
        rows, heads = top.shape[:2]
        lse = top[:, :, 0] + self.log(total[:, :, 0])
        places = self.from_numpy(statistic_places(spans, heads).reshape(-1))
        return self.reshape(self.take_rows(self.reshape(lse, (-1,)), places), (heads, rows))

    def statistics_of(self, lse: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        """softmax_max and softmax_sum, both (T, H, 8), from which the kernel makes exp(score - max) / sum again.

        max = lse with sum = 1 is the same, whatever softmax lse comes from.
        """
        heads, rows = lse.shape
        where = self.from_numpy(np.argsort(statistic_places(spans, heads).reshape(-1)).astype(np.int32))
        flat = self.reshape(self.take_rows(self.reshape(lse, (-1,)), where), (rows, heads))
        return self._repeated(flat)

    def _repeated(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The two statistics of lse (T, H), in the order in which the kernel reads them."""
        shape = (*lse.shape, STATISTIC_WIDTH)
        return self.broadcast_to(lse[:, :, None], shape), self.zeros(shape) + 1.0


def statistic_places(spans: Spans, heads: int) -> np.ndarray:
    """(H, T) int32: where, counted in groups of 8, the kernel keeps the statistics of head h and query row t.

    Their shape says (T, H, 8), but each span's lie as (H, L, 8), one span after the other.
    """
    starts = np.repeat(spans.cu_seqlens[:-1], spans.lengths)
    lengths = np.repeat(spans.lengths, spans.lengths)
    inside = np.arange(spans.rows) - starts
    return (starts * heads + np.arange(heads)[:, None] * lengths + inside).astype(np.int32)
