"""Preference pairs as they are trained on: what every record must then be, and how a pair is known again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from duetvl.core.batch import Batch, Pair, PatchBytes, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Encoder
from duetvl.data.sources.records import Record

DIGEST_BYTES = 16


@dataclass(frozen=True)
class AnswerEncoder:
    """An `Encoder` for supervised training: a record with a rejected answer is an error, as a choice is lost there."""

    encoder: Encoder

    def draft(self, record: Record) -> Draft:
        """Raises DataError naming file and line of a preference record."""
        draft = self.encoder.draft(record)
        if draft.rejected is not None:
            raise DataError(
                f"{record.where}: is a preference record (it has a rejected answer), and the recipe has no section "
                f"dpo; add `dpo: {{}}`, or keep only the chosen answers in the data"
            )
        return draft

    def load(self, draft: Draft) -> Sample | Pair:
        """The sample, or the pair, with its pixels."""
        return self.encoder.load(draft)

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end."""
        return self.encoder.pack(samples)


@dataclass(frozen=True)
class PairEncoder(AnswerEncoder):
    """An `Encoder` for preference training: every record must have a rejected answer. With `digests`, its batches
    carry those of their pairs."""

    digests: bool = False

    def draft(self, record: Record) -> Draft:
        """Raises DataError naming file and line of a record with one answer."""
        draft = self.encoder.draft(record)
        if draft.rejected is None:
            raise DataError(
                f"{record.where}: has no rejected answer, which dpo needs; give `chosen` and `rejected` (or "
                f"`rejected_response`), or remove the recipe's section dpo to train on the answers as they are"
            )
        return draft

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay pairs end to end."""
        batch = super().pack(samples)
        if not self.digests:
            return batch
        return replace(batch, digests=tuple(pair_digest(given) for given in samples if isinstance(given, Pair)))


def pair_digest(pair: Pair) -> bytes:
    """16 bytes that say what a model sees of a pair: tokens, labels, pixels. Its name and place do not enter.

    Whatever in a record or in the settings changes what is computed changes the digest. Pixels that are bytes yet
    have another digest than the float32 numbers made of them.
    """
    digest = sha256()
    for sample in (pair.chosen, pair.rejected):
        _add(digest, sample.input_ids, np.int64)
        _add(digest, sample.labels, np.int64)
        _add(digest, sample.second_per_grid_ts, np.float32)
        for grids in (sample.image_grid_thw, sample.video_grid_thw):
            _add(digest, grids, np.int64)
    for pixels in (pair.chosen.pixel_values, pair.chosen.pixel_values_videos):
        if isinstance(pixels, PatchBytes):
            _add(digest, pixels.values, np.uint8)
            _add(digest, [pixels.temporal, pixels.rescale, *pixels.mean, *pixels.std], np.float64)
        else:
            _add(digest, pixels, np.float32)
    return digest.digest()[:DIGEST_BYTES]


def _add(digest: Any, values: Any, dtype: type) -> None:
    array: np.ndarray = np.ascontiguousarray([] if values is None else values, dtype)
    digest.update(f"{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8))
