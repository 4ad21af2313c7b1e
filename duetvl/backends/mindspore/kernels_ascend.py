"""Ascend kernels of MindSpore: attention, norm, rotation and gate. Not run on hardware.

MindSpore has no CPU kernels for these primitives and takes none from outside. tests/npu/test_ascend.py therefore
checks two halves: that MindSpore's own argument parser accepts every call (on CPU each then fails at the very last,
for want of a kernel), and that with references in the kernels' places the numbers are right.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops import speed_fusion_attention
from mindspore.ops.auto_generate import (
    RmsNorm,
    RmsNormGrad,
    RotaryPositionEmbedding,
    SpeedFusionAttentionGrad,
    Swiglu,
    SwigluGrad,
)

from duetvl.backends.mindspore.ops import MindSporeOps
from duetvl.core.composed import FusedAttention
from duetvl.core.spans import Spans

MASK_SIDE = 2048  # of the compressed causal mask that sparse modes 2 and 3 take, whatever the lengths
STATISTIC_WIDTH = 8  # softmax_max and softmax_sum repeat each number this often
LARGEST_HEAD = 512
FULL, RIGHT_DOWN_CAUSAL = 0, 3  # sparse_mode
UNLIMITED = 2**31 - 1
HALF = (ms.float16, ms.bfloat16)

speed_fusion_attention_grad = SpeedFusionAttentionGrad()
rms_norm_grad = RmsNormGrad()
rotate = RotaryPositionEmbedding()
swiglu = Swiglu()
swiglu_grad = SwigluGrad()


class AscendOps(FusedAttention, MindSporeOps):
    """See core/ops.py."""

    spans_a_call = 1024  # the TND layout takes no more

    @cached_property
    def hidden_later(self) -> Tensor:
        """(2048, 2048) bool, True where a column is hidden from a row."""
        return self.from_numpy(np.triu(np.ones((MASK_SIDE, MASK_SIDE), dtype=np.bool_), 1))

    # -- attention -------------------------------------------------------------------------------------------------

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        return q.dtype in HALF and q.shape[-1] % 16 == 0 and q.shape[-1] <= LARGEST_HEAD

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, top, total, *_ = speed_fusion_attention(
            q, k, v, q.shape[1], "TND", scale=q.shape[-1] ** -0.5, **self._layout(spans)
        )
        return out, self.lse_of(top, total, spans)

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        top, total = self.statistics_of(lse, spans)
        return speed_fusion_attention_grad(
            q, k, v, dout, q.shape[1], "TND",
            softmax_max=top, softmax_sum=total, attention_in=out,
            scale_value=q.shape[-1] ** -0.5, **self._layout(spans),
        )[:3]  # fmt: skip

    def _layout(self, spans: Spans) -> dict[str, Any]:
        """The arguments that forward and gradient share. Ends of spans come without the leading zero."""
        return {
            "atten_mask": self.hidden_later if spans.causal else None,
            "sparse_mode": RIGHT_DOWN_CAUSAL if spans.causal else FULL,
            "next_tokens": 0 if spans.causal else UNLIMITED,
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
        """softmax_max and softmax_sum, both (T, H, 8), from which the kernel makes exp(score - lse) again."""
        heads, rows = lse.shape
        where = self.from_numpy(np.argsort(statistic_places(spans, heads).reshape(-1)).astype(np.int32))
        flat = self.take_rows(self.reshape(lse, (-1,)), where)
        top = self.broadcast_to(self.reshape(flat, (rows, heads, 1)), (rows, heads, STATISTIC_WIDTH))
        return top, self.from_numpy(np.ones(top.shape, np.float32))

    # -- norm, rotation, gate --------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        if x.dtype != scale.dtype or 0 in x.shape:
            return super().rms_norm(x, scale, eps=eps)

        def forward(needs: Any, x: Tensor, scale: Tensor) -> Any:
            y, inverse = RmsNorm(eps)(x, scale)
            return y, (x, scale, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            x, scale, inverse = residuals
            dx, dscale = rms_norm_grad(d, x, inverse, scale)
            return dx, self.cast(dscale, self.dtype_of(scale))  # it comes in float32

        return self.autograd.custom_vjp(forward, backward)(x, scale)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The composed rope uses it for the gradient too, with -sin. In float32, as the kernel takes one dtype."""
        if 0 in x.shape:
            return super()._rotate(x, cos, sin)
        rows, heads, size = x.shape
        wide = self.reshape(self.cast(x, "float32"), (1, rows, heads, size))
        full = [self.reshape(self.concat([half, half], -1), (1, rows, 1, size)) for half in (cos, sin)]
        return self.cast(self.reshape(rotate(wide, *full, 0), x.shape), self.dtype_of(x))

    @cached_property
    def _swiglu(self) -> Any:
        def forward(needs: Any, gate: Tensor, up: Tensor) -> Any:
            return swiglu(self.concat([gate, up], -1), -1), (gate, up)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            width = d.shape[-1]
            return self.split(swiglu_grad(d, self.concat(residuals, -1), -1), (width, width), -1)

        return self.autograd.custom_vjp(forward, backward)


def statistic_places(spans: Spans, heads: int) -> np.ndarray:
    """(H, T) int32: where, counted in groups of 8, the kernel keeps the statistics of head h and query row t.

    Their shape says (T, H, 8), but each span's lie as (H, L, 8), one span after the other.
    """
    starts = np.repeat(spans.cu_seqlens[:-1], spans.lengths)
    lengths = np.repeat(spans.lengths, spans.lengths)
    inside = np.arange(spans.rows) - starts
    return (starts * heads + np.arange(heads)[:, None] * lengths + inside).astype(np.int32)
