"""Cached attention on a CPU in one form for prefill, chunks and decoding, so that all give the same bits.

What a row attends to is always read up to the end of a unit of 64 rows, and the rows of a pass are cut where units
end: a row's products then have the same inner sizes whatever is computed beside it, and hidden keys add exact zeros.
The heads of a key-value group are rows of one product, 8 or a multiple of it: with fewer, a library chooses kernels
by their number, which shows in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
import torch.nn.functional as F

from duetvl.backends.torch_npu.kv_cache import TorchKVCache
from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.core.composed.attention import check_groups
from duetvl.core.composed.kv_cache import PagedCache
from duetvl.core.kv_cache import Append, CachePlan, check_append, consecutive, rows_of

Tensor = torch.Tensor

UNIT = 64
PRODUCT_ROWS = 8


@dataclass(frozen=True)
class Tile:
    """Packed rows [start, stop) that stand in one unit of a sequence, from its row `first` on; keys: to its end."""

    start: int
    stop: int
    first: int
    keys: int


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """Sequences of a pass that are computed together: one, or several of one new row each that have as many keys.

    Their rows in the cache begin at `first`, those of the next one `spacing` rows further on; index (rows,) int64: of
    one sequence whose blocks are not consecutive. mask (count, 1, 1, keys): of several sequences.
    """

    count: int
    tiles: list[Tile]
    first: int = 0
    spacing: int = 0
    index: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TiledPlan:
    """written (T,) int64: rows that get k and v. cleared: rows behind them that are read and hidden."""

    written: Tensor
    cleared: Tensor | None
    unit: int
    runs: list[SequenceGroup]


class CpuKVCache(TorchKVCache):
    """See core/kv_cache.py."""

    def __init__(self, ops: TorchOps):
        super().__init__(ops)
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        check_append(append, cache.blocks, cache.block_size)
        unit = gcd(UNIT, cache.block_size)
        together = _neighbours(self._sequences(cache, append, unit))
        runs = [group[0] if len(group) == 1 else self._joined(group, cache, unit) for group in together]
        return TiledPlan(self.index(cache, append), self._cleared(cache, append, unit), unit, runs)

    def _sequences(self, cache: PagedCache, append: Append, unit: int) -> Iterator[SequenceGroup]:
        """A run for each sequence."""
        size, start = cache.block_size, 0
        lists = (append.before.tolist(), append.new.tolist(), consecutive(append, size).tolist())
        for table, before, new, in_place in zip(append.tables, *lists, strict=True):
            tiles = list(_tiles(start, before, new, unit))
            if in_place:
                yield SequenceGroup(1, tiles, first=int(table[0]) * size)
            else:
                yield SequenceGroup(1, tiles, index=self.ops.from_numpy(rows_of(table, tiles[-1].keys, size), "int64"))
            start += new

    def _joined(self, group: list[SequenceGroup], cache: PagedCache, unit: int) -> SequenceGroup:
        first, last = group[0].tiles[0], group[-1].tiles[0]
        rows = torch.tensor([run.tiles[0].first for run in group])
        mask = self._hidden(1, unit, first.keys, cache.keys[0].dtype)[rows, None, None]
        spacing = group[1].first - group[0].first
        return SequenceGroup(
            len(group), [Tile(first.start, last.stop, 0, first.keys)], group[0].first, spacing, None, mask
        )

    def _cleared(self, cache: PagedCache, append: Append, unit: int) -> Tensor | None:
        """Rows up to the end of units that the pass enters and does not fill: what was there may be no number."""
        ends = -(-append.held // unit) * unit
        rows = [
            rows_of(append.tables[s], int(ends[s]), cache.block_size)[append.held[s] :]
            for s in np.flatnonzero((ends > append.held) & (ends - unit >= append.before)).tolist()
        ]
        return self.ops.from_numpy(np.concatenate(rows), "int64") if rows else None

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        for rows, new in ((cache.keys[layer], k), (cache.values[layer], v)):
            rows.index_copy_(0, plan.written, new)
            if plan.cleared is not None:
                rows.index_fill_(0, plan.cleared, 0)

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        check_groups(q.shape[1], keys.shape[1])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for run in plan.runs:
            k, v = (x if run.index is None else x.index_select(0, run.index) for x in (keys, values))
            for tile in run.tiles:
                self._attend(out[tile.start : tile.stop], q[tile.start : tile.stop], k, v, run, tile, plan.unit)
        return out

    def _attend(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, run: SequenceGroup, tile: Tile, unit: int) -> None:
        """Write into out (count * n, H, K) what the rows of a tile see."""
        count, n, groups = run.count, q.shape[0] // run.count, k.shape[1]
        by_group = (count, n, groups, q.shape[1] // groups, q.shape[2])
        rows = n * by_group[3]
        queries = q.reshape(by_group).transpose(1, 2).reshape(count, groups, rows, by_group[4])
        queries = F.pad(queries, (0, 0, 0, -rows % PRODUCT_ROWS))
        mask = self._mask(tile, by_group[3], queries.shape[2], unit, q.dtype) if run.mask is None else run.mask
        found, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, _keys(k, run, tile), _keys(v, run, tile), 0.0, False, attn_mask=mask
        )
        out.view(by_group).copy_(found[:, :, :rows].unflatten(2, (n, by_group[3])).transpose(1, 2))

    def _mask(self, tile: Tile, heads: int, rows: int, unit: int, dtype: torch.dtype) -> Tensor:
        """(rows, keys) of one sequence's tile, each row for `heads` heads; those behind them may see anything."""
        first = tile.first * heads
        return self._hidden(heads, unit, tile.keys, dtype)[first : first + rows]

    def _hidden(self, heads: int, unit: int, keys: int, dtype: torch.dtype) -> Tensor:
        """(unit * heads + 8, keys): row i * heads + h hides of the last `unit` keys those behind the i-th."""
        mask = self._masks.get((heads, unit, dtype))
        if mask is None or mask.shape[1] < keys:
            width = 1 << (keys - 1).bit_length()
            mask = torch.zeros(unit * heads + PRODUCT_ROWS, width, dtype=dtype)
            later = torch.full((unit, unit), float("-inf"), dtype=dtype).triu(1)
            mask[: unit * heads, width - unit :] = later.repeat_interleave(heads, 0)
            self._masks[heads, unit, dtype] = mask
        return mask[:, mask.shape[1] - keys :]


