"""Protocol of a model family's host side: what the data pipeline must know of a model, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from duetvl.core.batch import Batch, Pair, Sample

Grounding = Literal["relative", "absolute"]


class PatchGeometry(NamedTuple):
    """How pixels become patch rows and patch rows become tokens."""

    channels: int
    patch: int  # pixels along a side
    temporal: int  # frames in one patch
    merge: int  # patches along a side that make one token

    @property
    def factor(self) -> int:
        """Height and width of an image must be multiples of this many pixels."""
        return self.patch * self.merge

    @property
    def row(self) -> int:
        """Numbers in one patch row."""
        return self.channels * self.temporal * self.patch * self.patch


class SpecialTokens(NamedTuple):
    """Token ids around media, from the model's configuration."""

    vision_start: int
    vision_end: int
    image: int
    video: int


class Placed(NamedTuple):
    """Where a sample's tokens and features go: positions (3, T) int32, and the next free one after them.

    Token row dst[i] takes feature src[i], both int64; features count through the images, then through the videos.
    """

    positions: np.ndarray
    following: int
    dst: np.ndarray
    src: np.ndarray


class Family(Protocol):
    """The host side of one model family with one configuration."""

    geometry: PatchGeometry
    special: SpecialTokens
    vocabulary: int  # token ids lie below it
    grounding: Grounding  # coordinates in text: thousandths of a picture's sides, or pixels of it as resized

    def placeholder_count(self, grid_thw: np.ndarray | Sequence[int]) -> int:
        """Tokens that a picture or video of this grid (time, height, width in patches) takes."""
        ...

    def position_index(
        self,
        input_ids: np.ndarray,
        image_grid_thw: np.ndarray,
        video_grid_thw: np.ndarray,
        second_per_grid_ts: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Positions of one sample: (3, T) int32 for time, height and width, and the next free position.

        Raises DataError when placeholders and grids do not match, one vision block at a time.
        """
        ...

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end; a pair is two sequences, the chosen one first, over one copy of its pictures.

        Raises DataError naming the sample whose tokens and media disagree.
        """
        ...

    def place(self, sample: Sample) -> Placed:
        """Check a sample as `pack` does, and say where it would put things; no pixel row is made. Raises DataError."""
        ...

    def check(self, given: Sample | Pair) -> None:
        """Whether `pack` can take a sample once its pixels are there, as far as a record can make it wrong.

        Its texts may have tokens outside the vocabulary, its videos times beyond any position. Pixels, placeholders and
        grids are not looked at. Raises DataError.
        """
        ...
