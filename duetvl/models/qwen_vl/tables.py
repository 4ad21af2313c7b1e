"""What the model needs to know of a batch beside its numbers: window order, spans and rotary tables, in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from duetvl.core.batch import Batch
from duetvl.core.errors import DataError
from duetvl.core.spans import Spans
from duetvl.models.qwen_vl.config import ModelConfig, TextConfig, VisionConfig

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class VisionTables:
    """What the vision tower needs to know of a batch with P patches in M merged rows.

    order (P,) int32: row `i` of the tower's hidden states is patch `order[i]`. None: rows stay as
    they are, as without windows.
    inverse (M,) int32: feature `i` is row `inverse[i]` of the merger's output. None: likewise.
    frame_spans, window_spans: who attends to whom, over the P rows in that order; the same without
    windows.
    cos, sin (P, head_dim / 2) float32, in that order.
    rows (P,): of tables of some frames, the numbers of their rows among those of all; None: they are of all frames.
    """

    order: np.ndarray | None
    inverse: np.ndarray | None
    frame_spans: Spans
    window_spans: Spans
    cos: np.ndarray
    sin: np.ndarray
    rows: np.ndarray | None = None

    def of_frames(self, frames: Sequence[int] | None) -> VisionTables:
        """The same of some of the frames, ascending, `inverse` apart, which stays that of all; None: of all."""
        if frames is None:
            return self
        starts = self.frame_spans.cu_seqlens
        rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(starts[f], starts[f + 1]) for f in frames)])
        windows = self.window_spans
        owners = np.searchsorted(starts, windows.cu_seqlens[:-1], side="right") - 1  # no window crosses a frame
        return VisionTables(
            order=rows if self.order is None else self.order[rows],
            inverse=self.inverse,
            frame_spans=Spans.of_lengths(self.frame_spans.lengths[list(frames)], causal=False),
            window_spans=Spans.of_lengths(windows.lengths[np.isin(owners, frames)], causal=False),
            cos=self.cos[rows],
            sin=self.sin[rows],
            rows=rows,
        )

    def merged_rows(self, merge: int) -> np.ndarray:
        """(M,) the numbers of the merged rows of these tables among those of all frames."""
        unit = merge**2
        return np.arange(len(self.cos) // unit) if self.rows is None else self.rows[::unit] // unit


@dataclass(frozen=True, eq=False)
class LanguageTables:
    """Causal spans of the samples, and cos, sin (T, head_dim / 2) float32."""

    spans: Spans
    cos: np.ndarray
    sin: np.ndarray


@dataclass(frozen=True, eq=False)
class HostTables:
    """Everything about a batch that is computed on the host and used by the model."""

    vision: VisionTables
    language: LanguageTables


def batch_tables(config: ModelConfig, batch: Batch) -> HostTables:
    """Window order, spans and rotary tables of a batch."""
    cos, sin = rope_tables(config.text, batch.position_ids)
    return HostTables(
        vision=vision_tables(config.vision, batch.grids),
        language=LanguageTables(Spans(batch.cu_seqlens, causal=True), cos, sin),
    )


def rope_tables(text: TextConfig, position_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (T, head_dim / 2) float32 of the language model at positions (3, T).

    The first frequencies follow time, the next height, the last width, as `mrope_section`
    divides them.
    """
    positions = np.asarray(position_ids).reshape(3, -1)
    longest = int(positions.max(initial=0)) + 1
    tables = _rotary_table(_table_length(longest), text.head_dim, text.rope_theta)
    if positions.shape[1] == 0:
        return tables[0][:0], tables[1][:0]
    edges = [0, *np.cumsum(text.mrope_section).tolist()]
    cos, sin = (
        np.concatenate(
            [table[axis, start:stop] for axis, (start, stop) in zip(positions, pairwise(edges), strict=True)],
            axis=1,
        )
        for table in tables
    )
    return cos, sin


def vision_tables(vision: VisionConfig, grids: np.ndarray) -> VisionTables:
    """Tables of the vision tower for media of these grids (N, 3), in this order."""
    as_grids = [as_grid(grid, vision.merge) for grid in grids]
    merged_order, window_lengths = window_order(as_grids, vision.merge, vision.window_merged)
    unit = vision.merge**2
    frame_spans = Spans.of_lengths(_frame_lengths(as_grids), causal=False)
    spans = frame_spans
    if vision.window is not None:
        spans = Spans.of_lengths(window_lengths * unit, causal=False)
    cos, sin = _vision_rope(vision, as_grids)
    if np.array_equal(merged_order, np.arange(len(merged_order))):
        return VisionTables(None, None, frame_spans, spans, cos, sin)
    order = (merged_order[:, None] * unit + np.arange(unit)).reshape(-1).astype(np.int32)
    inverse = np.argsort(merged_order, kind="stable").astype(np.int32)
    return VisionTables(order, inverse, frame_spans, spans, cos, sin)


