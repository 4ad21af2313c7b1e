"""Protocol of the key-value cache used for generation: blocks of rows, and tables that say whose they are.

The cache is opaque: its layout is the backend's. Who owns which block, and what is shared, is decided above the seam;
the host's tables are the only way to name a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from duetvl.core.errors import ConfigError

Tensor = Any
Cache = Any
CachePlan = Any
Given = TypeVar("Given")


@dataclass(frozen=True, eq=False)
class Append:
    """Rows that one forward pass adds to S sequences. The packed rows of the pass are the sequences end to end.

    tables (S, most blocks) int32: the blocks that hold a sequence's rows, in order; -1, which is never looked at,
    beyond a sequence's own. Its row r lies in block `tables[s, r // block_size]`. Sequences may share blocks of rows
    that are there already; a block that a pass writes into belongs to one sequence.
    before (S,) integers: rows that are there already. new (S,): rows that the pass adds, at least one.
    """

    tables: np.ndarray
    before: np.ndarray
    new: np.ndarray

    @property
    def rows(self) -> int:
        """Packed rows of the pass."""
        return int(self.new.sum())

    @property
    def held(self) -> np.ndarray:
        """(S,) rows of each sequence once the pass is done."""
        return self.before + self.new


class Recorder:
    """Runs the passes of one model over one cache; a backend may keep the work of a pass and have the device repeat it.

    Then what differs between two passes with as many sequences of one new row each reaches the device by
    `Ops.from_numpy` within `prepare`, in the same order and shapes, and `run` moves nothing. Weights and cache stay the
    same tensors. What is returned may be overwritten by the next pass.
    """

    def run(self, append: Append, prepare: Callable[[], Given], run: Callable[[Given], Tensor]) -> Tensor:
        """`run(prepare())`, of a pass that does `append` to the cache."""
        return run(prepare())


AT_ONCE: Final = Recorder()


class KVCache(Protocol):
    """Keys and values in numbered blocks. A pass is planned once, on the host; nothing here is differentiable.

    block_size: rows of a block that suit the device's kernels.
    recorded: the numbers of sequences, ascending, at which a `recorder` keeps passes that add a row to each of them.
    consecutive: whether the blocks of a sequence should be consecutive numbers, in order. Where they are its rows are
    read in place, else they are gathered for every layer of every pass; the result is the same.
    """

    block_size: int
    consecutive: bool
    recorded: tuple[int, ...]

    def cache_create(
        self, *, layers: int, blocks: int, block_size: int, kv_heads: int, head_size: int, dtype: str
    ) -> Cache:
        """`blocks` blocks of `block_size` rows for every layer. kv_heads: those that `cache_append` brings."""
        ...

    def plan(self, cache: Cache, append: Append) -> CachePlan:
        """What the calls of one pass need to know of its tables, for all layers, on the device where it is read there.

        Raises ConfigError where a sequence adds nothing, would outgrow its blocks, or names one that is not there.
        """
        ...

    def recorder(self, cache: Cache) -> Recorder:
        """What runs the passes of one model over a cache."""
        ...

    def cache_append(self, cache: Cache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        """Store k and v (T, G, K), the packed new rows of the planned pass, behind the rows that are there."""
        ...

    def attention_cached(self, q: Tensor, cache: Cache, layer: int, plan: CachePlan) -> Tensor:
        """Causal attention of the new rows q (T, H, K) to all rows of their own sequence -> (T, H, K) in q's dtype.

        The new rows must be in the cache already (`cache_append` first). Scores are scaled by K ** -0.5; the query
        heads i of H attend to the head i * G // H of G.
        """
        ...

    def cache_copy(self, cache: Cache, source: int, target: int, count: int) -> None:
        """Copy `count` blocks from block `source` on to block `target` on, in all layers; they must not overlap."""
        ...


def check_append(append: Append, blocks: int, block_size: int) -> None:
    """Raise ConfigError where a sequence adds nothing, outgrows its blocks, or names one that is not there."""
    own = np.logical_and.accumulate(append.tables >= 0, 1)
    room = own.sum(1) * block_size
    for s in np.flatnonzero((append.new < 1) | (append.held > room) | (append.before < 0)).tolist():
        raise ConfigError(
            f"sequence {s} of a pass has {append.before[s]} rows in the key-value cache and room for {room[s]}; it "
            f"adds {append.new[s]}: a pass adds at least one row to each of its sequences, and no more than fit"
        )
    if append.tables.max(initial=-1) >= blocks:
        raise ConfigError(
            f"a pass names block {append.tables.max()} of a key-value cache that has {blocks}, counted from 0: "
            f"create it with more blocks"
        )
    place = np.arange(append.tables.shape[1])
    after, to = append.before // block_size, blocks_used(append, block_size)
    written = append.tables[(place >= after[:, None]) & (place < to[:, None])]
    assert len(np.unique(written)) == len(written), "two sequences of a pass write into one block"


def places(append: Append, block_size: int) -> np.ndarray:
    """(rows,) int32: the row of the cache, its blocks end to end, that each packed row of a pass is written to."""
    sequence = np.repeat(np.arange(len(append.new)), append.new)
    first = np.cumsum(append.new) - append.new
    row = np.arange(append.rows) + (append.before - first)[sequence]
    return (append.tables[sequence, row // block_size] * block_size + row % block_size).astype(np.int32)


def rows_of(table: np.ndarray, rows: int, block_size: int) -> np.ndarray:
    """(rows,) int32: where in the cache, its blocks end to end, the first `rows` rows of a sequence are."""
    found = table[: -(-rows // block_size), None] * block_size + np.arange(block_size)
    return found.reshape(-1)[:rows].astype(np.int32)


def blocks_used(append: Append, block_size: int) -> np.ndarray:
    """(S,) blocks that the rows of each sequence reach into once the pass is done."""
    return -(-append.held // block_size)


def consecutive(append: Append, block_size: int) -> np.ndarray:
    """(S,) bool: whether the used blocks of each sequence are consecutive numbers."""
    beyond = np.arange(1, append.tables.shape[1]) >= blocks_used(append, block_size)[:, None]
    return ((np.diff(append.tables) == 1) | beyond).all(1)


def stretches(rows: np.ndarray) -> list[tuple[int, int, int]]:
    """(first row, start, stop) of the longest stretches of `rows[start:stop]` that count upwards one by one."""
    bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [(int(rows[a]), a, b) for a, b in pairwise(bounds)]
