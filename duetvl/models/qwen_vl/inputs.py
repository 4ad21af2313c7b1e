"""A batch on the device: what the model is a function of, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duetvl.core.batch import Batch
from duetvl.core.ops import Ops
from duetvl.models.attention import Attend, attend_within
from duetvl.models.layout import Layout, Move, stay
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.language import Tokens
from duetvl.models.qwen_vl.tables import VisionTables, batch_tables, rope_tables
from duetvl.models.qwen_vl.vision import VisionInput
from duetvl.models.recompute import Recompute

Tensor = Any


@dataclass(frozen=True, eq=False)
class Routes:
    """Which token takes which merged feature: token row dst[i] takes feature row src[i], or row i where src is None,
    of what `bring` makes of the tower's features: those that the tokens here take, from wherever they are."""

    dst: Tensor
    src: Tensor | None
    bring: Move = stay

    def taken(self, ops: Ops, features: Tensor) -> Tensor:
        """Features (M, D) of the tower here -> those that tokens take (V, D), in the order of `dst`."""
        brought = self.bring(features)
        return brought if self.src is None else ops.take_rows(brought, self.src)


@dataclass(frozen=True)
class Sizes:
    """How many patch rows, merged features and rows of hidden states this rank has between two layers."""

    rows: int
    patches: int = 0
    features: int = 0


@dataclass(frozen=True, eq=False)
class ModelInput:
    """ids (T,) of a batch, what its tokens bring to every layer, and its media: None of both where it has none.

    `visual` is None too where this rank does not run the vision tower. Of some tokens of a batch, `rows` (T,) are their
    numbers among those of all.
    """

    ids: Tensor
    tokens: Tokens
    sizes: Sizes
    visual: VisionInput | None = None
    routes: Routes | None = None
    rows: np.ndarray | None = None

    def recomputing(self, vision: Recompute, language: Recompute) -> ModelInput:
        """The same input of a pass on a tape whose towers run again what these say."""
        visual = None if self.visual is None else replace(self.visual, recompute=vision)
        return replace(self, visual=visual, tokens=replace(self.tokens, recompute=language))

    def rows_of(self, module: str) -> np.ndarray | None:
        """The numbers of the rows that a module sees among those of the whole batch; None: it sees all."""
        if not module.startswith("visual."):
            return self.rows
        if self.visual is None:
            return None
        return self.visual.merged_rows if module.startswith("visual.merger.") else self.visual.rows


def model_input(
    ops: Ops,
    family: QwenVLFamily,
    batch: Batch,
    dtype: str,
    layout: Layout,
    *,
    tower: bool = True,
    sees: bool = False,
) -> ModelInput:
    """A batch, its media included, in the vision tower's order, as far as this rank runs it. `dtype`: that of the
    weights.

    tower: whether this rank runs any of the vision tower; without it no pixels go to the device. sees: whether the
    tower is run without media too, on no rows.
    """
    tables = batch_tables(family.config, batch)
    rows = layout.own_rows(np.diff(batch.cu_seqlens))
    angles = tables.language.cos[rows], tables.language.sin[rows]
    tokens = _tokens(ops, angles, layout.causal(ops, tables.language.spans), layout)
    ids = ops.from_numpy(layout.looked_up(batch.input_ids, batch.visual_dst)[rows])
    sizes, seen = Sizes(_kept(tokens, len(rows))), None if len(rows) == batch.tokens else rows
    if not (sees or len(batch.grids)):
        return ModelInput(ids, tokens, sizes, rows=seen)
    own, at_hand = _own_frames(family, tables.vision, layout)
    visual = _vision_input(ops, family, batch, own, dtype, layout) if tower else None
    sizes = replace(sizes, patches=len(own.cos), features=len(at_hand))
    return ModelInput(ids, tokens, sizes, visual, _routes_from(ops, family, batch, tables.vision, layout), seen)


