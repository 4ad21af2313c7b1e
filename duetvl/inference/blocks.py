"""The pool of cache blocks: who holds which, and what of earlier sequences can still be found in them. No tensors.

A block is free, cached (held by nobody, its rows known by a key) or used. Keys are chained (`PrefixKeys`), so a block
is found only behind the same beginning. Where a backend wants a sequence's blocks to be consecutive, a sequence holds a
run that grows in place, or moves; what is found is then copied, or taken over where it lies. Where no run is left, the
blocks lie anywhere, which every backend can read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

KEY_BYTES: Final = 16


class Copy(NamedTuple):
    """`blocks` consecutive blocks whose rows move, in all layers. Copies are made in order, before anything else."""

    source: int
    target: int
    blocks: int


@dataclass(eq=False)
class Held:
    """The blocks of one sequence in the order of its rows. `promised` further ones behind a run are best left free."""

    blocks: list[int] = field(default_factory=list)
    promised: range = range(0)

    @property
    def is_run(self) -> bool:
        """Whether the blocks are consecutive."""
        return all(after == before + 1 for before, after in pairwise(self.blocks))


class BlockPool:
    """`size` numbered blocks. free + cached + used == size, always."""

    def __init__(self, size: int, *, consecutive: bool):
        self.size = size
        self.consecutive = consecutive
        self._holders = np.zeros(size, np.int64)
        self._promises = np.zeros(size, np.int64)  # by how many runs a block is hoped for
        self._stamp = np.zeros(size, np.int64)  # of cached blocks: the larger, the later they were used; 0 of others
        self._key: list[bytes | None] = [None] * size
        self._where: dict[bytes, int] = {}
        self._clock = 0

    @property
    def used(self) -> int:
        """Blocks that a sequence holds."""
        return int(np.count_nonzero(self._holders))

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that can be found again."""
        return int(np.count_nonzero(self._stamp))

    @property
    def free(self) -> int:
        """Blocks with nothing in them."""
        return int(np.count_nonzero((self._holders == 0) & (self._stamp == 0)))

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones and cached ones."""
        return self.size - self.used

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest beginning of `keys` that is there."""
        found: list[int] = []
        for key in keys:
            if key not in self._where:
                break
            found.append(self._where[key])
        return found

    def hold(self, found: Sequence[int], count: int, room: int) -> tuple[Held, list[Copy]] | None:
        """`count` blocks for a sequence, the first of them with the rows of `found`; None where there are too few.

        `room`: how many it may come to hold, for which a run looks for a place. Held blocks are given back by
        `release`.
        """
        if self.consecutive:
            run = self._take_over(found, count, room) or self._copied_run(found, count, room)
            if run is not None:
                return run
        if count - len(found) > self.available - int(np.count_nonzero(self._holders[list(found)] == 0)):
            return None
        held = Held()
        self._share(held, found)
        self._take(held, self._pick(count - len(found)))
        return held, []

    def grow(self, held: Held) -> list[Copy] | None:
        """One more block; None where there is none."""
        if self.available == 0:
            return None
        if self.consecutive:
            following = held.blocks[-1] + 1
            if held.is_run and following < self.size and self._holders[following] == 0:
                self._take(held, [following])
                self._promise(held, range(following + 1, max(following + 1, held.promised.stop)))
                return []
            moved = self._window(len(held.blocks) + 1, 2 * len(held.blocks))
            if moved is not None:
                return self._move(held, moved)
        self._take(held, self._pick(1))
        return []

    def keep(self, held: Held, index: int, key: bytes) -> None:
        """The rows of a sequence's block are complete: from now on they are found by `key`."""
        self._name(held.blocks[index], key)

    def release(self, held: Held) -> None:
        """Give the blocks back. Those with a key stay cached, the last ones to be forgotten first."""
        self._promise(held, range(0))
        self._clock += len(held.blocks)
        for place, block in enumerate(held.blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0 and self._key[block] is not None:
                self._stamp[block] = self._clock - place
        held.blocks = []

    def forget(self) -> None:
        """Nothing that is in any block is found again."""
        for block in list(self._where.values()):
            self._forget(block)

    def check(self) -> None:
        """Assert that every block is in one state, and keys and blocks name each other."""
        assert self.free + self.cached + self.used == self.size
        assert (self._holders >= 0).all() and (self._promises >= 0).all()
        named = {block: key for block, key in enumerate(self._key) if key is not None}
        assert {key: block for block, key in named.items()} == self._where
        idle = {block for block in named if self._holders[block] == 0}
        assert set(np.flatnonzero(self._stamp).tolist()) == idle

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _take_over(self, found: Sequence[int], count: int, room: int) -> tuple[Held, list[Copy]] | None:
        """The found blocks where they lie, if nobody holds them and there is a run behind them."""
        if not found:
            return None
        run = range(found[0], found[0] + count)
        if run.stop > self.size or list(found) != list(run[: len(found)]) or self._holders[run.start : run.stop].any():
            return None
        held = Held()
        self._share(held, found)
        self._take(held, run[len(found) :])
        self._promise(held, self._behind(held, room))
        return held, []

    def _copied_run(self, found: Sequence[int], count: int, room: int) -> tuple[Held, list[Copy]] | None:
        """A run somewhere else, into which the found blocks are copied."""
        self._holders[list(found)] += 1  # they must not lie in the run
        start = self._window(count, room)
        self._holders[list(found)] -= 1
        if start is None:
            return None
        held = Held()
        self._take(held, range(start, start + count))
        self._promise(held, self._behind(held, room))
        self._rename(found, held.blocks)
        return held, as_copies(found, held.blocks)

    def _move(self, held: Held, start: int) -> list[Copy]:
        """Move a sequence to a run that is one block longer."""
        old = Held(held.blocks)
        held.blocks = []
        self._take(held, range(start, start + len(old.blocks) + 1))
        self._promise(held, self._behind(held, 2 * len(old.blocks)))
        blocks = old.blocks
        self.release(old)
        self._rename(blocks, held.blocks)
        return as_copies(blocks, held.blocks)

    def _window(self, count: int, room: int) -> int | None:
        """The first block of `count` consecutive ones that nobody holds.

        Best with room behind them and out of the way of others; among several those whose loss matters least.
        """
        held = self._holders > 0
        wanted = held | (self._promises > 0)
        for length, avoid in ((max(room, count), wanted), (count, wanted), (count, held)):
            if length > self.size:
                continue
            possible = _window_sums(avoid, length) == 0
            if possible.any():
                loss = np.where(possible, _window_sums(self._stamp, length), np.iinfo(np.int64).max)
                return int(loss.argmin())
        return None

    def _behind(self, held: Held, room: int) -> range:
        last = held.blocks[-1] + 1
        return range(last, min(last + max(room - len(held.blocks), 0), self.size))

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _pick(self, count: int) -> list[int]:
        """Blocks that nobody holds: free ones first, then cached ones, those that were used longest ago first."""
        idle = np.flatnonzero(self._holders == 0)
        order = np.lexsort((idle, self._stamp[idle], self._promises[idle] > 0))
        return [int(block) for block in idle[order[:count]]]

    def _share(self, held: Held, blocks: Sequence[int]) -> None:
        """Hold blocks for what is in them."""
        for block in blocks:
            self._holders[block] += 1
            self._stamp[block] = 0
        held.blocks.extend(int(block) for block in blocks)

    def _take(self, held: Held, blocks: Sequence[int]) -> None:
        """Hold blocks to write to them."""
        for block in blocks:
            self._forget(block)
        self._share(held, blocks)

    def _promise(self, held: Held, blocks: range) -> None:
        self._promises[held.promised.start : held.promised.stop] -= 1
        self._promises[blocks.start : blocks.stop] += 1
        held.promised = blocks

    def _name(self, block: int, key: bytes) -> None:
        """Let a block be found by a key, unless one that is held is found by it already."""
        known = self._where.get(key)
        if known == block or (known is not None and self._holders[known] > 0):
            return
        if known is not None:
            self._forget(known)
        self._forget(block)
        self._key[block], self._where[key] = key, block

    def _rename(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Rows were copied: where nobody holds the source any more, the copy is what is found."""
        for source, target in zip(sources, targets, strict=False):
            key = self._key[source]
            if key is not None and self._holders[source] == 0:
                self._name(target, key)

    def _forget(self, block: int) -> None:
        key = self._key[block]
        if key is not None:
            del self._where[key]
        self._key[block] = None
        self._stamp[block] = 0


def as_copies(sources: Sequence[int], targets: Sequence[int]) -> list[Copy]:
    """Copies of single blocks, put together where both sides are consecutive; further targets are left alone."""
    copies: list[Copy] = []
    for source, target in zip(sources, targets, strict=False):
        last = copies[-1] if copies else None
        if last and source == last.source + last.blocks and target == last.target + last.blocks:
            copies[-1] = last._replace(blocks=last.blocks + 1)
        else:
            copies.append(Copy(source, target, 1))
    return copies


def _window_sums(values: np.ndarray, length: int) -> np.ndarray:
    """Sums of all windows of this length."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(sums[length:] - sums[:-length])


class PrefixKeys:
    """The keys of a sequence's complete blocks, each made of all that its rows depend on.

    `content(start, stop)` gives the bytes that tell rows apart: ids, and where media lie in them.
    """

    def __init__(self, root: bytes, block_size: int, content: Callable[[int, int], bytes]):
        self._size, self._content = block_size, content
        self._chain = [hashlib.sha256(root).digest()[:KEY_BYTES]]

    def first(self, count: int) -> list[bytes]:
        """The keys of the first `count` blocks, whose rows must be known."""
        while len(self._chain) <= count:
            start = (len(self._chain) - 1) * self._size
            rows = self._chain[-1] + self._content(start, start + self._size)
            self._chain.append(hashlib.sha256(rows).digest()[:KEY_BYTES])
        return self._chain[1 : count + 1]
