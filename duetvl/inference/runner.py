"""The one file of the engine that touches a model: a plan becomes copies, features, one packed pass, and logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, stack_rows
from duetvl.core.family import Family
from duetvl.core.kv_cache import Append, Cache
from duetvl.inference.padding import Padding
from duetvl.inference.scheduler import Piece, Plan
from duetvl.inference.vision_cache import Medium, VisionCache

Tensor = Any


class Generator(Protocol):
    """What generation needs of a model."""

    @property
    def backend(self) -> Backend:
        """What it computes with."""
        ...

    @property
    def family(self) -> Family:
        """Its host side."""
        ...

    @property
    def dtype(self) -> str:
        """Of weights and cache."""
        ...

    @property
    def context(self) -> int:
        """Rows that a sequence may have."""
        ...

    @property
    def cache_block_bytes(self) -> int:
        """Bytes of a block of `create_cache`."""
        ...

    def pass_bytes(self, tokens: int, sequences: int, patches: int, kept: int) -> int:
        """The most that a pass over these numbers of tokens, sequences and patches makes, with `kept` features."""
        ...

    def create_cache(self, blocks: int) -> Cache:
        """A cache of blocks."""
        ...

    def features(self, batch: Batch) -> Tensor:
        """Merged features of the batch's media, in their order."""
        ...

    def extend(self, batch: Batch, features: Tensor | None, cache: Cache, append: Append) -> Tensor:
        """Logits (S, V) after each sequence of a pass, whose rows are put into the cache."""
        ...


class Runner:
    """Runs plans on models that share one cache: the model itself at "", and the same with an adapter by its name.

    With `padding` the numbers of rows that operations see are such that no row depends on the others, and each medium
    goes through the tower by itself.
    """

    def __init__(self, models: Mapping[str, Generator], blocks: int, vision: VisionCache, padding: Padding | None):
        """`blocks`: those of the pool; further ones hold the rows that pad a pass."""
        self.models, self.vision = models, vision
        model = models[""]
        self.ops, self.store = model.backend.ops, model.backend.kv_cache
        self.cache = model.create_cache(blocks + (padding.most if padding else 0))
        self.blocks, self.padding = blocks, padding

    def run(self, plan: Plan) -> Tensor:
        """The logits (S, vocabulary) after the pieces that end with a new token, in their order."""
        for copy in plan.copies:
            self.store.cache_copy(self.cache, *copy)
        model = self.models[plan.adapter]
        self._encode(model, plan)
        batch, features = self._tokens(plan.pieces)
        pads = self.padding.pads(batch.tokens, len(plan.pieces)) if self.padding else 0
        if pads:
            batch = _with_pads(batch, pads)
        logits = model.extend(batch, features, self.cache, self._append(plan.pieces, pads))
        return self._sampled(logits, plan.pieces)

    def _sampled(self, logits: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """The rows of pieces after which a token is chosen."""
        rows = [row for row, piece in enumerate(pieces) if piece.samples]
        if rows == list(range(len(rows))):
            return logits if len(rows) == logits.shape[0] else logits[: len(rows)]
        return self.ops.take_rows(logits, self.ops.from_numpy(np.array(rows, np.int32)))

    # -- pictures and videos ------------------------------------------------------------------------------------------

    def _encode(self, model: Generator, plan: Plan) -> None:
        """Compute the features that the plan asks for."""
        passes = [[each] for each in plan.encode] if self.padding else [plan.encode] if plan.encode else []
        for media in passes:
            features = model.features(_media_batch([medium for _, medium in media]))
            start = 0
            for key, medium in media:
                # Rows of their own: a slice would keep the features of all media alive.
                own = features if len(media) == 1 else self._rows(features, start, start + medium.tokens)
                self.vision.put(key, own)
                start += medium.tokens

    def _rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        return self.ops.take_rows(x, self.ops.from_numpy(np.arange(start, stop, dtype=np.int32)))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _tokens(self, pieces: Sequence[Piece]) -> tuple[Batch, Tensor | None]:
        """The rows of all pieces end to end, and the features that some of them take."""
        ids = np.concatenate([piece.sequence.rows(piece.start, piece.stop) for piece in pieces])
        positions = np.concatenate([piece.sequence.places(piece.start, piece.stop) for piece in pieces], axis=1)
        batch = Batch.of_tokens(ids, positions, np.array([piece.stop - piece.start for piece in pieces]))
        taken, dst = [], []
        for packed, piece in zip(batch.cu_seqlens.tolist(), pieces, strict=False):
            for medium in piece.sequence.within(piece.start, piece.stop):
                start, stop = max(medium.first, piece.start), min(medium.last, piece.stop)
                features = self.vision.get(piece.sequence.feature_key(medium))
                part = slice(start - medium.first, stop - medium.first)
                taken.append(features if stop - start == medium.tokens else features[part])
                dst.append(packed + np.arange(start, stop) - piece.start)
        if not taken:
            return batch, None
        rows = np.concatenate(dst).astype(np.int32)
        routed = replace(batch, visual_dst=rows, visual_src=np.arange(len(rows), dtype=np.int32))
        return routed, taken[0] if len(taken) == 1 else self.ops.concat(taken, 0)

    def _append(self, pieces: Sequence[Piece], pads: int) -> Append:
        held = [piece.sequence.held.blocks if piece.sequence.held else [] for piece in pieces]
        tables = np.full((len(pieces) + pads, max(map(len, held))), -1, np.int32)
        for row, blocks in enumerate(held):
            tables[row, : len(blocks)] = blocks
        tables[len(pieces) :, 0] = self.blocks + np.arange(pads)
        before = [piece.start for piece in pieces] + [0] * pads
        new = [piece.stop - piece.start for piece in pieces] + [1] * pads
        return Append(tables, np.array(before, np.int64), np.array(new, np.int64))


def _with_pads(batch: Batch, pads: int) -> Batch:
    """The batch, and behind it `pads` sequences of one row each."""
    rows = Batch.of_tokens(
        np.concatenate([batch.input_ids, np.zeros(pads, np.int32)]),
        np.concatenate([batch.position_ids, np.zeros((3, pads), np.int32)], axis=1),
        np.concatenate([np.diff(batch.cu_seqlens), np.ones(pads, np.int32)]),
    )
    return replace(rows, visual_dst=batch.visual_dst, visual_src=batch.visual_src)


def _media_batch(media: Sequence[Medium]) -> Batch:
    """Media alone, as the vision tower takes them."""
    nothing = Batch.of_tokens(np.zeros(0, np.int32), np.zeros((3, 0), np.int32), np.zeros(0, np.int32))
    grids = np.stack([medium.grid for medium in media])
    return replace(nothing, pixel_rows=stack_rows([m.patches for m in media], media[0].patches.shape[1]), grids=grids)
