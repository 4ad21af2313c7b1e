"""Where MindSpore's CPU kernels are missing or slow: bfloat16, writes in place, broadcasting.

A CPU tensor's `asnumpy()` is a view of its storage, and `Tensor.from_numpy` makes a tensor over an array: numpy is
a kernel library at hand, without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.common.np_dtype import bfloat16

from duetvl.backends.mindspore import numpy_kernels as kernels
from duetvl.backends.mindspore.matrix_product import product
from duetvl.backends.mindspore.ops import MindSporeOps
from duetvl.backends.mindspore.optimizer import MindSporeOptimizer
from duetvl.core.composed import ComposedKVCache
from duetvl.core.composed.attention import check_groups
from duetvl.core.composed.kv_cache import PagedCache, RowPlan, check_copy
from duetvl.core.counter_hash import kept
from duetvl.core.half import widened
from duetvl.core.kv_cache import Append, CachePlan, places
from duetvl.core.ops import write_refused
from duetvl.core.spans import Spans

NUMPY_DTYPES = {name: name for name in ("float32", "float16", "int32", "int64", "bool")} | {"bfloat16": bfloat16}


def in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with bfloat16 arguments widened and floating results narrowed again: the CPU lacks such kernels."""

    @functools.wraps(method)
    def wide(self: Any, x: Any, *rest: Any, **options: Any) -> Any:
        if x.dtype != ms.bfloat16:
            return method(self, x, *rest, **options)

        def widen(x: Any) -> Any:
            return self.cast(x, "float32") if isinstance(x, ms.Tensor) and x.dtype == ms.bfloat16 else x

        def narrow(x: Tensor) -> Tensor:
            return self.cast(x, "bfloat16") if x.dtype == ms.float32 else x

        result = method(self, widen(x), *(widen(y) for y in rest), **options)
        return tuple(narrow(y) for y in result) if isinstance(result, tuple) else narrow(result)

    return wide


def converted(x: Tensor, dtype: str) -> Tensor:
    """`x` in another dtype, unrecorded. The framework's own cast takes half a millisecond for a single number."""
    values = np.asarray(x.asnumpy())
    if dtype == "float32":
        return ms.Tensor.from_numpy(wide_array(values))
    with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere else
        return ms.Tensor.from_numpy(np.asarray(values, NUMPY_DTYPES[dtype]))


def wide_array(values: np.ndarray) -> np.ndarray:
    """As float32; the same array where it is that already."""
    if values.dtype == bfloat16:  # by bits: thirty times as fast as numpy's conversion
        return widened(values.view(np.uint16), "bfloat16")
    return np.asarray(values, np.float32)


