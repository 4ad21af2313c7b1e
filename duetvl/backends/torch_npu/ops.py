"""Tensor functions on torch tensors, for every device; kernels_cpu, kernels_cuda and kernels_npu add those of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from duetvl.backends.torch_npu.autograd import TorchAutograd
from duetvl.core.composed import ComposedOps
from duetvl.core.counter_hash import kept
from duetvl.core.ops import write_refused

Tensor = torch.Tensor

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TorchOps(ComposedOps):
    """See core/ops.py."""

    def __init__(self, autograd: TorchAutograd, place: torch.device):
        super().__init__(autograd)
        self.place = place

    def from_numpy(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        if not array.flags.writeable:
            array = array.copy()  # torch warns about tensors over read-only memory
        tensor = self._staged(torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)))
        return tensor.to(self.place, None if dtype is None else DTYPES[dtype], non_blocking=True)

    def _staged(self, tensor: Tensor) -> Tensor:
        """The tensor where the device can fetch it from."""
        return tensor

    def to_numpy(self, x: Tensor) -> np.ndarray:
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy()

    def dtype_of(self, x: Tensor) -> str:
        return _NAMES[x.dtype]

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(DTYPES[dtype])

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        return torch.zeros(tuple(shape), dtype=DTYPES[dtype], device=self.place)

    def exp(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def log(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def rsqrt(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def sum(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return x.sum() if axis is None else x.sum(axis, keepdim=keepdims)

    def mean(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return x.mean(axis, keepdim=keepdims)

    def max(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return x.amax(axis, keepdim=keepdims)

    def argmax(self, x: Tensor, axis: int) -> Tensor:
        return x.argmax(axis)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.reshape(tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return x.permute(tuple(axes))

    def broadcast_to(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return x.expand(tuple(shape))

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return xs[0] if len(xs) == 1 else torch.cat(tuple(xs), axis)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), axis)

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        return torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, x) if x.ndim == 2 else x.index_select(0, index)

    def scatter_rows(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        return x.index_copy(0, index.long(), rows)

    def gather_last(self, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(-1, index.long()[..., None])[..., 0]

    def add_at_last(self, x: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
        columns = index.long()[:, None]
        if not isinstance(values, torch.Tensor):
            values = torch.full(index.shape, values, dtype=x.dtype, device=x.device)
        return x.scatter_add_(1, columns, values[:, None])

    def layer_norm(self, x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), scale, bias, eps)

    def assign(self, dst: Tensor, src: Tensor) -> None:
        require_whole(dst)
        dst.detach().copy_(src.detach())

    def write_slice(self, dst: Tensor, start: int, src: Tensor) -> None:
        require_whole(dst)
        dst.detach()[start : start + src.shape[0]].copy_(src.detach())

    def _kept(self, shape: Sequence[int], p: float, key: Sequence[int], rows: np.ndarray, column: int) -> Tensor:
        return kept(shape, p, key, rows, column, self.from_numpy)

    # -- the vocabulary: blocks of logits are made, used and turned into gradients in one buffer --------------------

    def _cross_entropy_block(
        self, needs: Any, h: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = F.linear(h, weight).float()
        lse = logits.logsumexp(-1, keepdim=True)
        columns = labels.long()[:, None]
        losses = lse - logits.gather(1, columns)
        loss = losses.sum() if scale is None else (losses * scale).sum()
        if not any(needs):
            return loss, None, None
        dlogits = logits.sub_(lse).exp_()
        if scale is not None:
            dlogits.mul_(scale)
        one = torch.ones_like(lse) if scale is None else scale
        dlogits.scatter_add_(1, columns, -one)
        return loss, *self._logit_grads(needs, dlogits, h, weight)


def require_whole(dst: Tensor) -> None:
    """Raise BackendError where a tensor is a slice or another view, which must not be written into."""
    if dst._base is not None or not dst.is_contiguous():
        raise write_refused(dst)
