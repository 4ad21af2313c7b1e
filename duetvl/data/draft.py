"""A sample before its pixels are there: what planning, checking and caching work on.

Encoding has two halves. `Encoder.draft` reads a record, tokenises it and takes the sizes of its pictures and videos
from their headers, which is cheap and tells everything that a plan needs. `Encoder.load` decodes and resizes the
pixels, which is the expensive part and is done where they are used. The tokens of a draft are final: pixels are
brought to the size that the draft says, so that features and tokens cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Pair, Sample
from duetvl.core.errors import DataError, one_line
from duetvl.data.sources.records import Record

_MOST_UNREAD: Final = 20  # keys of a file that are named


class Dropped(DataError):
    """A sample that the recipe's own rules leave out, such as one that is too long. Never an error of a run."""


class MissingMedia(DataError):
    """A record whose picture or video is not there."""


class NotItsFault(DataError):
    """A good record that could not be made, as its file cannot be read any more. It ends a run even where bad records
    are skipped: good ones would be left out, one after the other."""


class OutOfMemory(NotItsFault):
    """A record for which memory does not suffice: skipping would leave out the largest ones."""


@dataclass(frozen=True, eq=False)
class Draft:
    """A sample without its pixels, small and picklable.

    input_ids and labels are those of the sample; `rejected` those of the second answer of a preference pair, prompt
    included, for which `input_ids` is the chosen one. `media` says what is to be decoded, at which size, in the order
    of the grids: images, then videos. `where` is file and place for messages. `notes` name what was done to make it
    fit: "truncated", "shrunk". `unread` names keys of the record and of its messages that may change what they mean,
    and are not read.
    """

    id: str
    where: str
    input_ids: np.ndarray
    labels: np.ndarray
    image_grid_thw: np.ndarray
    video_grid_thw: np.ndarray
    second_per_grid_ts: np.ndarray | None = None
    rejected: tuple[np.ndarray, np.ndarray] | None = None
    media: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all its sequences."""
        return len(self.input_ids) + (len(self.rejected[0]) if self.rejected else 0)

    @property
    def patches(self) -> int:
        """Patch rows of all its media."""
        return int(sum(grids.prod(axis=1).sum() for grids in (self.image_grid_thw, self.video_grid_thw)))

    @property
    def largest_frame(self) -> int:
        """Patch rows of the largest picture, or of two frames of a video."""
        grids = np.concatenate([self.image_grid_thw, self.video_grid_thw])
        return int(grids[:, 1:].prod(axis=1).max(initial=0))

    @property
    def has_media(self) -> bool:
        """Whether there is anything to decode."""
        return bool(self.media)

    @property
    def trained_tokens(self) -> int:
        """Tokens that a loss is summed over."""
        labels = [self.labels, *([self.rejected[1]] if self.rejected else [])]
        return int(sum(np.count_nonzero(row != IGNORE) for row in labels))


@dataclass(frozen=True)
class Outline:
    """What all ranks know of a draft, which is enough to plan with; its rank keeps the rest. See `Draft`."""

    id: str
    where: str
    tokens: int
    patches: int
    has_media: bool
    notes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, draft: Draft) -> Outline:
        """The outline of a draft."""
        return cls(
            draft.id, draft.where, draft.tokens, draft.patches, draft.has_media, notes=draft.notes, unread=draft.unread
        )


@dataclass
class MediaTally:
    """How many records with media have them, and how many have one that is not there."""

    found: int = 0
    missing: int = 0
    last: str = ""

    def add(self, outcome: Draft | Outline | DataError) -> None:
        """Count a record."""
        if isinstance(outcome, MissingMedia):
            self.missing, self.last = self.missing + 1, str(outcome)
        elif not isinstance(outcome, DataError):
            self.found += outcome.has_media

    def check(self, least: int) -> None:
        """Raise DataError where nearly all are missing, of `least` at least: then it is the place that is wrong, and
        skipping bad records would train on what is left of the data."""
        if self.missing >= least and self.missing > 9 * self.found:
            raise DataError(
                f"{self.missing} of {self.missing + self.found} records with pictures or videos have a missing one, "
                f"the last of them: {self.last}; set data.image_root to the directory that the paths start from"
            )


class Unread(dict[tuple[str, str], str]):
    """Keys that are not read, each named once for a file: (file, key) -> what is said of it. Of a file with very many,
    such as keys that are numbers, the first are named."""

    def add(self, draft: Draft | Outline) -> None:
        """Take in what a draft names."""
        file = draft.id.partition(":")[0]
        for key in draft.unread:
            self.name(file, key, one_line(f"{draft.where}: {key} is not read (named once for a file)"))

    def name(self, file: str, key: str, words: str) -> None:
        """Take in what is said of one key, unless it was said before, or enough was said of this file."""
        if (file, key) in self or (file, "") in self:
            return
        if sum(other == file for other, _ in self) < _MOST_UNREAD:
            self[file, key] = words
        else:
            self[file, ""] = f"{words}; further keys of this file are not named"


Outcome = Draft | DataError  # what becomes of a record


class Encoder(Protocol):
    """From records to samples. Picklable: worker processes get a copy."""

    def draft(self, record: Record) -> Draft:
        """Everything but the pixels. Raises Dropped where a rule leaves the record out, DataError where it is bad."""
        ...

    def load(self, draft: Draft) -> Sample | Pair:
        """The sample with its pixels. Raises DataError naming file, line and cause."""
        ...

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """Lay samples end to end."""
        ...
