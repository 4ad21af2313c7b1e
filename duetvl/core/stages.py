"""Layers of each pipeline stage, in the notation of MindSpeed-MM."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Final, Literal

Rows = tuple[tuple[int, ...], ...]


def nested(value: object) -> object:
    """`[1, 10, 10, 7]` stands for `[[1, 10, 10, 7]]`: one row for each virtual stage."""
    flat = isinstance(value, list | tuple) and value and not any(isinstance(item, list | tuple) for item in value)
    return [value] if flat else value


def as_rows(value: object) -> Rows:
    """Numbers of layers, flat or nested, as rows. Raises ValueError for everything else."""
    rows = nested(value)
    if not isinstance(rows, list | tuple) or not rows:
        raise ValueError(f"no list of layers: {value!r}")
    for row in rows:
        if not isinstance(row, list | tuple) or not row or not all(type(n) is int and 0 <= n < 10**6 for n in row):
            raise ValueError(f"no list of layers: {row!r}")
    return tuple(tuple(row) for row in rows)


def even_split(layers: int, stages: int) -> tuple[int, ...]:
    """As even as can be, the first stages having one more."""
    return tuple(len(even_range(layers, stage, stages)) for stage in range(stages))


def even_range(count: int, part: int, parts: int) -> range:
    """Which of `count` things the part numbered `part` of an even split has."""
    each, more = divmod(count, parts)
    start = part * each + min(part, more)
    return range(start, start + each + (part < more))


def early_language(vision: Sequence[int], language: Sequence[int]) -> tuple[int, int] | None:
    """(a stage with vision layers, a stage before it with language layers) where there are such; stages from 0.

    A stage computes its vision layers first, so language layers before the last of them would never see a picture.
    """
    last = max((stage for stage, count in enumerate(vision) if count), default=0)
    first = min((stage for stage, count in enumerate(language) if count), default=last)
    return (last, first) if first < last else None


def show(rows: Sequence[Sequence[int]]) -> str:
    """As it is typed: `[[1,10,10,7]]`."""
    return str([list(row) for row in rows]).replace(" ", "")


@dataclass(frozen=True)
class Stages:
    """How many layers of each tower every stage of a model has, in the order in which they follow each other.

    A stage without any hands on what it gets. Embedding, patch embedding, merger and the last norm belong to the first
    or last layer of their tower.
    """

    vision: tuple[int, ...]
    language: tuple[int, ...]

    @classmethod
    def even(cls, vision: int, language: int, ranks: int, virtual: int = 1) -> Stages:
        """Numbers of layers: the vision tower on the first stage, the language model evenly on all."""
        count = ranks * virtual
        return cls((vision, *[0] * (count - 1)), even_split(language, count))

    @property
    def count(self) -> int:
        """How many stages there are."""
        return len(self.language)

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of the vision tower and of the language model."""
        return sum(self.vision), sum(self.language)

    def of(self, tower: Literal["vision", "language"], stage: int) -> range:
        """The layers of a tower that a stage has."""
        ends = _ends(self.vision if tower == "vision" else self.language)
        return range(ends[stage], ends[stage + 1])

    def holding(self, tower: Literal["vision", "language"], layer: int) -> int:
        """The stage that has a layer."""
        if self.count == 1:
            return 0
        return bisect_right(_ends(self.vision if tower == "vision" else self.language), layer) - 1


@lru_cache(maxsize=1024)
def _ends(layers: tuple[int, ...]) -> tuple[int, ...]:
    """0, and the layers up to the end of each stage."""
    return tuple(accumulate(layers, initial=0))


ONE_STAGE: Final = Stages((1,), (1,))
