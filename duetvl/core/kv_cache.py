"""Protocol of the key-value cache used for generation. The cache is opaque: its layout is the backend's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Tensor = Any
Cache = Any


@dataclass(frozen=True, eq=False)
class Append:
    """Rows that one forward pass adds: for each sequence in the pass its slot, rows cached before, and new rows.

    slots, before, new are integer arrays (S,). The packed rows of the pass are the sequences end to end.
    """

    slots: np.ndarray
    before: np.ndarray
    new: np.ndarray

    @property
    def rows(self) -> int:
        """Packed rows of the pass."""
        return int(self.new.sum())


class KVCache(Protocol):
    """Keys and values of sequences in numbered slots. Nothing here is differentiable."""

    def cache_create(
        self, *, layers: int, slots: int, capacity: int, kv_heads: int, head_size: int, dtype: str
    ) -> Cache:
        """Room for `slots` sequences of at most `capacity` rows each, for every layer."""
        ...

    def cache_append(self, cache: Cache, layer: int, k: Tensor, v: Tensor, append: Append) -> None:
        """Store k and v (T, G, K), the packed new rows of the sequences in `append`, after the rows already there.

        Raises ConfigError, before anything is written, where a sequence would outgrow the capacity.
        """
        ...

    def attention_cached(self, q: Tensor, cache: Cache, layer: int, append: Append) -> Tensor:
        """Causal attention of the new rows q (T, H, K) to all rows of their own sequence -> (T, H, K).

        The new rows must be in the cache already (`cache_append` first). Scores are scaled by K ** -0.5.
        """
        ...


def packed_offsets(append: Append) -> Sequence[tuple[int, int, int, int]]:
    """(slot, first packed row, rows before, new rows) of each sequence."""
    starts = np.concatenate([[0], np.cumsum(append.new)[:-1]])
    return [
        (int(slot), int(start), int(before), int(new))
        for slot, start, before, new in zip(append.slots, starts, append.before, append.new, strict=True)
    ]
