"""Ascend kernels of MindSpore: attention, norm, rotation, gate, cached attention. Not run on hardware.

MindSpore has no CPU kernels for these primitives and takes none from outside. tests/npu/test_ascend.py therefore
checks two halves: that MindSpore's own argument parser accepts every call (on CPU each then fails at the very last,
for want of a kernel), and that with references in the kernels' places the numbers are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.ops import speed_fusion_attention
from mindspore.ops.auto_generate import (
    PagedAttention,
    ReshapeAndCache,
    RmsNorm,
    RmsNormGrad,
    RotaryPositionEmbedding,
    SpeedFusionAttentionGrad,
    Swiglu,
    SwigluGrad,
)

from duetvl.backends.mindspore.ops import MindSporeOps
from duetvl.core.composed import AscendAttention, ComposedKVCache
from duetvl.core.composed.attention import check_groups
from duetvl.core.composed.kv_cache import PagedCache, check_copy
from duetvl.core.kv_cache import Append, CachePlan, check_append, places, rows_of
from duetvl.core.spans import Spans

LARGEST_HEAD = 512
PAGED_HEADS = range(32, 257, 16)  # sizes that the paged kernel is used with elsewhere
BLOCK = 128
UNLIMITED = 2**31 - 1
HALF = (ms.float16, ms.bfloat16)

speed_fusion_attention_grad = SpeedFusionAttentionGrad()
rms_norm_grad = RmsNormGrad()
rotate = RotaryPositionEmbedding()
swiglu = Swiglu()
swiglu_grad = SwigluGrad()
reshape_and_cache = ReshapeAndCache()


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


@dataclass(frozen=True, eq=False)
class BlockCache(PagedCache):
    """keys and values: for each layer (blocks, block_size, G, K), as the kernels want them whole."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return int(self.keys[0].shape[0])


@dataclass(frozen=True, eq=False)
class OneRow:
    """The sequences of a pass that add one row: which packed rows (None: all), their blocks and lengths, int32."""

    rows: Tensor | None
    tables: Tensor
    held: Tensor


@dataclass(frozen=True, eq=False)
class MoreRows:
    """Those that add more: their packed rows (None: all), the rows of the cache that they have, and who sees whom."""

    rows: Tensor | None
    keys: Tensor
    spans: Spans


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """written (T,) int32. order (T,): of the pass's rows among those of one, then those of more; None: it is that."""

    written: Tensor
    one: OneRow | None
    more: MoreRows | None
    order: Tensor | None


class AscendKVCache(ComposedKVCache):
    """See core/kv_cache.py. Rows that come alone are read in blocks; for longer pieces keys are gathered."""

    block_size = BLOCK
    consecutive = False

    ops: AscendOps

    def cache_create(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: str
    ) -> PagedCache:
        if dtype == "float32" or head_size not in PAGED_HEADS or block_size % 16:
            return super().cache_create(
                layers=layers, blocks=blocks, block_size=block_size, kv_heads=kv_heads, head_size=head_size, dtype=dtype
            )
        shape = (blocks, block_size, kv_heads, head_size)
        keys, values = (tuple(self.ops.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
        return BlockCache(block_size, keys, values)

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        if not isinstance(cache, BlockCache):
            return super().plan(cache, append)
        check_append(append, cache.blocks, cache.block_size)
        sequence = np.repeat(np.arange(len(append.new)), append.new)
        alone = append.new[sequence] == 1
        rows = [np.flatnonzero(alone), np.flatnonzero(~alone)]
        mixed = all(len(part) for part in rows)
        one, more = (self.ops.from_numpy(part.astype(np.int32)) if mixed else None for part in rows)
        order = np.argsort(np.concatenate(rows)).astype(np.int32)
        return BlockPlan(
            written=self.ops.from_numpy(places(append, cache.block_size)),
            one=self._one_row(append, one) if len(rows[0]) else None,
            more=self._more_rows(cache, append, more) if len(rows[1]) else None,
            order=self.ops.from_numpy(order) if mixed else None,
        )

    def _one_row(self, append: Append, rows: Tensor | None) -> OneRow:
        chosen = append.new == 1
        tables = np.maximum(append.tables[chosen], 0).astype(np.int32)
        return OneRow(rows, self.ops.from_numpy(tables), self.ops.from_numpy(append.held[chosen].astype(np.int32)))

    def _more_rows(self, cache: BlockCache, append: Append, rows: Tensor | None) -> MoreRows:
        chosen = append.new > 1
        held = append.held[chosen]
        pairs = zip(append.tables[chosen], held.tolist(), strict=True)
        keys = np.concatenate([rows_of(table, n, cache.block_size) for table, n in pairs])
        return MoreRows(rows, self.ops.from_numpy(keys), Spans.of_lengths(append.new[chosen], held, causal=True))

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        if not isinstance(plan, BlockPlan):
            super().cache_append(cache, layer, k, v, plan)
            return
        flat = (1, k.shape[0], k.shape[1] * k.shape[2])  # of (T, G, K) the primitive counts T * G rows
        new = (self.ops.reshape(x, flat) for x in (k, v))
        reshape_and_cache(*new, cache.keys[layer], cache.values[layer], plan.written)

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        if not isinstance(plan, BlockPlan):
            return super().attention_cached(q, cache, layer, plan)
        held = cache.keys[layer], cache.values[layer]
        check_groups(q.shape[1], held[0].shape[2])
        outs = []
        if plan.one is not None:
            outs.append(self._paged(self._chosen(q, plan.one.rows), held, plan.one))
        if plan.more is not None:
            outs.append(self._gathered(self._chosen(q, plan.more.rows), held, plan.more))
        return self._chosen(self.ops.concat(outs, 0), plan.order)

    def _paged(self, q: Tensor, held: Sequence[Tensor], one: OneRow) -> Tensor:
        rows, heads, size = q.shape
        kernel = PagedAttention(heads, size**-0.5, held[0].shape[2])
        out = kernel(self.ops.reshape(q, (rows, 1, heads * size)), *held, one.tables, one.held)
        return self.ops.reshape(out, q.shape)

    def _gathered(self, q: Tensor, held: Sequence[Tensor], more: MoreRows) -> Tensor:
        k, v = (self.ops.take_rows(self.ops.reshape(x, (-1, *x.shape[2:])), more.keys) for x in held)
        return self.ops.attention(q, k, v, more.spans)[0]

    def _chosen(self, x: Tensor, rows: Tensor | None) -> Tensor:
        return x if rows is None else self.ops.take_rows(x, rows)

    def cache_copy(self, cache: PagedCache, source: int, target: int, count: int) -> None:
        if not isinstance(cache, BlockCache):
            super().cache_copy(cache, source, target, count)
            return
        check_copy(cache.blocks, source, target, count)
        for blocks in (*cache.keys, *cache.values):
            self.ops.write_slice(blocks, target, blocks[source : source + count])
