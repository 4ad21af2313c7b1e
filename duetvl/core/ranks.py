"""The processes of one run, and what they decide together.

What a rank may decide alone is nothing: decisions are values that all agree on at the edge of a step.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from duetvl.core.collectives import Collectives
from duetvl.core.errors import DuetvlError, RankFailed, first_line

T = TypeVar("T")


class _Outcome(NamedTuple):
    """What a function came to, as it is sent: its value, or the class and the words of its error."""

    value: Any = None
    error: tuple[type[DuetvlError], str] | None = None


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

    def each(self, value: T) -> list[T]:
        """The values of all ranks, in their order; small and picklable."""
        return self.collectives.gather_objects(value)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks, in the order of the ranks: the same bits on all of them."""
        return [sum(column) for column in zip(*self.each(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.each(bool(flag)))

    def agree(self, value: T) -> T:
        """The value that rank 0 has: for clocks, disks and signals, of which each rank sees its own."""
        return self.each(value)[0]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone runs it; small and picklable. Its DuetvlError is raised on all."""
        if self.count == 1:
            return work()
        outcome, error = _attempt(work) if self.writes else (_Outcome(), None)
        outcome = self.agree(outcome)
        self._raise(outcome, error, 0)
        result: T = outcome.value
        return result

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank; all run it. The first rank's DuetvlError, which it names, is raised on all.

        What fails on every rank in the same words is told in these. `work` may not wait for other ranks.
        """
        if self.count == 1:
            return work()
        outcome, error = _attempt(work)
        told = self.each((outcome.error, socket.gethostname()))
        failed = [(rank, found, host) for rank, (found, host) in enumerate(told) if found is not None]
        if failed:
            rank, (kind, words), host = failed[0]
            everywhere = len(failed) == self.count and all(found == (kind, words) for _, found, _ in failed)
            named = words if everywhere else f"rank {rank} ({host}): {words}"
            self._raise(_Outcome(error=(kind, named)), error, rank)
        result: T = outcome.value
        return result

    def _raise(self, outcome: _Outcome, own: BaseException | None, failed: int) -> None:
        """Raise the error of rank `failed` that all ranks know of; `own` is what happened on this one.

        What no user can do anything about stays what it is on the rank where it happened.
        """
        if outcome.error is None:
            return
        kind, words = outcome.error
        if kind is RankFailed and self.index == failed and own is not None:
            raise own
        raised = _with_words(kind, words)
        raised.agreed = kind is not RankFailed
        raise raised from own


def _attempt(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    """What it comes to. Whatever the error is, the others are told of it: they would wait for this rank."""
    try:
        return _Outcome(work()), None
    except DuetvlError as error:
        return _Outcome(error=(type(error), str(error))), error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _Outcome(error=(DuetvlError, f"{place}{error.strerror or first_line(error)}")), error
    except Exception as error:
        return _Outcome(error=(RankFailed, f"{type(error).__name__}: {first_line(error)}")), error


def _with_words(kind: type[DuetvlError], words: str) -> DuetvlError:
    """An error of this class, whatever its constructor takes."""
    made = kind.__new__(kind)
    DuetvlError.__init__(made, words)
    return made
