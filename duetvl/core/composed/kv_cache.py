"""A key-value cache of two tensors a layer, rows of all slots end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from duetvl.core.composed.attention import check_groups
from duetvl.core.errors import ConfigError
from duetvl.core.kv_cache import Append, KVCache, packed_offsets
from duetvl.core.ops import Ops

Tensor = Any


@dataclass(frozen=True, eq=False)
class RowCache:
    """keys and values: for each layer (slots * capacity, G, K)."""

    capacity: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class ComposedKVCache(KVCache):
    """See core/kv_cache.py; a backend may override `attend`."""

    def __init__(self, ops: Ops):
        self.ops = ops

    def cache_create(
        self, *, layers: int, slots: int, capacity: int, kv_heads: int, head_size: int, dtype: str
    ) -> RowCache:
        shape = (slots * capacity, kv_heads, head_size)
        keys, values = (tuple(self.ops.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
        return RowCache(capacity, keys, values)

    def cache_append(self, cache: RowCache, layer: int, k: Tensor, v: Tensor, append: Append) -> None:
        places = packed_offsets(append)
        for slot, _, before, new in places:
            if before + new > cache.capacity:
                raise ConfigError(
                    f"slot {slot} of the key-value cache has {before} rows and room for {cache.capacity}; "
                    f"{new} more do not fit: create it with a larger capacity or generate fewer tokens"
                )
        for slot, start, before, new in places:
            first = slot * cache.capacity + before
            self.ops.write_slice(cache.keys[layer], first, k[start : start + new])
            self.ops.write_slice(cache.values[layer], first, v[start : start + new])

    def attention_cached(self, q: Tensor, cache: RowCache, layer: int, append: Append) -> Tensor:
        check_groups(q.shape[1], cache.keys[layer].shape[1])
        outs = []
        for slot, start, before, new in packed_offsets(append):
            first = slot * cache.capacity
            rows = slice(first, first + before + new)
            outs.append(self.attend(q[start : start + new], cache.keys[layer][rows], cache.values[layer][rows]))
        return self.ops.concat(outs, 0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, K), the last N rows of a sequence, attend causally to k and v (M, G, K) -> (N, H, K)."""
        ops = self.ops
        heads, groups, size = q.shape[1], k.shape[1], q.shape[2]
        q_heads = ops.transpose(ops.cast(q, "float32"), (1, 0, 2)) * size**-0.5
        k_heads, v_heads = (
            self._spread(ops.transpose(ops.cast(x, "float32"), (1, 0, 2)), heads // groups) for x in (k, v)
        )
        scores = ops.matmul(q_heads, k_heads, transpose_b=True)
        if q.shape[0] > 1:
            scores = scores + ops.from_numpy(_lower_right_mask(heads, q.shape[0], k.shape[0]))
        p = ops.exp(scores - ops.max(scores, -1, keepdims=True))
        out = ops.matmul(p, v_heads) / ops.sum(p, -1, keepdims=True)
        return ops.cast(ops.transpose(out, (1, 0, 2)), ops.dtype_of(q))

    def _spread(self, x: Tensor, times: int) -> Tensor:
        """(G, M, K) -> (G * times, M, K), each group repeated for its heads."""
        groups, rows, size = x.shape
        wide = self.ops.broadcast_to(self.ops.reshape(x, (groups, 1, rows, size)), (groups, times, rows, size))
        return self.ops.reshape(wide, (groups * times, rows, size))


def _lower_right_mask(heads: int, new: int, rows: int) -> np.ndarray:
    """(H, new, rows) float32: the last new row sees everything, the one before all but the last, and so on."""
    hidden = np.arange(rows)[None, :] > np.arange(rows - new, rows)[:, None]
    mask = np.where(hidden, np.float32(-1e30), np.float32(0))
    return np.ascontiguousarray(np.broadcast_to(mask, (heads, new, rows)))
