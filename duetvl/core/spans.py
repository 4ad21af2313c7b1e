"""Spans: which rows of a packed tensor may attend to which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Run:
    """`count` spans of the same `length` lying end to end from row `start`: one batched kernel call."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + self.count * self.length


@dataclass(frozen=True, eq=False)
class Spans:
    """Consecutive stretches of rows; each row attends to the rows of its own span alone.

    cu_seqlens (S + 1,) int32 with the leading zero; every span has at least one row. With `causal`, a row
    attends to itself and the rows before it in its span.
    """

    cu_seqlens: np.ndarray
    causal: bool

    @classmethod
    def of_lengths(cls, lengths: Iterable[int] | np.ndarray, *, causal: bool) -> Spans:
        """Spans of the given lengths, end to end; lengths of zero are left out."""
        sizes = np.asarray(list(lengths), dtype=np.int64)
        sizes = sizes[sizes > 0]
        return cls(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), causal)

    @property
    def rows(self) -> int:
        """Number of rows that the spans cover."""
        return int(self.cu_seqlens[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(S,) int32"""
        return np.diff(self.cu_seqlens)

    @cached_property
    def longest(self) -> int:
        """Rows of the longest span; 0 without spans."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbouring spans of equal length, joined."""
        lengths = self.lengths
        if lengths.size == 0:
            return ()
        first = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1])
        counts = np.diff(np.concatenate([first, [lengths.size]]))
        return tuple(
            Run(int(self.cu_seqlens[at]), int(count), int(lengths[at])) for at, count in zip(first, counts, strict=True)
        )

    def parts(self, most: int) -> Iterator[tuple[slice, Spans]]:
        """Groups of at most `most` neighbouring spans: the rows they cover, and the spans counted from there."""
        for a in range(0, self.lengths.size, most):
            ends = self.cu_seqlens[a : a + most + 1]
            yield slice(int(ends[0]), int(ends[-1])), Spans(ends - ends[0], self.causal)
