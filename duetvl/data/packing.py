"""Which samples make a step, and how a step is cut into micro-batches. Nothing here knows of ranks or workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duetvl.core.errors import DataError
from duetvl.core.random import philox


@dataclass(frozen=True, order=True)
class Position:
    """The next sample that training will see: place `index` in the order of epoch `epoch`, both from 0."""

    epoch: int = 0
    index: int = 0


class Order:
    """An endless sequence of records: every epoch is a new permutation, fixed by (seed, epoch).

    A step may reach from one epoch into the next: no sample is left out, and every step has the same size.
    """

    def __init__(self, records: int, *, seed: int, shuffle: bool = True):
        """The order of so many records."""
        self.records = records
        self.seed = seed
        self.shuffle = shuffle
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def take(self, position: Position, count: int) -> tuple[list[int], Position]:
        """The record numbers of the next `count` samples, and where the ones after them start."""
        epoch, index = position.epoch, position.index
        if not 0 <= index < self.records:
            raise DataError(f"data position {index} lies outside the {self.records} records that there are")
        chosen: list[int] = []
        while len(chosen) < count:
            part = self._permutation(epoch)[index : index + count - len(chosen)]
            chosen += part.tolist()
            index += len(part)
            if index == self.records:
                epoch, index = epoch + 1, 0
        return chosen, Position(epoch, index)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._make(epoch)
        return self._epoch[1]

    def _make(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.records)
        # Sorting raw bits, as numpy promises the same bits in all its versions, but not the same permutations.
        keys = philox(self.seed, "data order", epoch).bit_generator.random_raw(self.records)
        return np.argsort(keys, kind="stable")


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut samples of the given lengths into packs of at most `limit` tokens, first fit decreasing.

    Returns the samples of each pack. Samples keep their order within a pack, packs are ordered by their first
    sample. A sample longer than `limit` is alone in its pack.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (at for at, left in enumerate(room) if lengths[sample] <= left)
        at = next(fits, len(packs))
        if at == len(packs):
            packs.append([])
            room.append(limit)
        packs[at].append(sample)
        room[at] -= lengths[sample]
    return sorted(sorted(samples) for samples in packs)
