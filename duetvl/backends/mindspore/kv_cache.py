"""The key-value cache on MindSpore: rows of all slots end to end, attention composed."""

from __future__ import annotations

from duetvl.core.composed import ComposedKVCache


class MindSporeKVCache(ComposedKVCache):
    """See core/kv_cache.py."""
