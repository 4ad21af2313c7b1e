"""Longer operations written once, in terms of the seam's smaller ones; backends inherit and override."""

from duetvl.core.composed.ascend_attention import AscendAttention
from duetvl.core.composed.collectives import ComposedCollectives
from duetvl.core.composed.fused_attention import FusedAttention
from duetvl.core.composed.kv_cache import ComposedKVCache
from duetvl.core.composed.ops import ComposedOps

__all__ = ["AscendAttention", "ComposedCollectives", "ComposedKVCache", "ComposedOps", "FusedAttention"]
