"""CUDA kernels of torch: its variable-length flash attention. tests/conformance/test_cuda.py holds the calls."""

from __future__ import annotations

from functools import cached_property

import torch

from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.core.composed import FusedAttention
from duetvl.core.spans import Spans

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LARGEST_HEAD_OF_ALL_CARDS = 192
SERVER_CARDS = ((8, 0), (9, 0), (10, 0), (10, 3))  # A100, H100, B200, B300: the gradient takes larger heads there


def flash_attention_takes(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> bool:
    """Whether the kernel and its gradient take heads of this dtype and size on a card of this compute capability."""
    if dtype not in HALF or head_size % 8 or capability < (8, 0):
        return False
    return head_size <= (LARGEST_HEAD if capability in SERVER_CARDS else LARGEST_HEAD_OF_ALL_CARDS)


class CudaOps(FusedAttention, TorchOps):
    """See core/ops.py."""

    spans_a_call = 2**31

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Of the card, such as (9, 0); (0, 0) where this torch has no flash attention whose lse we know.

        Before 2.7, and on AMD, lse comes padded to the longest span.
        """
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < (2, 7) or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return (0, 0)
        return torch.cuda.get_device_capability(self.place)

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        return flash_attention_takes(q.dtype, q.shape[-1], self.capability)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._bounds(spans), spans.longest, spans.most_keys, 0.0, spans.causal, False
        )
        return out, lse

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), *self._bounds(spans), spans.longest, spans.most_keys, 0.0,
            spans.causal, unused, unused[:0],
        )  # fmt: skip

    def _bounds(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """Where the query and the key rows of each span begin, on the device."""
        return self.from_numpy(spans.cu_seqlens), self.from_numpy(spans.key_offsets)
