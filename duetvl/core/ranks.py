"""The processes of one run, and what they decide together.

What a rank may decide alone is nothing: decisions are values that all agree on at the edge of a step.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

from duetvl.core.collectives import Collectives
from duetvl.core.errors import BackendError, DuetvlError, RankFailed, first_line

T = TypeVar("T")


class _Failed(NamedTuple):
    """Sent instead of a value: the error of a rank, and which rank it is, where the message is to name it."""

    kind: type[DuetvlError]
    words: str
    place: str = ""


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
        """The values of all ranks, in their order; small and picklable.

        A rank that fails in `together` or `telling` meanwhile raises its error here on the others.
        """
        values = self.collectives.gather_objects(value)
        if failed := [one for one in values if isinstance(one, _Failed)]:
            self._raise(failed)
        return values

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
        value: Any = self._sharing_error(work, "") if self.writes else None
        result: T = self.each(value)[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives on this rank; all run it. The first rank's DuetvlError, naming the rank, is raised on all.

        Where every rank fails with the same message, it names none. Where `work` itself calls these functions, the
        other ranks get the error of one that fails before it has called them.
        """
        if self.count == 1:
            return work()
        result: list[T] = []
        self._sharing_error(lambda: result.append(work()), self._place)
        self.each(None)
        return result[0]

    @contextmanager
    def telling(self, *kinds: type[DuetvlError]) -> Iterator[None]:
        """An error of these kinds is raised on all ranks: here, and on the others by what they ask next.

        So where only some ranks get it, the others must be on their way to one of these functions here.
        """
        try:
            yield
        except kinds as error:
            if self.count == 1:
                raise
            self._tell(error, self._place)

    @property
    def _place(self) -> str:
        return f"rank {self.index} ({socket.gethostname()}): "

    def _sharing_error(self, work: Callable[[], T], place: str) -> T:
        """What it gives. Whatever its error is, the others are told of it, who would wait for this rank."""
        try:
            return work()
        except Exception as error:
            self._tell(error, place)

    def _tell(self, error: Exception, place: str) -> NoReturn:
        if isinstance(error, RankFailed) or (isinstance(error, DuetvlError) and error.agreed):
            raise error  # of another rank, which has told it
        failed = _Failed(*_kind_and_words(error), place)
        try:
            self.each(failed)
        except RankFailed:
            if failed.kind is RankFailed:
                raise error from None  # what no user can do anything about stays what it is where it happened
            raise
        raise AssertionError("a failure is raised on all ranks") from error

    def _raise(self, failed: Sequence[_Failed]) -> None:
        # A rank that another one has left while it waited fails by a BackendError of its own, which is no cause.
        kind, words, place = min(failed, key=lambda one: issubclass(one.kind, BackendError))
        everywhere = len(failed) == self.count and all(one[:2] == (kind, words) for one in failed)
        raised = _with_words(kind, words if everywhere else f"{place}{words}")
        raised.agreed = kind is not RankFailed
        raise raised


def _kind_and_words(error: Exception) -> tuple[type[DuetvlError], str]:
    """An error as the other ranks get it: RankFailed, unless the user can do something about it."""
    if isinstance(error, DuetvlError):
        return type(error), str(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return DuetvlError, f"{place}{error.strerror or first_line(error)}"
    return RankFailed, f"{type(error).__name__}: {first_line(error)}"


def _with_words(kind: type[DuetvlError], words: str) -> DuetvlError:
    """An error of this class, whatever its constructor takes."""
    made = kind.__new__(kind)
    DuetvlError.__init__(made, words)
    return made
