"""What ranks hold together of a parameter (its unit), as flat tensors that travel: for each rank, its rows of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from duetvl.core.boxes import Shape
from duetvl.core.ops import Ops
from duetvl.parallel.division import Sharing, owned_rows

Tensor = Any


@dataclass(frozen=True)
class Unit:
    """A unit, the rows of it that each rank of its team owns, and the shape of what this rank computes with."""

    sharing: Sharing
    rows: Sequence[range]
    shape: Shape

    @classmethod
    def of(cls, sharing: Sharing, shape: Shape, ranks: int, path: str) -> Unit:
        """That of a parameter over a team of so many ranks; a rank that has no team owns what it has."""
        if ranks == 1:
            return cls(sharing, [range(shape[0])], shape)
        return cls(sharing, owned_rows(sharing.unit.shape[0], ranks, path), shape)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each rank."""
        width = math.prod(self.sharing.unit.shape[1:])
        return [len(rows) * width for rows in self.rows]

    def widened(self, ops: Ops, x: Tensor) -> Tensor:
        """What this rank computes with, or its gradient -> the flat unit, zeros where it has none."""
        before, _, behind = self._held
        blank = [[ops.zeros((count,), ops.dtype_of(x))] if count else [] for count in (before, behind)]
        return joined(ops, [*blank[0], ops.reshape(x, (-1,)), *blank[1]])

    def narrowed(self, ops: Ops, unit: Tensor) -> Tensor:
        """The flat unit -> what this rank computes with."""
        (own,) = cut(ops, unit, self._held)[1]
        return ops.reshape(own, self.shape)

    @cached_property
    def _held(self) -> tuple[int, int, int]:
        """Numbers of the unit before, in and behind what this rank has."""
        before, size = self.sharing.first * math.prod(self.shape[1:]), math.prod(self.shape)
        return before, size, sum(self.sizes) - before - size


@dataclass(frozen=True)
class Together:
    """Units that travel as one flat tensor, in which they lie by rank: for each rank, its rows of each unit."""

    units: Sequence[Unit]

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each rank."""
        return [sum(column) for column in zip(*(unit.sizes for unit in self.units), strict=True)]

    def by_rank(self, ops: Ops, flat: Sequence[Tensor]) -> Tensor:
        """The flat units as one."""
        if len(flat) == 1:  # it lies by rank as it is
            return flat[0]
        pieces = [cut(ops, x, unit.sizes) for x, unit in zip(flat, self.units, strict=True)]
        return joined(ops, list(chain.from_iterable(chain.from_iterable(zip(*pieces, strict=True)))))

    def by_unit(self, ops: Ops, whole: Tensor) -> list[Tensor]:
        """The flat units, one by one."""
        count = len(self.units)
        if count == 1:
            return [whole]
        pieces = cut(ops, whole, [unit.sizes[rank] for rank in range(len(self.sizes)) for unit in self.units])
        return [joined(ops, list(chain.from_iterable(pieces[place::count]))) for place in range(count)]

    def of_rank(self, ops: Ops, own: Tensor, rank: int) -> list[list[Tensor]]:
        """What a rank has of the whole -> of each unit, in a list, which is empty where that is nothing."""
        return cut(ops, own, [unit.sizes[rank] for unit in self.units])


def cut(ops: Ops, x: Tensor, sizes: Sequence[int]) -> list[list[Tensor]]:
    """The pieces of a tensor along its first axis, each in a list, which is empty for an empty piece."""
    if not any(sizes):
        return [[] for _ in sizes]
    pieces = iter(ops.split(x, [size for size in sizes if size], 0))
    return [[next(pieces)] if size else [] for size in sizes]


def joined(ops: Ops, pieces: Sequence[Tensor]) -> Tensor:
    """Flat tensors as one; a single one as it is, without a copy."""
    return pieces[0] if len(pieces) == 1 else ops.concat(pieces, 0)