class CpuOps(MindSporeOps):
    """bfloat16 is a storage dtype here: everything below is computed in float32."""

    exp = in_float32(MindSporeOps.exp)
    log = in_float32(MindSporeOps.log)
    rsqrt = in_float32(MindSporeOps.rsqrt)
    sigmoid = in_float32(MindSporeOps.sigmoid)
    silu = in_float32(MindSporeOps.silu)
    gelu = in_float32(MindSporeOps.gelu)
    quick_gelu = in_float32(MindSporeOps.quick_gelu)
    sum = in_float32(MindSporeOps.sum)
    mean = in_float32(MindSporeOps.mean)
    max = in_float32(MindSporeOps.max)
    argmax = in_float32(MindSporeOps.argmax)
    broadcast_to = in_float32(MindSporeOps.broadcast_to)
    split = in_float32(MindSporeOps.split)
    take_rows = in_float32(MindSporeOps.take_rows)
    scatter_rows = in_float32(MindSporeOps.scatter_rows)
    gather_last = in_float32(MindSporeOps.gather_last)

    def from_numpy(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        wanted = array.dtype if dtype is None else NUMPY_DTYPES[dtype]
        with np.errstate(over="ignore"):
            return ms.Tensor.from_numpy(np.ascontiguousarray(array, wanted).reshape(array.shape))

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != ms.bfloat16:
            return ops.where(condition, a, b)
        return self.cast(ops.where(condition, self.cast(a, "float32"), self.cast(b, "float32")), "bfloat16")

    def zeros(self, shape: Any, dtype: str = "float32") -> Tensor:
        return ms.Tensor.from_numpy(np.zeros(tuple(shape), NUMPY_DTYPES[dtype]))

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        old = self.dtype_of(x)
        if old == dtype:
            return x

        def forward(needs: Any, x: Tensor) -> Any:
            return converted(x, dtype), ()

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return (converted(d, old),)

        return self.autograd.custom_vjp(forward, backward)(x)

    def add_at_last(self, x: Tensor, index: Tensor, values: Tensor | float) -> Tensor:
        table = x.asnumpy()
        table[np.arange(len(table)), index.asnumpy()] += values.asnumpy() if isinstance(values, ms.Tensor) else values
        return x

    def assign(self, dst: Tensor, src: Tensor) -> None:
        self.require_whole(dst)
        np.copyto(dst.asnumpy(), self.cast(src, self.dtype_of(dst)).asnumpy())

    def write_slice(self, dst: Tensor, start: int, src: Tensor) -> None:
        self.require_whole(dst)
        dst.asnumpy()[start : start + src.shape[0]] = src.asnumpy()

    def require_whole(self, dst: Tensor) -> None:
        """As on every device. Of a view each array is another copy, and what is written into one is lost."""
        array = dst.asnumpy()
        if array.size and not np.may_share_memory(array, dst.asnumpy()):
            raise write_refused(dst)

    # -- coarse operations in numpy ---------------------------------------------------------------------------------

    def matmul(self, a: Tensor, b: Tensor, *, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
        def laid_out(x: Tensor, transposed: bool) -> np.ndarray:
            return self.wide(x).swapaxes(-1, -2) if transposed else self.wide(x)

        def forward(needs: Any, a: Tensor, b: Tensor) -> Any:
            y = multiplied(laid_out(a, transpose_a), laid_out(b, transpose_b))
            return self.like(y, a, y.shape), (a, b)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            a, b = residuals
            wide = self.wide(d)
            da = multiplied(wide, laid_out(b, not transpose_b)) if needs[0] else None
            db = multiplied(laid_out(a, not transpose_a), wide) if needs[1] else None
            pairs = ((da, a, transpose_a), (db, b, transpose_b))
            return tuple(None if g is None else self.like(_straight(g, turned), x) for g, x, turned in pairs)

        multiplied = product if a.ndim == b.ndim == 2 else np.matmul
        return self.autograd.custom_vjp(forward, backward)(a, b)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def forward(needs: Any, x: Tensor, weight: Tensor, *bias: Tensor) -> Any:
            y = kernels.linear(self._rows(x), self.wide(weight))
            for b in bias:
                y += self.wide(b)
            return self.like(y, x, (*x.shape[:-1], weight.shape[0])), (x, weight, *bias)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            x, weight, *bias = residuals
            found = kernels.linear_grad(self._rows(d), self._rows(x), self.wide(weight), needs)
            pairs = zip(found, (x, weight, *bias), strict=True)
            return tuple(None if g is None else self.like(g, given) for g, given in pairs)

        tensors = (x, weight) if bias is None else (x, weight, bias)
        return self.autograd.custom_vjp(forward, backward)(*tensors)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.like(kernels.rotate(self.wide(x), cos.asnumpy(), sin.asnumpy()), x)

    @functools.cached_property
    def _swiglu(self) -> Any:
        def flat(x: Tensor) -> np.ndarray:
            return self.wide(x).reshape(-1)

        def forward(needs: Any, gate: Tensor, up: Tensor) -> Any:
            return self.like(kernels.swiglu(flat(gate), flat(up)), gate), (gate, up)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            found = kernels.swiglu_grad(flat(d), *map(flat, residuals))
            return tuple(self.like(g, x) for g, x in zip(found, residuals, strict=True))

        return self.autograd.custom_vjp(forward, backward)

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        def forward(needs: Any, x: Tensor, scale: Tensor) -> Any:
            y, inverse = kernels.rms_norm(self._rows(x), self.wide(scale), eps)
            return self.like(y, x), (x, scale, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            x, scale, inverse = residuals
            dx, dscale = kernels.rms_norm_grad(self._rows(d), self._rows(x), self.wide(scale), inverse)
            return self.like(dx, x), self.like(dscale, scale)

        return self.autograd.custom_vjp(forward, backward)(x, scale)

    def layer_norm(self, x: Tensor, scale: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        def forward(needs: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Any:
            y, unit, inverse = kernels.layer_norm(self._rows(x), self.wide(scale), self.wide(bias), eps)
            return self.like(y, x), (scale, bias, unit, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            scale, bias, unit, inverse = residuals
            dx, dscale, dbias = kernels.layer_norm_grad(self._rows(d), unit, self.wide(scale), inverse)
            return self.like(dx, d), self.like(dscale, scale), self.like(dbias, bias)

        return self.autograd.custom_vjp(forward, backward)(x, scale, bias)

    def _dropped(self, x: Tensor, p: float, key: Sequence[int], rows: np.ndarray, column: int) -> Tensor:
        chosen = kept(x.shape, p, key, rows, column)
        return self.like(np.where(chosen, self.wide(x) / np.float32(1 - p), np.float32(0)), x)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, lse = kernels.attention(self.wide(q), self.wide(k), self.wide(v), spans)
        return self.like(out, q), ms.Tensor.from_numpy(lse)

    def _attend_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = self.wide
        dq, dk, dv = kernels.attention_grad(wide(dout), wide(q), wide(k), wide(v), wide(out), wide(lse), spans)
        return self.like(dq, q), self.like(dk, k), self.like(dv, v)

    def wide(self, x: Tensor) -> np.ndarray:
        """The values as float32; a view of the storage where they are already."""
        return (x if x.dtype == ms.float32 else converted(x, "float32")).asnumpy()

    def _rows(self, x: Tensor) -> np.ndarray:
        """The values as float32 rows (N, D)."""
        return self.wide(x).reshape(-1, x.shape[-1])

    def like(self, values: np.ndarray, x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor over `values` with x's dtype, and x's shape unless another is given."""
        tensor = ms.Tensor.from_numpy(values.reshape(x.shape if shape is None else shape))
        return tensor if x.dtype == ms.float32 else converted(tensor, self.dtype_of(x))


def _straight(x: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-1, -2)) if transposed else x


@dataclass(frozen=True, eq=False)
class ArrayPlan(RowPlan):
    """written: (T,) int32, the row of the cache of each packed row."""

    written: np.ndarray


class CpuKVCache(ComposedKVCache):
    """See core/kv_cache.py. The cache is numpy arrays: a tensor takes microseconds to give its own."""

    ops: CpuOps

    def cache_create(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: str
    ) -> PagedCache:
        shape = (blocks * block_size, kv_heads, head_size)
        keys, values = (tuple(np.zeros(shape, NUMPY_DTYPES[dtype]) for _ in range(layers)) for _ in range(2))
        return PagedCache(block_size, keys, values)

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        plan = super().plan(cache, append)
        return ArrayPlan(plan.writes, plan.pieces, places(append, cache.block_size))

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        cache.keys[layer][plan.written] = k.asnumpy()
        cache.values[layer][plan.written] = v.asnumpy()

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        check_groups(q.shape[1], keys.shape[1])
        queries, out = self.ops.wide(q), np.empty(q.shape, np.float32)
        for piece in plan.pieces:
            rows = piece.rows if isinstance(piece.rows, slice) else piece.rows.asnumpy()
            k, v = (wide_array(x[rows]) for x in (keys, values))
            kernels.attention_of_last(queries[piece.start : piece.stop], k, v, out[piece.start : piece.stop])
        return self.ops.like(out, q)

    def cache_copy(self, cache: PagedCache, source: int, target: int, count: int) -> None:
        check_copy(cache.blocks, source, target, count)
        size = cache.block_size
        for rows in (*cache.keys, *cache.values):
            rows[target * size : (target + count) * size] = rows[source * size : (source + count) * size]


class CpuOptimizer(MindSporeOptimizer):
    """See core/optimizer.py. The primitive's call costs more than a small tensor's update, and needs a scaled copy."""

    def to_host(self, x: Tensor) -> Tensor:
        return x

    def to_device(self, x: Tensor) -> Tensor:
        return x

    def update(
        self, weight: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, *, scale: float, rate: float,
        decay: float, betas: tuple[float, float], eps: float, step: int,
    ) -> None:  # fmt: skip
        arrays = (x.asnumpy().reshape(-1) for x in (weight, *moments, gradient))
        kernels.adamw(*arrays, scale=scale, rate=rate, decay=decay, betas=betas, eps=eps, step=step)