def _tiles(start: int, before: int, new: int, unit: int) -> Iterator[Tile]:
    """The new rows of a sequence, cut where units end."""
    row = before
    while row < before + new:
        end = row // unit * unit + unit
        stop = min(end, before + new)
        yield Tile(start + row - before, start + stop - before, row % unit, end)
        row = stop


def _neighbours(runs: Iterator[SequenceGroup]) -> list[list[SequenceGroup]]:
    """Groups of neighbours that one call can read: one row each, as many keys, equally far apart in the cache."""
    groups: list[list[SequenceGroup]] = []
    for run in runs:
        if groups and _continues(groups[-1], run):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _continues(group: list[SequenceGroup], run: SequenceGroup) -> bool:
    last = group[-1]
    one_row = all(len(r.tiles) == 1 and r.tiles[0].stop - r.tiles[0].start == 1 for r in (last, run))
    in_place = last.index is None and run.index is None
    apart = run.first - last.first
    spacing = group[1].first - group[0].first if len(group) > 1 else apart
    return one_row and in_place and last.tiles[0].keys == run.tiles[0].keys and apart == spacing > 0


def _keys(x: Tensor, run: SequenceGroup, tile: Tile) -> Tensor:
    """The rows that a tile sees, as a view (count, G, keys, K)."""
    _, groups, size = x.shape
    row = groups * size
    return x.as_strided((run.count, groups, tile.keys, size), (run.spacing * row, size, row, 1), run.first * row)