def text_input(ops: Ops, family: QwenVLFamily, batch: Batch, attend: Attend, layout: Layout) -> ModelInput:
    """A batch whose merged features are at hand, in the order of `batch.visual_src`; `attend` keeps a cache."""
    angles = rope_tables(family.config.text, batch.position_ids)
    tokens = _tokens(ops, angles, layout.attend(attend), layout)
    ids = ops.from_numpy(layout.looked_up(batch.input_ids, batch.visual_dst))
    sizes = Sizes(_kept(tokens, batch.tokens))
    if not len(batch.visual_dst):
        return ModelInput(ids, tokens, sizes)
    own, count = layout.share(len(batch.visual_dst)), 1 + max(map(int, batch.visual_src))
    dst, src = (rows[own.start : own.stop] for rows in (batch.visual_dst, batch.visual_src))
    return ModelInput(ids, tokens, replace(sizes, features=count), routes=_routes(ops, dst, src, count))


def vision_input(
    ops: Ops, family: QwenVLFamily, batch: Batch, whole: VisionTables, dtype: str, layout: Layout
) -> tuple[VisionInput, np.ndarray]:
    """The patches of a batch that this rank's tower runs, in window order; and which merged rows of all come out."""
    own, at_hand = _own_frames(family, whole, layout)
    return _vision_input(ops, family, batch, own, dtype, layout), at_hand


def _own_frames(family: QwenVLFamily, whole: VisionTables, layout: Layout) -> tuple[VisionTables, np.ndarray]:
    """The tables of the frames that a rank's tower runs, and which merged rows of all come out."""
    tables = whole.of_frames(layout.frames([int(length) for length in whole.frame_spans.lengths]))
    merged = tables.merged_rows(family.config.vision.merge)
    out = layout.features(len(merged))
    return tables, merged[out.start : out.stop]


def _kept(tokens: Tokens, count: int) -> int:
    """How many rows of hidden states are kept here, of a pass with `count` rows."""
    return len(tokens.rows.here(np.arange(count)))


def _vision_input(
    ops: Ops, family: QwenVLFamily, batch: Batch, tables: VisionTables, dtype: str, layout: Layout
) -> VisionInput:
    vision = family.config.vision
    rows = batch.pixel_rows if tables.order is None else batch.pixel_rows[tables.order]
    merged = tables.merged_rows(vision.merge)

    def spans_of(block: int) -> Any:
        return tables.frame_spans if vision.sees_frame(block) else tables.window_spans

    return VisionInput(
        pixels=ops.from_numpy(np.asarray(rows), dtype),
        cos=ops.from_numpy(tables.cos),
        sin=ops.from_numpy(tables.sin),
        attend=attend_within(ops, spans_of),
        rows=tables.rows,
        merged_rows=None if tables.rows is None else merged,
        enter=layout.enter_vision,
    )


def _tokens(ops: Ops, tables: tuple[np.ndarray, np.ndarray], attend: Attend, layout: Layout) -> Tokens:
    cos, sin = tables
    return Tokens(ops.from_numpy(cos), ops.from_numpy(sin), attend, rows=layout.rows(len(cos)))


def _routes_from(ops: Ops, family: QwenVLFamily, batch: Batch, tables: VisionTables, layout: Layout) -> Routes:
    """From the towers of all ranks that run some of the batch's tokens to the tokens of this one."""
    lengths, inverse = np.diff(batch.cu_seqlens), tables.inverse
    src = batch.visual_src if inverse is None else inverse[batch.visual_src]  # among the rows of the whole tower
    at_hand = [_own_frames(family, tables, peer)[1] for peer in layout.peers]
    wanted = [src[np.isin(batch.visual_dst, peer.own_rows(lengths))] for peer in layout.peers]
    brought, bring = layout.bring(at_hand, wanted)
    own = layout.own_rows(lengths)
    here = np.isin(batch.visual_dst, own) & np.isin(src, brought)
    order = np.argsort(brought)
    place = order[np.searchsorted(brought, src[here], sorter=order)]
    dst = np.searchsorted(own, batch.visual_dst[here]).astype(np.int32)
    return replace(_routes(ops, dst, place, len(brought)), bring=bring)


def _routes(ops: Ops, dst: np.ndarray, src: np.ndarray, count: int) -> Routes:
    """From `count` features."""
    by_row = np.argsort(src, kind="stable")
    if np.array_equal(src[by_row], np.arange(count)):  # each feature is used once: no gather is needed
        return Routes(ops.from_numpy(dst[by_row]), None)
    return Routes(ops.from_numpy(dst), ops.from_numpy(src.astype(np.int32)))
