"""What the data side hands to a model: numpy arrays, no framework."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

IGNORE = -100  # a label that is not trained; transformers and torch use the same number
_WRITTEN_AT_ONCE: Final = 128  # patches: few enough for the processor's cache


def _no_grids() -> np.ndarray:
    return np.zeros((0, 3), np.int64)


@dataclass(frozen=True, eq=False)
class PatchBytes:
    """Patch rows of pictures that are still bytes: an eighth of the memory, or a quarter for videos.

    values (P, C, frames, patch * patch) uint8; one frame stands for all `temporal` ones of its patch. The row of a
    patch is (values * rescale - mean) / std, rounded as transformers' processor rounds it. Whatever takes an array
    takes this as (P, C * temporal * patch * patch) float32; `write` does it without a second copy.
    """

    values: np.ndarray
    temporal: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the rows."""
        patches, channels, _, area = self.values.shape
        return patches, channels * self.temporal * area

    def __getitem__(self, rows: np.ndarray | slice) -> PatchBytes:
        """Some of the rows."""
        return replace(self, values=self.values[rows])

    @classmethod
    def joined(cls, parts: Sequence[PatchBytes]) -> PatchBytes | None:
        """The rows of all, one after the other; None where not all are made of their bytes in one way."""
        if len({(part.temporal, part.mean, part.std, part.rescale) for part in parts}) != 1:
            return None
        frames = max(part.values.shape[2] for part in parts)  # a picture has one, where a video has `temporal`
        values = [p.values if p.values.shape[2] == frames else np.repeat(p.values, frames, axis=2) for p in parts]
        return replace(parts[0], values=values[0] if len(values) == 1 else np.concatenate(values))

    def write(self, rows: np.ndarray) -> None:
        """Fill `rows` (P, C * temporal * patch * patch) float32, contiguous."""
        patches, channels, _, area = self.values.shape
        target = rows.reshape(patches, channels, self.temporal, area)
        mean, std = (np.array(numbers, np.float32)[:, None, None] for numbers in (self.mean, self.std))
        for start in range(0, patches, _WRITTEN_AT_ONCE):
            part = slice(start, start + _WRITTEN_AT_ONCE)
            # In the order and the precisions of transformers, which makes the results equal in every bit.
            scaled = (self.values[part] * np.float64(self.rescale)).astype(np.float32)
            scaled -= mean
            scaled /= std
            target[part] = scaled

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        rows = np.empty(self.shape, np.float32)
        self.write(rows)
        return rows if dtype is None else rows.astype(dtype, copy=False)


Rows = np.ndarray | PatchBytes


def stack_rows(media: Sequence[Rows], width: int) -> Rows:
    """Patch rows of several media, each (P, width), as one: bytes where all are, to be widened where they are used;
    else float32."""
    alike = [part for part in media if isinstance(part, PatchBytes)]
    if alike and len(alike) == len(media) and (joined := PatchBytes.joined(alike)) is not None:
        return joined
    rows = np.empty((sum(len(part) for part in media), width), np.float32)
    at = 0
    for part in media:
        target = rows[at : at + len(part)]
        if isinstance(part, PatchBytes):
            part.write(target)
        else:
            target[:] = part
        at += len(part)
    return rows


@dataclass(frozen=True, eq=False)
class Sample:
    """One conversation, encoded. Sequences are plain 1-D arrays: there is no batch axis and no padding.

    input_ids (T,) integers, each vision block expanded to its full number of placeholder tokens.
    labels (T,) the token itself where it is trained and -100 elsewhere (not shifted); None: nothing is trained.
    pixel_values, pixel_values_videos (P, C * temporal * patch * patch) float32 patch rows, or the bytes that they are
    made of, in the order of image_grid_thw, video_grid_thw (N, 3): patches in time, height and width.
    second_per_grid_ts (number of videos,) seconds that one temporal patch spans; None: one second each.
    id names the sample in messages and logs.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None = None
    pixel_values: np.ndarray | PatchBytes | None = None
    image_grid_thw: np.ndarray = field(default_factory=_no_grids)
    pixel_values_videos: np.ndarray | PatchBytes | None = None
    video_grid_thw: np.ndarray = field(default_factory=_no_grids)
    second_per_grid_ts: np.ndarray | None = None
    id: str = ""

    def __post_init__(self) -> None:
        for name in ("image_grid_thw", "video_grid_thw"):
            grids = getattr(self, name)
            clean = _no_grids() if grids is None else np.asarray(grids, np.int64).reshape(-1, 3)
            object.__setattr__(self, name, clean)
        object.__setattr__(self, "input_ids", np.asarray(self.input_ids).reshape(-1))
        if self.labels is not None:
            object.__setattr__(self, "labels", np.asarray(self.labels).reshape(-1))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt. `rejected` has the grids of `chosen` and no pixels: they share their pictures."""

    chosen: Sample
    rejected: Sample

    @property
    def id(self) -> str:
        """Names the pair in messages."""
        return self.chosen.id

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples laid end to end: a micro-batch. A pair is two sequences, the chosen one first.

    input_ids (T,) int32. position_ids (3, T) int32: time, height, width. cu_seqlens (S + 1,) int32 with the
    leading zero. targets (T,) int32: the label of the *next* token of the same sample, or -100.
    pixel_rows (P, C * temporal * patch * patch) float32, or the bytes that they are made of, and grids (N, 3) int64:
    images and videos of all samples in one list, per sample its images, then its videos.
    visual_dst, visual_src (V,) int32: token row `visual_dst[i]` takes row `visual_src[i]` of the merged features.
    sample_ids name the samples and pairs. digests know the pairs again; empty where nobody asks for them.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    targets: np.ndarray
    pixel_rows: np.ndarray | PatchBytes
    grids: np.ndarray
    visual_dst: np.ndarray
    visual_src: np.ndarray
    sample_ids: tuple[str, ...] = ()
    digests: tuple[bytes, ...] = ()

    @classmethod
    def of_tokens(cls, ids: np.ndarray, position_ids: np.ndarray, lengths: np.ndarray) -> Batch:
        """Sequences of tokens alone: ids (T,) and position_ids (3, T) of sequences of these lengths, end to end."""
        none = np.zeros(0, np.int32)
        return cls(
            input_ids=np.asarray(ids, np.int32),
            position_ids=np.asarray(position_ids, np.int32),
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
            targets=np.full(len(ids), IGNORE, np.int32),
            pixel_rows=np.zeros((0, 1), np.float32),
            grids=_no_grids(),
            visual_dst=none,
            visual_src=none,
        )

    @property
    def tokens(self) -> int:
        """Tokens of all samples: real ones, as there is no padding."""
        return len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """Number of positions that the loss is summed over."""
        return int(np.count_nonzero(self.targets != IGNORE))
