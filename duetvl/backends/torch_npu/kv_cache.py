"""The key-value cache on torch: written by one indexed copy a layer, read by the framework's own attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.core.composed import ComposedKVCache
from duetvl.core.composed.kv_cache import PagedCache, RowPlan
from duetvl.core.kv_cache import Append, CachePlan, places

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class IndexedPlan(RowPlan):
    """written: (T,) int64, the row of the cache of each packed row."""

    written: Tensor


class TorchKVCache(ComposedKVCache):
    """See core/kv_cache.py."""

    def __init__(self, ops: TorchOps):
        super().__init__(ops)
        self._tried: dict[tuple[str, int], bool] = {}

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        plan = super().plan(cache, append)
        return IndexedPlan(plan.writes, plan.pieces, self.index(cache, append))

    def index(self, cache: PagedCache, append: Append) -> Tensor:
        """The rows (T,) int64 of the cache that a pass writes."""
        return self.ops.from_numpy(places(append, cache.block_size), "int64")

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        cache.keys[layer].index_copy_(0, plan.written, k)
        cache.values[layer].index_copy_(0, plan.written, v)

    def agree(self, cache: PagedCache, *planners: Callable[[PagedCache, Append], CachePlan]) -> bool:
        """Whether two ways to plan lead to the same numbers, for caches of this dtype and head size: tried once.

        False, with a warning, where they differ or a kernel refuses.
        """
        kind = (self.ops.dtype_of(cache.keys[0]), cache.keys[0].shape[2])
        if kind not in self._tried:
            self._tried[kind] = True
            try:
                reason = "its numbers are others" if self._differ(planners, *kind) else None
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
            if reason is not None:
                self._tried[kind] = False
                what = f"the fast attention to a key-value cache in {kind[0]} with head size {kind[1]}"
                warnings.warn(f"{what} is off, as tried here: {reason}", stacklevel=2)
        return self._tried[kind]

    def _differ(
        self, planners: Sequence[Callable[[PagedCache, Append], CachePlan]], dtype: str, head_size: int
    ) -> bool:
        """Prompts, and then a chunk and a single row."""
        draw, tables, before = np.random.default_rng(0), np.array([[2, 3], [0, 1]], np.int32), np.zeros(2, np.int64)
        shape = {"layers": 1, "blocks": 4, "block_size": self.block_size, "kv_heads": 1, "head_size": head_size}
        caches = [self.cache_create(**shape, dtype=dtype) for _ in planners]
        for new in ([self.block_size + 2, 4], [3, 1]):
            append, outs = Append(tables, before, np.array(new)), []
            numbers = draw.standard_normal((append.rows, 4, head_size), dtype=np.float32)
            q, k, v = (self.ops.from_numpy(numbers[:, part], dtype) for part in (slice(2), [2], [3]))
            for cache, planner in zip(caches, planners, strict=True):
                plan = planner(cache, append)
                self.cache_append(cache, 0, k, v, plan)
                outs.append(self.attention_cached(q, cache, 0, plan).float())
            if not torch.allclose(outs[0], outs[1], atol=3e-2):
                return True
            before = append.held
        return False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new, rows = q.shape[0], k.shape[0]
        visible = None
        if 1 < new < rows:
            visible = torch.ones(new, rows, dtype=torch.bool, device=q.device).tril(rows - new)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=new == rows and new > 1, enable_gqa=True
        )
        return out[0].transpose(0, 1)
