"""The order of records: which come in an epoch, and one after the other. Nothing here knows of ranks or workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from duetvl.core.errors import DataError
from duetvl.core.random import philox
from duetvl.data.sources.catalog import Records
from duetvl.data.sources.records import Ref


class Cursor(Protocol):
    """A place in an endless sequence of records."""

    @property
    def epoch(self) -> int:
        """The epoch of the next record."""
        ...

    def take(self, count: int) -> list[Ref]:
        """The next records; the cursor moves behind them."""
        ...

    def position(self) -> dict[str, Any]:
        """The place as a JSON mapping, from which an equal cursor goes on."""
        ...


class Mixture:
    """What each epoch holds of several sources, and in which order. The items of a source follow those before it.

    An item of weight w comes floor or ceil of w times in an epoch, and over many epochs w times in each: with 2 twice,
    with 0.5 in every other one. An epoch's order is a permutation fixed by (seed, epoch).
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float] | None = None, *, seed: int, shuffle: bool = True
    ):
        """Sources with these numbers of items."""
        self.counts = list(counts)
        self.weights = [Fraction(w).limit_denominator(10**6) for w in weights or [1.0] * len(self.counts)]
        self.seed, self.shuffle = seed, shuffle
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    @property
    def items(self) -> int:
        """Items of all sources, whatever their weights."""
        return sum(self.counts)

    @property
    def per_epoch(self) -> Fraction:
        """Items of an epoch, on average."""
        return sum((n * w for n, w in zip(self.counts, self.weights, strict=True)), Fraction(0))

    def epoch(self, epoch: int) -> np.ndarray:
        """The items of an epoch, int64, in order. The last one asked for is kept."""
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._make(epoch)
        return self._epoch[1]

    def _make(self, epoch: int) -> np.ndarray:
        parts, first = [], 0
        for source, (count, weight) in enumerate(zip(self.counts, self.weights, strict=True)):
            times = self._times(source, count, weight, epoch)
            items = np.arange(first, first + count)
            parts.append(items if isinstance(times, int) and times == 1 else np.repeat(items, times))
            first += count
        items = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return items[permutation(self.seed, "data order", epoch, len(items))] if self.shuffle else items

    def _times(self, source: int, count: int, weight: Fraction, epoch: int) -> int | np.ndarray:
        """How often each item comes: floor((e + 1) w + phase) - floor(e w + phase), the phases spread over [0, 1)."""
        a, b = weight.numerator, weight.denominator
        if b == 1:
            return a
        rank = np.empty(count, np.int64)
        rank[permutation(self.seed, "mixture", source, count)] = np.arange(count)

        def times_before(e: int) -> np.ndarray:
            whole, rest = divmod(e * a, b)
            return whole + (rest * count + rank * b) // (b * count)

        return times_before(epoch + 1) - times_before(epoch)


def permutation(seed: int, stream: str, counter: int, count: int) -> np.ndarray:
    """The numbers below `count` in an order of their own, the same wherever it is asked for.

    Sorts raw bits, as numpy promises the same bits in all its versions, but not the same permutations.
    """
    keys = philox(seed, stream, counter).bit_generator.random_raw(count)
    return np.argsort(keys, kind="stable")


def choice(seed: int, stream: str, counter: int, count: int, most: int | None) -> np.ndarray:
    """`most` of the numbers below `count`, ascending; all where there are no more."""
    if most is None or most >= count:
        return np.arange(count)
    return np.sort(permutation(seed, stream, counter, count)[:most])


class RecordCursor:
    """Goes through records that have an index, epoch by epoch; the position is the place in the epoch.

    A step may reach from one epoch into the next: no record is left out, and every step has the same size.
    """

    def __init__(
        self,
        records: Records,
        mixture: Mixture,
        chosen: np.ndarray | None = None,
        position: Mapping[str, Any] | None = None,
    ):
        """`chosen` are the records that the mixture's items stand for, by default all.

        Raises DataError where the position belongs to other data.
        """
        self.records, self.mixture, self.chosen = records, mixture, chosen
        position = position or {"epoch": 0, "index": 0, "records": mixture.items}
        if position.keys() != {"epoch", "index", "records"}:
            raise DataError("the data position is that of a stream; set data.streaming as it was")
        if position["records"] != mixture.items:
            raise DataError(
                f"has {mixture.items} records, but the checkpoint's data position is one of {position['records']}"
            )
        self._epoch, self._index = int(position["epoch"]), int(position["index"])
        if not 0 <= self._index < max(1, len(self._items())):
            raise DataError(f"data position {self._index} lies outside the {len(self._items())} records of its epoch")

    @property
    def epoch(self) -> int:
        """The epoch of the next record."""
        return self._epoch

    def take(self, count: int) -> list[Ref]:
        """The next records."""
        found: list[Ref] = []
        while len(found) < count:
            items = self._items()
            part = items[self._index : self._index + count - len(found)]
            part = part if self.chosen is None else self.chosen[part]
            found += [self.records.ref(int(index)) for index in part]
            self._index += len(part)
            if self._index == len(items):
                self._epoch, self._index = self._epoch + 1, 0
        return found

    def position(self) -> dict[str, Any]:
        """Epoch, place of the next record in it, and the number of records, to know the data by."""
        return {"epoch": self._epoch, "index": self._index, "records": self.mixture.items}

    def _items(self) -> np.ndarray:
        return self.mixture.epoch(self._epoch)
