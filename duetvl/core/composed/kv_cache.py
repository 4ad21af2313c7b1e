"""A key-value cache of two tensors a layer, the rows of all blocks end to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from duetvl.core.composed.attention import check_groups
from duetvl.core.errors import ConfigError
from duetvl.core.kv_cache import (
    AT_ONCE,
    Append,
    CachePlan,
    KVCache,
    Recorder,
    check_append,
    consecutive,
    places,
    rows_of,
    stretches,
)
from duetvl.core.ops import Ops

Tensor = Any


@dataclass(frozen=True, eq=False)
class PagedCache:
    """keys and values: for each layer (blocks * block_size, G, K)."""

    block_size: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def blocks(self) -> int:
        """How many there are."""
        return int(self.keys[0].shape[0]) // self.block_size


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """A sequence of a pass: its packed rows, how many it then has, and where in the cache they all are.

    rows: a slice where its blocks are consecutive, else an index (held,) int32 on the device.
    """

    start: int
    stop: int
    held: int
    rows: slice | Tensor


@dataclass(frozen=True, eq=False)
class RowPlan:
    """writes: (first row of the cache, first packed row, one past the last) of each stretch of new rows."""

    writes: list[tuple[int, int, int]]
    pieces: list[SequenceRows]


class ComposedKVCache(KVCache):
    """See core/kv_cache.py; a backend may override `attend`."""

    block_size = 64
    consecutive = True
    recorded: tuple[int, ...] = ()

    def __init__(self, ops: Ops):
        self.ops = ops

    def cache_create(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: str
    ) -> PagedCache:
        shape = (blocks * block_size, kv_heads, head_size)
        keys, values = (tuple(self.ops.zeros(shape, dtype) for _ in range(layers)) for _ in range(2))
        return PagedCache(block_size, keys, values)

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        size = cache.block_size
        check_append(append, cache.blocks, size)
        stops, held = np.cumsum(append.new).tolist(), append.held.tolist()
        pieces = []
        for s, in_place in enumerate(consecutive(append, size).tolist()):
            rows = self._rows(append.tables[s], held[s], size, in_place)
            pieces.append(SequenceRows(stops[s] - int(append.new[s]), stops[s], held[s], rows))
        return RowPlan(stretches(places(append, size)), pieces)

    def _rows(self, table: np.ndarray, held: int, size: int, in_place: bool) -> slice | Tensor:
        if in_place:
            first = int(table[0]) * size
            return slice(first, first + held)
        return self.ops.from_numpy(rows_of(table, held, size))

    def recorder(self, cache: PagedCache) -> Recorder:
        return AT_ONCE

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        for first, start, stop in plan.writes:
            self.ops.write_slice(cache.keys[layer], first, k[start:stop])
            self.ops.write_slice(cache.values[layer], first, v[start:stop])

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        check_groups(q.shape[1], keys.shape[1])
        outs = [
            self.attend(q[piece.start : piece.stop], self._read(keys, piece), self._read(values, piece))
            for piece in plan.pieces
        ]
        return self.ops.concat(outs, 0)

    def _read(self, rows: Tensor, piece: SequenceRows) -> Tensor:
        """The piece's rows (held, G, K) of a layer's keys or values."""
        return rows[piece.rows] if isinstance(piece.rows, slice) else self.ops.take_rows(rows, piece.rows)

    def cache_copy(self, cache: PagedCache, source: int, target: int, count: int) -> None:
        check_copy(cache.blocks, source, target, count)
        size = cache.block_size
        for rows in (*cache.keys, *cache.values):
            self.ops.write_slice(rows, target * size, rows[source * size : (source + count) * size])

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


def check_copy(blocks: int, source: int, target: int, count: int) -> None:
    """Raise ConfigError unless the blocks of a copy are there and do not overlap."""
    last = max(source, target) + count
    if count < 1 or min(source, target) < 0 or last > blocks or abs(source - target) < count:
        raise ConfigError(
            f"a copy of {count} blocks from {source} to {target} in a key-value cache of {blocks}: both ranges must "
            f"be in it and not overlap"
        )


def _lower_right_mask(heads: int, new: int, rows: int) -> np.ndarray:
    """(H, new, rows) float32: the last new row sees everything, the one before all but the last, and so on."""
    hidden = np.arange(rows)[None, :] > np.arange(rows - new, rows)[:, None]
    mask = np.where(hidden, np.float32(-1e30), np.float32(0))
    return np.ascontiguousarray(np.broadcast_to(mask, (heads, new, rows)))