def _vision_rope(vision: VisionConfig, grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray]:
    places = [_patch_places(grid, vision.merge, vision.window_merged) for grid in grids]
    rows = np.concatenate([np.zeros((0, 2), np.int32), *places])
    tables = _rotary_table(_table_length(int(rows.max(initial=0)) + 1), vision.head_dim // 2, vision.rope_theta)
    cos, sin = (table[rows].reshape(len(rows), vision.head_dim // 2) for table in tables)
    return cos, sin


def as_grid(grid: np.ndarray | Sequence[int], merge: int) -> Grid:
    """Frames, rows and columns of patches. Raises DataError for what no picture is cut into."""
    frames, height, width = (int(number) for number in grid)
    if min(frames, height, width) < 1 or height % merge or width % merge:
        raise DataError(
            f"grid ({frames}, {height}, {width}) needs positive numbers, height and width in multiples of {merge}"
        )
    return frames, height, width


def window_order(grids: Iterable[Sequence[int]], merge: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of merged patches that keeps windows of `window` x `window` of them together.

    grids (N, 3) in patches. Returns the merged patch of each row (M,) int64, counted over all
    grids, and the lengths of the windows in merged patches, int64. Each frame stays contiguous;
    within it, windows lie from large to small, so that those of equal size are neighbours.
    `window` 0: no windows, one length per frame.
    """
    orders, lengths, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for frames, height, width in grids:
        order, sizes = _frame_windows(height // merge, width // merge, window)
        starts = first + len(order) * np.arange(frames)
        orders.append((starts[:, None] + order).reshape(-1))
        lengths.append(np.tile(sizes, frames))
        first += frames * len(order)
    return np.concatenate(orders), np.concatenate(lengths)


@lru_cache(maxsize=1024)
def _frame_windows(rows: int, columns: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Order (rows * columns,) of one frame's merged patches, and the lengths of its windows."""
    if window == 0:
        return np.arange(rows * columns), np.array([rows * columns])
    row, column = np.divmod(np.arange(rows * columns), columns)
    per_row = -(-columns // window)
    windows = (row // window) * per_row + column // window
    sizes = np.bincount(windows)
    by_size = np.argsort(-sizes, kind="stable")
    rank = np.empty(len(sizes), np.int64)
    rank[by_size] = np.arange(len(sizes))
    return np.argsort(rank[windows], kind="stable"), sizes[by_size]


@lru_cache(maxsize=512)
def _patch_places(grid: Grid, merge: int, window: int) -> np.ndarray:
    """Row and column (P, 2) int32 of each patch of a picture or video, in window order."""
    frames, height, width = grid
    row, column = np.divmod(np.arange(height * width), width)
    block = (height // merge, merge, width // merge, merge)
    places = [axis.reshape(block).transpose(0, 2, 1, 3).reshape(-1, merge**2) for axis in (row, column)]
    order, _ = _frame_windows(height // merge, width // merge, window)
    in_order = np.stack([place[order].reshape(-1) for place in places], axis=1)
    return np.tile(in_order, (frames, 1)).astype(np.int32)


@lru_cache(maxsize=16)
def _rotary_table(length: int, dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (length, dim / 2) float32 of positions 0 .. length - 1.

    As in transformers, frequencies and angles are float32 numbers: in half precision positions
    beyond 256 would collapse. Powers, cosines and sines are taken in float64 and rounded, so each
    is within one unit in the last place of whatever float32 library transformers meets.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    tables = np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)
    for table in tables:
        table.setflags(write=False)
    return tables


def _table_length(longest: int) -> int:
    """The next power of two, so that growing sequences share a few tables."""
    return max(256, 1 << (longest - 1).bit_length())


def _frame_lengths(grids: Sequence[Grid]) -> np.ndarray:
    """Patches of each frame: attention never crosses temporal patches."""
    return np.array([height * width for frames, height, width in grids for _ in range(frames)], np.int64)
