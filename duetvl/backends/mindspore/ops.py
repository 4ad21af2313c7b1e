"""Tensor functions on MindSpore tensors, for every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from duetvl.backends.mindspore.autograd import MindSporeAutograd
from duetvl.core.composed import ComposedOps
from duetvl.core.counter_hash import kept
from duetvl.core.ops import write_refused

DTYPES = {
    "float32": ms.float32,
    "bfloat16": ms.bfloat16,
    "float16": ms.float16,
    "int32": ms.int32,
    "int64": ms.int64,
    "bool": ms.bool_,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class MindSporeOps(ComposedOps):
    """See core/ops.py. `ops.` functions are used where a `mint.` twin has no CPU kernel."""

    def __init__(self, autograd: MindSporeAutograd):
        super().__init__(autograd)

    def from_numpy(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        tensor = ms.Tensor.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        return tensor if dtype is None else self.cast(tensor, dtype)

    def to_numpy(self, x: Tensor) -> np.ndarray:
        return (ops.cast(x, ms.float32) if x.dtype == ms.bfloat16 else x).asnumpy()

    def dtype_of(self, x: Tensor) -> str:
        return _NAMES[x.dtype]

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x if x.dtype == DTYPES[dtype] else ops.cast(x, DTYPES[dtype])

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        return mint.zeros(tuple(shape), dtype=DTYPES[dtype])

    def exp(self, x: Tensor) -> Tensor:
        return ops.exp(x)

    def log(self, x: Tensor) -> Tensor:
        return ops.log(x)

    def rsqrt(self, x: Tensor) -> Tensor:
        return ops.rsqrt(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return ops.sigmoid(x)

    def silu(self, x: Tensor) -> Tensor:
        return ops.silu(x)

    def gelu(self, x: Tensor) -> Tensor:
        return ops.gelu(x, approximate="none")

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.where(condition, a, b)

    def sum(self, x: Tensor, axis: int | None = None, keepdims: bool = False) -> Tensor:
        if axis is None:
            return self._nothing((), x) if 0 in x.shape else ops.sum(x)
        return ops.sum(x, axis, keepdim=keepdims)

    def mean(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return ops.mean(x, axis, keep_dims=keepdims)

    def max(self, x: Tensor, axis: int, keepdims: bool = False) -> Tensor:
        return ops.amax(x, axis, keepdims=keepdims)

    def argmax(self, x: Tensor, axis: int) -> Tensor:
        return ops.argmax(x, axis)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return ops.reshape(x, tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return ops.transpose(x, tuple(axes))

    def broadcast_to(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return ops.broadcast_to(x, tuple(shape))

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        return xs[0] if len(xs) == 1 else ops.cat(tuple(xs), axis)

    def split(self, x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
        return ops.split(x, list(sizes), axis)

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        if 0 in a.shape or 0 in b.shape:
            rows, columns = a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1]
            return self._nothing((*a.shape[:-2], rows, columns), a, b)
        product = ops.MatMul if a.ndim == 2 else ops.BatchMatMul
        return product(transpose_a, transpose_b)(a, b)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if 0 in x.shape:
            return self._nothing((*x.shape[:-1], weight.shape[0]), *(t for t in (x, weight, bias) if t is not None))
        y = ops.MatMul(transpose_b=True)(ops.reshape(x, (-1, x.shape[-1])), weight)
        y = y if bias is None else ops.bias_add(y, bias)
        return ops.reshape(y, (*x.shape[:-1], weight.shape[0]))

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        if 0 in (*index.shape, *x.shape):
            return self._nothing((*index.shape, *x.shape[1:]), x)
        return ops.gather(x, index, 0)

    def _nothing(self, shape: Sequence[int], *sources: Tensor) -> Tensor:
        """The sum of no terms: zeros, with zeros for the sources' gradients.

        CPU kernels leave their result unwritten there (MatMul, sum) or refuse (the gradient of gather).
        """

        def forward(needs: Any, *sources: Tensor) -> Any:
            return self.zeros(shape, self.dtype_of(sources[0])), ()

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return tuple(self.zeros(shape, dtype) for shape, dtype in like)

        like = [(x.shape, self.dtype_of(x)) for x in sources]
        return self.autograd.custom_vjp(forward, backward)(*sources)

    def scatter_rows(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        if 0 in index.shape:
            return x + self.sum(self._nothing((1, *x.shape[1:]), rows), 0)  # so that the rows keep their gradient
        return ops.tensor_scatter_update(x, ops.reshape(index, (-1, 1)), rows)

    def gather_last(self, x: Tensor, index: Tensor) -> Tensor:
        return ops.squeeze(ops.gather_elements(x, -1, ops.expand_dims(index, -1)), -1)

    def add_at_last(self, x: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
        if not isinstance(values, ms.Tensor):
            values = ops.full((index.shape[0],), values, dtype=x.dtype)
        columns, values = ops.expand_dims(index, -1), ops.expand_dims(values, -1)
        return ops.tensor_scatter_elements(x, columns, values, 1, "add")

    def _kept(self, shape: Sequence[int], p: float, key: Sequence[int], rows: np.ndarray, column: int) -> Tensor:
        return kept(shape, p, key, rows, column, self.from_numpy, ops.bitwise_right_shift)

    def assign(self, dst: Tensor, src: Tensor) -> None:
        self.require_whole(dst)
        ops.assign(dst, self.cast(src, self.dtype_of(dst)))

    def write_slice(self, dst: Tensor, start: int, src: Tensor) -> None:
        self.require_whole(dst)
        dst[start : start + src.shape[0]] = self.cast(src, self.dtype_of(dst))

    def require_whole(self, dst: Tensor) -> None:
        """Raise BackendError where a tensor is a slice or another view, which must not be written into.

        Of the views that this does not see, MindSpore's own Assign refuses all.
        """
        if not dst.is_contiguous() or dst.storage_offset():
            raise write_refused(dst)
