"""A plan as every rank runs it: arrays alone, which travel to the ranks that decide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from duetvl.core.batch import Batch, Rows, stack_rows
from duetvl.core.kv_cache import Append
from duetvl.inference.blocks import Copy
from duetvl.inference.padding import Padding
from duetvl.inference.scheduler import Chunk, PassPlan


class Shown(NamedTuple):
    """A medium whose features are to be computed: what they are kept under, how many there are, patch rows and grid."""

    key: bytes
    tokens: int
    patches: Rows
    grid: np.ndarray


class Taken(NamedTuple):
    """Rows start:stop of the features under a key."""

    key: bytes
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass of the model over S sequences, T rows.

    First features are forgotten, blocks copied, and media encoded, those of one element of `encode` in one pass of the
    tower. Then come the rows: ids (T,) int32, positions (3, T) int32, what `append` does to the cache. Row `filled[i]`
    (V,) int32 takes the i-th feature of those `taken`, end to end.
    """

    adapter: str
    forget: Sequence[bytes]
    copies: Sequence[Copy]
    encode: Sequence[Sequence[Shown]]
    ids: np.ndarray
    positions: np.ndarray
    append: Append
    taken: Sequence[Taken]
    filled: np.ndarray

    @property
    def batch(self) -> Batch:
        """The rows as the model takes them."""
        rows = Batch.of_tokens(self.ids, self.positions, self.append.new)
        return replace(rows, visual_dst=self.filled, visual_src=np.arange(len(self.filled), dtype=np.int32))


def pack(plan: PassPlan, padding: Padding | None, blocks: int) -> Pass:
    """A plan in arrays. `padding` puts one-row sequences behind the others, in the blocks that follow the pool's
    `blocks`, and may have each medium go through the tower by itself."""
    pieces = plan.pieces
    shown = [Shown(key, medium.tokens, medium.patches, medium.grid) for key, medium in plan.encode]
    ids = np.concatenate([piece.sequence.rows(piece.start, piece.stop) for piece in pieces])
    positions = np.concatenate([piece.sequence.places(piece.start, piece.stop) for piece in pieces], axis=1)
    taken, filled = _routes(pieces)
    pads = padding.pads(len(ids), len(pieces)) if padding else 0
    return Pass(
        plan.adapter,
        plan.forget,
        plan.copies,
        [[each] for each in shown] if padding and padding.media_apart else [shown] if shown else [],
        np.concatenate([ids, np.zeros(pads, np.int32)]),
        np.concatenate([positions, np.zeros((3, pads), np.int32)], axis=1),
        _append(pieces, pads, blocks),
        taken,
        filled,
    )


def _routes(pieces: Sequence[Chunk]) -> tuple[list[Taken], np.ndarray]:
    """Which features the rows of a pass take, and which rows these are."""
    taken, rows, first = list[Taken](), [np.zeros(0, np.int32)], 0
    for piece in pieces:
        for medium in piece.sequence.within(piece.start, piece.stop):
            start, stop = max(medium.first, piece.start), min(medium.last, piece.stop)
            key = piece.sequence.feature_key(medium)
            taken.append(Taken(key, start - medium.first, stop - medium.first))
            rows.append(np.arange(start, stop, dtype=np.int32) + np.int32(first - piece.start))
        first = first + piece.stop - piece.start
    return taken, np.concatenate(rows)


def _append(pieces: Sequence[Chunk], pads: int, blocks: int) -> Append:
    held = [piece.sequence.held.blocks if piece.sequence.held else [] for piece in pieces]
    tables = np.full((len(pieces) + pads, max(map(len, held))), -1, np.int32)
    for row, own in enumerate(held):
        tables[row, : len(own)] = own
    tables[len(pieces) :, 0] = blocks + np.arange(pads)
    before = [piece.start for piece in pieces] + [0] * pads
    new = [piece.stop - piece.start for piece in pieces] + [1] * pads
    return Append(tables, np.array(before, np.int64), np.array(new, np.int64))


def media_batch(media: Sequence[Shown]) -> Batch:
    """Media alone, as the vision tower takes them."""
    nothing = Batch.of_tokens(np.zeros(0, np.int32), np.zeros((3, 0), np.int32), np.zeros(0, np.int32))
    patches = [one.patches for one in media]
    grids = np.stack([one.grid for one in media])
    return replace(nothing, pixel_rows=stack_rows(patches, patches[0].shape[1]), grids=grids)
