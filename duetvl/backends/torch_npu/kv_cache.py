"""The key-value cache on torch: written by one indexed copy a layer, read by the framework's own attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from duetvl.core.composed import ComposedKVCache
from duetvl.core.composed.kv_cache import PagedCache, RowPlan
from duetvl.core.kv_cache import Append, Plan, places

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class IndexedPlan(RowPlan):
    """written: (T,) int64, the row of the cache of each packed row."""

    written: Tensor


class TorchKVCache(ComposedKVCache):
    """See core/kv_cache.py."""

    def plan(self, cache: PagedCache, append: Append) -> Plan:
        plan = super().plan(cache, append)
        return IndexedPlan(plan.writes, plan.pieces, self.index(cache, append))

    def index(self, cache: PagedCache, append: Append) -> Tensor:
        """The rows (T,) int64 of the cache that a pass writes."""
        return self.ops.from_numpy(places(append, cache.block_size), "int64")

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        cache.keys[layer].index_copy_(0, plan.written, k)
        cache.values[layer].index_copy_(0, plan.written, v)

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
