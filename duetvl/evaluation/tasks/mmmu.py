"""MMMU: college questions over six disciplines, with up to seven pictures in the text; some are open."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from duetvl.core.errors import DataError
from duetvl.data.conversation import ImagePart, Part
from duetvl.evaluation.extraction import open_matches, open_values, option_named
from duetvl.evaluation.profiles import SELECT, Profile, question_lines
from duetvl.evaluation.question import Question, Score
from duetvl.evaluation.rows import Row
from duetvl.evaluation.tasks.tsv_task import TsvTask, choice_score

_MARK: Final = re.compile(r"<image (\d+)>")


def ask(row: Row, pictures: Sequence[ImagePart], profile: Profile) -> tuple[Part, ...]:
    """Pictures in front, or where the text has `<image N>`; there those that it does not name are left out."""
    text = question_lines(row.text("question"), row.options, row.text("hint"))
    text = text + f"{SELECT} \n" * bool(row.options)
    if not profile.interleaved:
        return (*pictures, text.rstrip())
    pieces = _MARK.split(text)
    if len(pieces) == 1:
        return (*pictures, text)
    numbers = [int(number) for number in pieces[1::2]]
    for number in numbers:
        if not 1 <= number <= len(pictures):
            raise DataError(f"{row.where}: its text names picture {number}, of which it has {len(pictures)}")
    pieces_after = zip(numbers, pieces[2::2], strict=True)
    return (pieces[0], *(part for number, piece in pieces_after for part in (pictures[number - 1], piece)))


def score(question: Question, answer: str, profile: Profile) -> Score:
    """A choice by its letter, an open answer by MMMU's own rule.

    Beside it, as `vlmevalkit`, what VLMEvalKit makes of it: an open question becomes a choice between its answer and
    "Other Answers", which favours answers that repeat the answer's text and no other rule.
    """
    if question.kind == "choice":
        mark = choice_score(question, answer, profile)
        return Score(mark.value, mark.parsed, {"vlmevalkit": mark.value})
    values = open_values(answer) if answer.strip() else []
    options = {
        "A": str(list(question.truths)) if len(question.truths) > 1 else question.truths[0],
        "B": "Other Answers",
    }
    others = {"vlmevalkit": float(option_named(answer, options) == "A")}
    return Score(float(open_matches(question.truths, values)), "; ".join(map(str, values)) or None, others)


MMMU: Final = TsvTask(
    name="mmmu_dev_val", file="MMMU_DEV_VAL.tsv", ask=ask, rule=score, has_options=True,
    groups=("split", "l2-category", "category"),
)  # fmt: skip
