"""A batch on the device: what the model is a function of, beside its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duetvl.core.batch import Batch
from duetvl.core.ops import Ops
from duetvl.models.attention import Attend, attend_within
from duetvl.models.layout import Layout
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.language import Tokens
from duetvl.models.qwen_vl.tables import VisionTables, batch_tables, rope_tables
from duetvl.models.qwen_vl.vision import VisionInput
from duetvl.models.recompute import Recompute

Tensor = Any


@dataclass(frozen=True, eq=False)
class Routes:
    """Which token takes which merged feature: token row dst[i] takes feature row src[i], or row i where src is None."""

    dst: Tensor
    src: Tensor | None


@dataclass(frozen=True, eq=False)
class ModelInput:
    """ids (T,) of a batch, what its tokens bring to every layer, and its media: None of both where it has none."""

    ids: Tensor
    tokens: Tokens
    visual: VisionInput | None = None
    routes: Routes | None = None

    def recomputing(self, vision: Recompute, language: Recompute) -> ModelInput:
        """The same input of a pass on a tape whose towers run again what these say."""
        visual = None if self.visual is None else replace(self.visual, recompute=vision)
        return replace(self, visual=visual, tokens=replace(self.tokens, recompute=language))

    def divided(self, layout: Layout) -> ModelInput:
        """The same input of a model that is divided over ranks."""
        visual = None if self.visual is None else replace(self.visual, enter=layout.enter)
        tokens = replace(self.tokens, enter=layout.enter, attend=layout.attend(self.tokens.attend))
        return replace(self, visual=visual, tokens=tokens)


def model_input(ops: Ops, family: QwenVLFamily, batch: Batch, dtype: str) -> ModelInput:
    """A whole batch, its media included, in the vision tower's order. `dtype`: that of the weights."""
    tables = batch_tables(family.config, batch)
    spans = tables.language.spans
    tokens = _tokens(ops, (tables.language.cos, tables.language.sin), attend_within(ops, lambda layer: spans))
    ids = ops.from_numpy(batch.input_ids)
    if not len(batch.grids):
        return ModelInput(ids, tokens)
    routes = _routes(ops, batch, tables.vision.inverse)
    return ModelInput(ids, tokens, vision_input(ops, family, batch, tables.vision, dtype), routes)


def text_input(ops: Ops, family: QwenVLFamily, batch: Batch, attend: Attend) -> ModelInput:
    """A batch whose merged features are at hand, in the order of `batch.visual_src`; `attend` keeps a cache."""
    tokens = _tokens(ops, rope_tables(family.config.text, batch.position_ids), attend)
    routes = _routes(ops, batch, None) if len(batch.visual_dst) else None
    return ModelInput(ops.from_numpy(batch.input_ids), tokens, routes=routes)


def vision_input(ops: Ops, family: QwenVLFamily, batch: Batch, tables: VisionTables, dtype: str) -> VisionInput:
    """A batch's patches, in window order."""
    rows = batch.pixel_rows if tables.order is None else batch.pixel_rows[tables.order]

    def spans_of(block: int) -> Any:
        return tables.frame_spans if family.config.vision.sees_frame(block) else tables.window_spans

    return VisionInput(
        pixels=ops.from_numpy(np.asarray(rows), dtype),
        cos=ops.from_numpy(tables.cos),
        sin=ops.from_numpy(tables.sin),
        attend=attend_within(ops, spans_of),
    )


def _tokens(ops: Ops, tables: tuple[np.ndarray, np.ndarray], attend: Attend) -> Tokens:
    cos, sin = tables
    return Tokens(ops.from_numpy(cos), ops.from_numpy(sin), attend)


def _routes(ops: Ops, batch: Batch, inverse: np.ndarray | None) -> Routes:
    """`inverse` says where each feature lies in the tower's output; None: in order."""
    src = batch.visual_src if inverse is None else inverse[batch.visual_src]
    by_row = np.argsort(src, kind="stable")
    if np.array_equal(src[by_row], np.arange(len(src))):  # each feature is used once: no gather is needed
        return Routes(ops.from_numpy(batch.visual_dst[by_row]), None)
    return Routes(ops.from_numpy(batch.visual_dst), ops.from_numpy(src.astype(np.int32)))
