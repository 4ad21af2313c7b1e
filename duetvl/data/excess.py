"""Samples with more tokens than one may have: what is long in them, and the bound with which they would fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from duetvl.core.errors import DataError
from duetvl.data.draft import Dropped

PICTURES: Final = "data.max_pixels"
VIDEOS: Final = "data.video_total_pixels"
_ROUND: Final = 256  # a proposed length is a multiple of it


@dataclass(frozen=True)
class Excess:
    """What is long in a sample of which a sequence has `tokens` tokens, and may have `limit`.

    tokens: None where its text is so long that it was not tokenised. images, videos: their tokens and their number.
    bound: a key of the recipe and its largest value with which the sample has at most `limit` tokens, measured; None
    where smaller pictures or videos do not suffice.
    """

    limit: int
    tokens: int | None
    images: tuple[int, int] = (0, 0)
    videos: tuple[int, int] = (0, 0)
    bound: tuple[str, int] | None = None

    def describe(self) -> str:
        """Its tokens, by what they are."""
        assert self.tokens is not None
        parts = [f"text {self.tokens - self.images[0] - self.videos[0]}"]
        for name, (tokens, count) in (("picture", self.images), ("video", self.videos)):
            parts += [f"{count} {name}{'s' * (count > 1)} {tokens}"] if count else []
        return f"has {self.tokens} tokens, the longest may have {self.limit}: {', '.join(parts)}"

    def remedies(self) -> str:
        """What would make it fit, as overrides of the recipe."""
        ways = []
        if self.bound is not None:
            key, value = self.bound
            how = "smaller pictures" if key == PICTURES else "smaller frames; data.video_max_frames for fewer"
            ways.append(f"{key}={value} ({how})")
        longer = "a higher data.cutoff_len" if self.tokens is None else f"data.cutoff_len={self.tokens}"
        return (
            f"give {' or '.join([*ways, f'{longer} (more memory)'])}, or choose data.too_long: drop, truncate or shrink"
        )


class SampleTooLong(DataError):
    """A sample with too many tokens."""

    def __init__(self, message: str, excess: Excess | None = None) -> None:
        super().__init__(message)
        self.excess = excess

    def at(self, where: str) -> SampleTooLong:
        """The same error with the record's place before it."""
        return type(self)(f"{where}: {self}", self.excess)


class DroppedAsTooLong(SampleTooLong, Dropped):
    """One that the recipe leaves out."""


@dataclass
class Excesses:
    """Those of a data set, and what would make all of its samples fit."""

    count: int = 0
    limit: int = 0
    longest: int = 0
    unmeasured: int = 0  # whose texts were not tokenised
    bounds: dict[str, int] = field(default_factory=dict)  # by key, the smallest that a sample asks for
    bounded: Counter[str] = field(default_factory=Counter)

    def add(self, excess: Excess) -> None:
        """Take in one sample's."""
        self.count, self.limit = self.count + 1, excess.limit
        if excess.tokens is None:
            self.unmeasured += 1
        else:
            self.longest = max(self.longest, excess.tokens)
        if excess.bound is not None:
            key, value = excess.bound
            self.bounds[key] = min(value, self.bounds.get(key, value))
            self.bounded[key] += 1

    def propose(self, records: int) -> str:
        """How many samples are too long, and which values would fit them, as overrides of the recipe."""
        rest = self.count - self.bounded.total()
        smaller = " and ".join(f"{key}={value}" for key, value in sorted(self.bounds.items()))
        ways = [f"{smaller} would fit {f'all but {rest} of them' if rest else 'all'}"] if smaller else []
        if not self.unmeasured:
            ways.append(f"data.cutoff_len={-(-self.longest // _ROUND) * _ROUND} would fit all, with more memory")
        proposal = "; or ".join(ways) or "their texts are too long by far: shorten them, or choose data.too_long"
        are = "samples are" if self.count > 1 else "sample is"
        return f"{self.count} of {records} {are} longer than {self.limit} tokens: {proposal}"
