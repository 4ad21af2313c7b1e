"""Boxes: which part of a whole tensor is meant, so that slices know nothing of ranks and layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

Shape = tuple[int, ...]
_MOST_CELLS: Final = 1 << 24  # far beyond any layout; a file may claim anything


@dataclass(frozen=True)
class Box:
    """The block of a tensor that starts at `offset` and has this shape; both have one number per axis."""

    offset: tuple[int, ...]
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def volume(self) -> int:
        """How many numbers are in it."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape has all of the box."""
        if not len(self.offset) == len(self.shape) == len(shape):
            return False
        return all(min(o, n) >= 0 and o + n <= s for o, n, s in zip(self.offset, self.shape, shape, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """What both have, in coordinates of the whole tensor; None where that is nothing."""
        spans = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        shared = [(max(a, b), min(a + m, b + n)) for a, m, b, n in spans]
        if any(start >= stop for start, stop in shared):
            return None
        return Box(tuple(start for start, _ in shared), tuple(stop - start for start, stop in shared))

    def seen_from(self, other: Box) -> Box:
        """The same block in the coordinates of a box that contains it."""
        return Box(tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)), self.shape)


@dataclass(frozen=True)
class Slices:
    """The part of a whole tensor that is held as one: boxes of it, joined along an axis in their order.

    A rank's share of a fused [q; k; v] is three boxes.
    """

    boxes: tuple[Box, ...]
    axis: int = 0

    @classmethod
    def whole(cls, shape: Shape) -> Slices:
        """All of a tensor of this shape."""
        return cls((Box.whole(shape),))

    @property
    def shape(self) -> tuple[int, ...]:
        """What the joined boxes have; nothing for none."""
        if not self.boxes:
            return ()
        first = self.boxes[0].shape
        if not first:
            return first
        length = sum(box.shape[self.axis] for box in self.boxes)
        return (*first[: self.axis], length, *first[self.axis + 1 :])

    def rows(self, start: int, stop: int) -> Slices:
        """The rows [start, stop) of what is held, on its first axis."""
        if self.axis != 0:
            return Slices(tuple(_cut(box, start, stop) for box in self.boxes), self.axis)
        kept, at = [], 0
        for box in self.boxes:
            first, last = max(start - at, 0), min(stop - at, box.shape[0])
            at += box.shape[0]
            if first < last:
                kept.append(_cut(box, first, last))
        return Slices(tuple(kept) or (_cut(self.boxes[0], 0, 0),))


@dataclass(frozen=True)
class LocalPart:
    """What a process holds of a tensor: the shape of the whole, and its slices of it."""

    whole: Shape
    slices: Slices

    @classmethod
    def all_of(cls, shape: Shape) -> LocalPart:
        """Everything."""
        return cls(tuple(shape), Slices.whole(tuple(shape)))

    @property
    def shape(self) -> Shape:
        """Of what is held."""
        return self.slices.shape

    @property
    def is_all(self) -> bool:
        """Whether it is the whole tensor."""
        return self.slices.boxes == (Box.whole(self.whole),)

    def of(self, array: np.ndarray) -> np.ndarray:
        """The part of a whole array: a view where it is one box."""
        pieces = [array[box.slices] for box in self.slices.boxes]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, self.slices.axis)

    def rows(self, start: int, stop: int) -> LocalPart:
        """The rows [start, stop) of what is held, on its first axis."""
        return LocalPart(self.whole, self.slices.rows(start, stop))


def _cut(box: Box, start: int, stop: int) -> Box:
    """The rows [start, stop) of a box, numbered from its own first."""
    return Box((box.offset[0] + start, *box.offset[1:]), (stop - start, *box.shape[1:]))


def fills(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether boxes make up a tensor of this shape: each of its numbers is in exactly one of them."""
    if not all(box.inside(shape) for box in boxes) or sum(box.volume for box in boxes) != math.prod(shape):
        return False
    return len(boxes) < 2 or not shape or not _overlapping(boxes)


def _overlapping(boxes: Sequence[Box]) -> bool:
    """Whether two boxes have a number in common, looked for on the grid that all their ends make."""
    starts = np.array([box.offset for box in boxes])
    ends = np.stack([starts, starts + np.array([box.shape for box in boxes])])
    places, cells = [], []
    for axis in range(starts.shape[1]):
        cuts, at = np.unique(ends[:, :, axis], return_inverse=True)
        places.append(at.reshape(2, -1).T.tolist())
        cells.append(len(cuts) - 1)
    if math.prod(cells) > _MOST_CELLS:
        return True
    taken = np.zeros(cells, bool)
    for spans in zip(*places, strict=True):
        where = tuple(slice(start, stop) for start, stop in spans)
        if taken[where].any():
            return True
        taken[where] = True
    return False
