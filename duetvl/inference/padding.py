"""Numbers of rows to which a pass is brought: those at which no row's result depends on the others, or those at which
it can be recorded.

Libraries choose a kernel by the number of rows, and few rows may get other bits than the same ones among many. Where a
backend says that this is all there is to it (`Capabilities.steady_rows`), a pass that is padded to a steady number of
rows gives each row the bits that it has in any other pass. Which numbers are steady is found by trying.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.ops import Ops

MOST: Final = 64  # from this many rows on every number is steady


class Padding(Protocol):
    """How passes are padded, by one-row sequences. media_apart: each medium goes through the tower by itself."""

    media_apart: ClassVar[bool]

    def pads(self, rows: int, sequences: int) -> int:
        """How many are put behind a pass of these numbers of rows and sequences."""
        ...

    @property
    def most(self) -> int:
        """The most that a pass may need."""
        ...


def find_padding(backend: Backend, dtype: str, *, steady: bool, recorded: int) -> Padding | None:
    """steady: no bit of an answer is to depend on what else is in a pass. recorded: answers at once whose decoding
    may be recorded, 0 for none. None where the backend does neither, or need not be helped."""
    if steady and backend.capabilities.steady_rows:
        return find_steady(backend.ops, dtype)
    sizes = backend.kv_cache.recorded
    return DecodePadding(sizes[: bisect_left(sizes, recorded) + 1]) if sizes and recorded else None


@dataclass(frozen=True)
class DecodePadding:
    """Passes that give each sequence one row are brought to the next of these numbers, ascending; longer ones are not.

    Only they are the same over and over, and bound by the host's launches.
    """

    sizes: tuple[int, ...]
    media_apart: ClassVar[bool] = False

    def pads(self, rows: int, sequences: int) -> int:
        """See `Padding`."""
        if rows != sequences or sequences > self.sizes[-1]:
            return 0
        return self.sizes[bisect_left(self.sizes, sequences)] - sequences

    @property
    def most(self) -> int:
        """See `Padding`."""
        return max(self.pads(count, count) for count in range(1, self.sizes[-1] + 1))


@dataclass(frozen=True)
class SteadyPadding:
    """`unsteady`: the numbers of rows that are not steady."""

    unsteady: frozenset[int] = frozenset()
    media_apart: ClassVar[bool] = True

    def pads(self, rows: int, sequences: int) -> int:
        """What brings a pass to steady numbers: of rows, and of rows at the vocabulary."""
        pads = 0
        while rows + pads in self.unsteady or sequences + pads in self.unsteady:
            pads += 1
        return pads

    @property
    def most(self) -> int:
        """See `Padding`."""
        sizes = range(1, max(self.unsteady, default=0) + 1)
        return max((self.pads(rows, sequences) for rows in (*sizes, MOST) for sequences in sizes), default=0)


def find_steady(ops: Ops, dtype: str) -> SteadyPadding:
    """Which numbers of rows give a linear layer's rows other bits than many do.

    Tried on shapes large enough for a library's kernels and small enough for a few milliseconds.
    """
    rng = np.random.default_rng(0)
    found: set[int] = set()
    for inner, outer in ((64, 96), (256, 512)):
        x = rng.standard_normal((4 * MOST, inner), np.float32)
        weight = ops.from_numpy(rng.standard_normal((outer, inner), np.float32), dtype)
        many = ops.to_numpy(ops.linear(ops.from_numpy(x, dtype), weight))
        for count in range(1, MOST + 1):
            few = ops.to_numpy(ops.linear(ops.from_numpy(x[:count], dtype), weight))
            if not np.array_equal(few, many[:count]):
                found.add(count)
    return SteadyPadding(frozenset(found))
