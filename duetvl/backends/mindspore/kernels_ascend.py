"""Ascend kernels of MindSpore: attention, norm, rotation and gate. Not run on hardware.

MindSpore has no CPU kernels for these primitives and takes none from outside. tests/npu/test_ascend.py therefore
checks two halves: that MindSpore's own argument parser accepts every call (on CPU each then fails at the very last,
for want of a kernel), and that with references in the kernels' places the numbers are right.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mindspore as ms
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
from duetvl.core.composed import AscendAttention
from duetvl.core.spans import Spans

LARGEST_HEAD = 512
UNLIMITED = 2**31 - 1
HALF = (ms.float16, ms.bfloat16)

speed_fusion_attention_grad = SpeedFusionAttentionGrad()
rms_norm_grad = RmsNormGrad()
rotate = RotaryPositionEmbedding()
swiglu = Swiglu()
swiglu_grad = SwigluGrad()


class AscendOps(AscendAttention, MindSporeOps):
    """See core/ops.py."""

    # -- attention -------------------------------------------------------------------------------------------------

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        return q.dtype in HALF and q.shape[-1] % 16 == 0 and q.shape[-1] <= LARGEST_HEAD

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, top, total, *_ = speed_fusion_attention(
            q, k, v, q.shape[1], "TND", scale=q.shape[-1] ** -0.5, **self.layout_of(spans)
        )
        return out, self.lse_of(top, total, spans)

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        top, total = self.statistics_of(lse, spans)
        return speed_fusion_attention_grad(
            q, k, v, dout, q.shape[1], "TND",
            softmax_max=top, softmax_sum=total, attention_in=out,
            scale_value=q.shape[-1] ** -0.5, **self.layout_of(spans),
        )[:3]  # fmt: skip

    def layout_of(self, spans: Spans) -> dict[str, Any]:
        return super().layout_of(spans) | {"next_tokens": 0 if spans.causal else UNLIMITED}

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
