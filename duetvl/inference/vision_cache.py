"""Which merged features of pictures and videos are kept: as long as chunks need them, then until there is no room.

Decides on integers alone; the features are where the passes run (runner.py), on each rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from duetvl.core.batch import PatchBytes, Rows, Sample
from duetvl.core.family import Placed


@dataclass(frozen=True, eq=False)
class Medium:
    """One picture or video of a prompt: its token rows first:last, its patch rows, and what tells it from others.

    `digest` is of the pixels as the tower sees them and of all that positions depend on.
    """

    first: int
    last: int
    patches: Rows
    grid: np.ndarray
    digest: bytes

    @property
    def tokens(self) -> int:
        """Its merged features."""
        return self.last - self.first


def media_of(sample: Sample, placed: Placed) -> tuple[Medium, ...]:
    """The media of a sample in the order of its tokens."""
    no_seconds: list[float | None] = [None] * len(sample.image_grid_thw)
    kinds = [
        (sample.pixel_values, sample.image_grid_thw, no_seconds),
        (sample.pixel_values_videos, sample.video_grid_thw, _seconds(sample)),
    ]
    first_feature = np.argsort(placed.src, kind="stable")  # places in dst, in the order of features
    found: list[Medium] = []
    features = 0
    for pixels, grids, seconds in kinds:
        start = 0
        for grid, second in zip(grids, seconds, strict=True):
            assert pixels is not None
            patches = int(grid.prod())
            rows = _part(pixels, start, start + patches)
            start += patches
            count = patches * len(placed.src) // max(_all_patches(sample), 1)
            first = int(placed.dst[first_feature[features]])
            features += count
            found.append(Medium(first, first + count, rows, grid, _digest(rows, grid, second)))
    return tuple(sorted(found, key=lambda medium: medium.first))


def _seconds(sample: Sample) -> list[float | None]:
    videos = len(sample.video_grid_thw)
    given = np.ones(videos) if sample.second_per_grid_ts is None else sample.second_per_grid_ts
    return [float(second) for second in given]


def _all_patches(sample: Sample) -> int:
    return int(sample.image_grid_thw.prod(axis=1).sum() + sample.video_grid_thw.prod(axis=1).sum())


def _part(pixels: Rows, start: int, stop: int) -> Rows:
    if isinstance(pixels, PatchBytes):
        return replace(pixels, values=pixels.values[start:stop])
    return np.asarray(pixels)[start:stop]


def _digest(rows: Rows, grid: np.ndarray, seconds: float | None) -> bytes:
    """None of `seconds`: a picture."""
    values, made = (rows.values, rows) if isinstance(rows, PatchBytes) else (np.asarray(rows), None)
    how = None if made is None else (made.temporal, made.mean, made.std, made.rescale)
    about = repr((values.dtype.str, values.shape, grid.tolist(), seconds, how))
    found = hashlib.sha256(about.encode())
    found.update(np.ascontiguousarray(values).data)
    return found.digest()


@dataclass(eq=False)
class _Entry:
    tokens: int
    holders: set[int] = field(default_factory=set)
    computed: bool = False


class VisionCache:
    """Room for the features of `room` merged tokens. Entries that nobody holds are forgotten when it is needed."""

    def __init__(self, room: int):
        self.room = room
        self._entries: dict[bytes, _Entry] = {}  # those used longest ago first
        self._forgotten: list[bytes] = []  # since `forgotten` was last asked

    @property
    def held(self) -> int:
        """Tokens of entries that a sequence holds."""
        return sum(entry.tokens for entry in self._entries.values() if entry.holders)

    @property
    def cached(self) -> int:
        """Tokens of entries that nobody holds."""
        return sum(entry.tokens for entry in self._entries.values() if not entry.holders)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def hold(self, key: bytes, tokens: int, holder: int) -> bool:
        """Keep an entry, old or new, until `holder` lets it go; False where there is no room for a new one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            if self.held + tokens > self.room:
                return False
            entry = _Entry(tokens)
            for old in list(self._unheld()):
                if self.held + self.cached + tokens <= self.room:
                    break
                self._forget(old)
        entry.holders.add(holder)
        self._entries[key] = entry
        return True

    def computed(self, key: bytes) -> None:
        """The features of an entry that is held are there."""
        self._entries[key].computed = True

    def forgotten(self) -> list[bytes]:
        """The keys whose features, where they were ever computed, are to be let go; each is told once."""
        keys, self._forgotten = self._forgotten, []
        return keys

    def release(self, key: bytes, holder: int) -> None:
        """Let go; nothing happens where the entry was not held. What was never computed is forgotten."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.holders.discard(holder)
        if not entry.holders and not entry.computed:
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        del self._entries[key]
        self._forgotten.append(key)

    def _unheld(self) -> Iterator[bytes]:
        return (key for key, entry in self._entries.items() if not entry.holders)

    def check(self) -> None:
        """Assert that what is kept has its room and was computed, or is held."""
        assert self.held + self.cached <= self.room
        assert all(entry.computed for entry in self._entries.values() if not entry.holders)
