"""What the benchmarks in VLMEvalKit's TSV files have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duetvl.core.errors import DataError
from duetvl.data.conversation import Conversation, ImagePart, Part, Turn
from duetvl.evaluation.media import data_file
from duetvl.evaluation.metrics import Metric
from duetvl.evaluation.profiles import Profile, require_profile
from duetvl.evaluation.question import Question, Questions, Score
from duetvl.evaluation.rows import Row
from duetvl.evaluation.tsv import TsvRows

Ask = Callable[[Row, Sequence[ImagePart], Profile], tuple[Part, ...]]
"""(row, its pictures, profile) -> the parts of the user's turn. Raises DataError for a row that makes no question."""
Rule = Callable[[Question, str, Profile], Score]
"""(question, answer, profile) -> score."""


@dataclass(frozen=True)
class TsvTask:
    """A benchmark in one of VLMEvalKit's files, named `file` there.

    `has_options` says that its columns A, B, C and so on are options; a row without any is an open question. `columns`
    must be in the file.
    """

    name: str
    file: str
    ask: Ask
    rule: Rule
    has_options: bool = False
    columns: tuple[str, ...] = ("question", "answer")
    groups: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ("qwen2_vl", "vlmevalkit")

    def questions(self, path: Path, profile: Profile) -> Questions:
        """See `Task`. `path` is the file, or the directory that it lies in."""
        require_profile(self.name, self.profiles, profile)
        rows = TsvRows(data_file(path, self.file), self.columns)
        return Questions(len(rows), lambda number: self._question(rows, number, profile))

    def score(self, question: Question, answer: str, profile: Profile) -> Score:
        """See `Task`."""
        return self.rule(question, answer, profile)

    def _question(self, rows: TsvRows, number: int, profile: Profile) -> Question:
        row = rows[number]
        options = row.options if self.has_options else {}
        truths = (row.text("answer"),) if options else row.texts("answer")
        parts, problem = self._parts(rows, number, profile)
        return Question(
            index=number,
            id=row.id,
            kind="choice" if options else "open",
            conversation=one_turn(parts),
            truths=truths,
            options=options,
            groups={name: row.cells[name] for name in self.groups if name in row.cells},
            cluster=row.cluster,
            notes=row.notes,
            problem=problem or no_truth(truths, options),
        )

    def _parts(self, rows: TsvRows, number: int, profile: Profile) -> tuple[tuple[Part, ...], str]:
        """The parts of the user's turn, or none and what is wrong."""
        try:
            pictures = [profile.picture(picture) for picture in rows.pictures(number)]
            return self.ask(rows[number], pictures, profile), ""
        except DataError as error:
            return (), str(error)


def one_turn(parts: Sequence[Part]) -> Conversation:
    """A conversation of one user's turn."""
    return Conversation((Turn("user", tuple(part for part in parts if part != "")),))


def no_truth(truths: Sequence[str], options: Mapping[str, str]) -> str:
    """Why a question cannot be scored; empty where it can."""
    if options and truths[0] not in options:
        return f"its answer is {truths[0]!r}, its options are {', '.join(options)}"
    return "" if any(truths) else "its answer is missing"


# -- asking ----------------------------------------------------------------------------------------------------------


def ask_choice(row: Row, pictures: Sequence[ImagePart], profile: Profile) -> tuple[Part, ...]:
    """Pictures first, then the question with its options."""
    return (*pictures, profile.choice(row.text("question"), row.options, row.text("hint")))


def ask_open(row: Row, pictures: Sequence[ImagePart], profile: Profile) -> tuple[Part, ...]:
    """Pictures first, then the question and what the profile adds."""
    return (*pictures, row.text("question") + profile.open_suffix)


# -- scoring ---------------------------------------------------------------------------------------------------------


def choice_score(question: Question, answer: str, profile: Profile) -> Score:
    """1 for the right letter, as the profile reads one."""
    letter = profile.read_choice(answer, question.options)
    return Score(float(letter in question.truths), letter)


def scored_by(metric: Metric) -> Rule:
    """The rule that applies a metric to an open answer; of an empty one nothing is read."""

    def rule(question: Question, answer: str, profile: Profile) -> Score:
        said = answer.strip()
        return Score(metric(question.truths, answer), said or None)

    return rule
