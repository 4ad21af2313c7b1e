"""Spans: which rows of a packed tensor may attend to which."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from duetvl.core.errors import ConfigError


class Places(NamedTuple):
    """Numbers of query and of key rows, (N,) and (M,) int32."""

    rows: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class EqualSpans:
    """`count` consecutive spans of the same `length`, each with `keys` key rows: one batched kernel call.

    Their query rows begin at `start`, their key rows at `key_start`.
    """

    start: int
    count: int
    length: int
    key_start: int
    keys: int

    @property
    def stop(self) -> int:
        """One past the last query row."""
        return self.start + self.count * self.length

    @property
    def key_stop(self) -> int:
        """One past the last key row."""
        return self.key_start + self.count * self.keys

    @property
    def shift(self) -> int:
        """Key rows before the one at which the first query row of a causal span stands."""
        return self.keys - self.length


class SpanRange(NamedTuple):
    """Neighbouring spans, counted from their own first rows, and the query and key rows that they cover."""

    rows: slice
    keys: slice
    spans: Spans


@dataclass(frozen=True, eq=False)
class Spans:
    """Consecutive stretches of query rows; each row attends to the key rows of its own span alone.

    cu_seqlens (S + 1,) int32 with the leading zero bounds the query rows of each span, cu_key_seqlens (S + 1,) its
    key rows; None: the keys are the query rows themselves. A span may have no query rows, or no keys. With `causal`
    the two are aligned at their last rows: the last query row of a span sees all its keys, the one before it all but
    the last, and so on; those that would come before the first key see nothing.
    """

    cu_seqlens: np.ndarray
    causal: bool
    cu_key_seqlens: np.ndarray | None = None

    @classmethod
    def of_lengths(
        cls, lengths: Iterable[int] | np.ndarray, keys: Iterable[int] | np.ndarray | None = None, *, causal: bool
    ) -> Spans:
        """Spans of the given lengths, end to end; those of no rows are left out.

        With `keys` each span has that many keys, and all are kept: pieces of queries and keys belong together by their
        places in the two lists.
        """
        rows = _as_lengths(lengths)
        if keys is None:
            return cls(_offsets(rows[rows != 0]), causal)
        return cls(_offsets(rows), causal, _offsets(_as_lengths(keys)))

    def __post_init__(self) -> None:
        if self.key_offsets.shape != self.cu_seqlens.shape:
            counts = f"{self.cu_seqlens.size - 1} spans of queries and {self.key_offsets.size - 1} of keys"
            raise ConfigError(f"{counts}: each span needs both, if only of length 0")
        if (np.diff(self.cu_seqlens) < 0).any() or (np.diff(self.key_offsets) < 0).any():
            raise ConfigError("a span has a negative number of rows or keys; cu_seqlens must not fall")

    @property
    def key_offsets(self) -> np.ndarray:
        """(S + 1,) int32, the bounds of the key rows in any case."""
        return self.cu_seqlens if self.cu_key_seqlens is None else self.cu_key_seqlens

    @property
    def rows(self) -> int:
        """Number of query rows that the spans cover."""
        return int(self.cu_seqlens[-1])

    @property
    def key_rows(self) -> int:
        """Number of key rows that the spans cover."""
        return int(self.key_offsets[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(S,) int32"""
        return np.diff(self.cu_seqlens)

    @cached_property
    def key_lengths(self) -> np.ndarray:
        """(S,) int32"""
        return np.diff(self.key_offsets)

    @cached_property
    def longest(self) -> int:
        """Query rows of the longest span; 0 without spans."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def most_keys(self) -> int:
        """Keys of the span that has the most; 0 without spans."""
        return int(self.key_lengths.max(initial=0))

    @cached_property
    def runs(self) -> tuple[EqualSpans, ...]:
        """Neighbouring spans of equal length and number of keys, joined."""
        lengths, keys = self.lengths, self.key_lengths
        if lengths.size == 0:
            return ()
        changes = np.flatnonzero((np.diff(lengths) != 0) | (np.diff(keys) != 0)) + 1
        bounds = [0, *changes.tolist(), lengths.size]
        return tuple(
            EqualSpans(int(self.cu_seqlens[a]), b - a, int(lengths[a]), int(self.key_offsets[a]), int(keys[a]))
            for a, b in pairwise(bounds)
        )

    def parts(self, most: int) -> Iterator[SpanRange]:
        """Groups of at most `most` neighbouring spans; where one is enough it holds these spans themselves."""
        if 0 < self.lengths.size <= most:
            yield SpanRange(slice(0, self.rows), slice(0, self.key_rows), self)
            return
        for a in range(0, self.lengths.size, most):
            ends, keys = self.cu_seqlens[a : a + most + 1], self.key_offsets[a : a + most + 1]
            yield SpanRange(
                slice(int(ends[0]), int(ends[-1])),
                slice(int(keys[0]), int(keys[-1])),
                Spans(ends - ends[0], self.causal, None if self.cu_key_seqlens is None else keys - keys[0]),
            )

    @cached_property
    def seeing(self) -> tuple[Spans, Places | None]:
        """The spans without rows that see no key and keys that no row sees, and what is left (None: everything).

        Each span of these has query rows and keys, and a causal one at least as many keys as rows.
        """
        rows, keys = self.lengths, self.key_lengths
        blind = np.where(keys == 0, rows, np.maximum(rows - keys, 0) if self.causal else 0)
        left = rows - blind
        used = left > 0
        unseen = np.where(used, 0, keys)
        if used.all() and not blind.any():
            return self, None
        seeing = Spans.of_lengths(left[used], keys[used], causal=self.causal)
        if not blind.any() and not unseen.any():
            return seeing, None
        return seeing, Places(_last_rows(self.cu_seqlens, left), _last_rows(self.key_offsets, keys - unseen))


def _as_lengths(lengths: Iterable[int] | np.ndarray) -> np.ndarray:
    return np.asarray(list(lengths), dtype=np.int64)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _last_rows(offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The last counts[i] rows of each span i, (N,) int32."""
    spans = zip(offsets[1:].tolist(), counts.tolist(), strict=True)
    return np.concatenate([np.arange(end - count, end, dtype=np.int32) for end, count in spans])
