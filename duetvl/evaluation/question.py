"""What a benchmark asks, and what became of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from duetvl.data.conversation import Conversation

if TYPE_CHECKING:
    from duetvl.evaluation.profiles import Profile

Kind = Literal["choice", "open"]


@dataclass(frozen=True, eq=False)
class Question:
    """One question of a benchmark, ready to be asked.

    `index` is its place in the data, from 0, by which answers are sorted; `id` is what the data call it, once in a
    data set. `conversation` is one user's turn with the prompt of the profile; its pictures are bytes or paths.
    `truths` are the right answers: of a choice the option's letter, of an open question one or several texts. `options`
    are letters and texts in order, empty for an open question. `groups` are the fields that scores are also given by
    (split, category), `cluster` names what several questions share, a picture or a video, and are not independent for.
    `notes` say what a reader of the result should know; `problem` says why it cannot be asked (a video is missing):
    such a question is counted and has no score.
    """

    index: int
    id: str
    kind: Kind
    conversation: Conversation
    truths: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    cluster: str = ""
    notes: tuple[str, ...] = ()
    problem: str = ""


class Questions:
    """The questions of a data set by number, in its order.

    Each is made when it is asked for, with its pictures, and not kept: a data set need not fit into memory.
    """

    def __init__(self, count: int, make: Callable[[int], Question]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Question:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._make(index)

    def __iter__(self) -> Iterator[Question]:
        return map(self._make, range(self._count))


class Score(NamedTuple):
    """What an answer is worth, from 0 to 1, and what was read in it.

    `parsed` is None where nothing could be read: the answer counts as wrong and is listed. `others` are the same
    answer's values by other rules, to be reported beside the first.
    """

    value: float
    parsed: str | None
    others: Mapping[str, float] = {}


class Task(Protocol):
    """A benchmark: its data as questions, and the rule that scores an answer."""

    @property
    def name(self) -> str:
        """What `--task` calls it."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """The fields of `Question.groups` that its scores are given by, beside the whole."""
        ...

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the prompt profiles that it has a prompt for."""
        ...

    def questions(self, path: Path, profile: Profile) -> Questions:
        """The questions of a data set, which is looked through once.

        Raises DataError for a file that is missing or damaged, or lacks a column; ConfigError where the task has no
        prompt in this profile. What is wrong with one question alone is its `problem`.
        """
        ...

    def score(self, question: Question, answer: str, profile: Profile) -> Score:
        """What an answer is worth by the profile's rule. Depends on nothing else."""
        ...
