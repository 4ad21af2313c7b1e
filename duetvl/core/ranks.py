"""The processes of one run, and what they decide together.

What a rank may decide alone is nothing: decisions are values that all agree on at the edge of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from duetvl.core.collectives import Collectives
from duetvl.core.errors import DuetvlError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run; every one of them calls the same functions in the same order. Alone each is the identity."""

    collectives: Collectives

    @property
    def index(self) -> int:
        """The number of this process."""
        return self.collectives.rank

    @property
    def count(self) -> int:
        """How many there are."""
        return self.collectives.size

    @property
    def writes(self) -> bool:
        """Whether this one writes what is written once: logs, metrics, recipes."""
        return self.index == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks, in the order of the ranks: the same bits on all of them."""
        return [sum(column) for column in zip(*self.collectives.gather_objects(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.collectives.gather_objects(bool(flag)))

    def agree(self, value: T) -> T:
        """The value that rank 0 has: for clocks, disks and signals, of which each rank sees its own."""
        first: T = self.collectives.gather_objects(value)[0]
        return first

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone runs it; small and picklable. Its DuetvlError is raised on all."""
        if self.count == 1:
            return work()
        outcome: T | DuetvlError | None = None
        if self.writes:
            try:
                outcome = work()
            except DuetvlError as error:
                outcome = error
        outcome = self.agree(outcome)
        if isinstance(outcome, DuetvlError):
            raise outcome
        return outcome  # type: ignore[return-value]
