"""Numbers of rows at which no row's result depends on the others, and how a pass is brought to them.

Libraries choose a kernel by the number of rows, and few rows may get other bits than the same ones among many. Where a
backend says that this is all there is to it (`Capabilities.steady_rows`), a pass that is padded to a steady number of
rows gives each row the bits that it has in any other pass. Which numbers are steady is found by trying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from duetvl.core.ops import Ops

MOST: Final = 64  # from this many rows on every number is steady


@dataclass(frozen=True)
class Padding:
    """`unsteady`: the numbers of rows that are not steady."""

    unsteady: frozenset[int] = frozenset()

    def pads(self, rows: int, sequences: int) -> int:
        """How many one-row sequences bring a pass to steady numbers: of rows, and of rows at the vocabulary."""
        pads = 0
        while rows + pads in self.unsteady or sequences + pads in self.unsteady:
            pads += 1
        return pads

    @property
    def most(self) -> int:
        """The most that a pass may need."""
        sizes = range(1, max(self.unsteady, default=0) + 1)
        return max((self.pads(rows, sequences) for rows in (*sizes, MOST) for sequences in sizes), default=0)


def find_padding(ops: Ops, dtype: str) -> Padding:
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
    return Padding(frozenset(found))
