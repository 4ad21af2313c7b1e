"""TextVQA: questions about text in photos, each answered by ten people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import DataError
from duetvl.data.conversation import Part
from duetvl.evaluation.media import data_file, find_medium
from duetvl.evaluation.metrics import mindie_textvqa, mindie_words, vqa_accuracy, vqa_words
from duetvl.evaluation.profiles import Profile, require_profile
from duetvl.evaluation.question import Question, Questions, Score
from duetvl.evaluation.rows import RecordRows, Row
from duetvl.evaluation.tasks.tsv_task import TsvTask, ask_open, one_turn
from duetvl.storage.files import read_object

_PROFILES: Final = ("qwen2_vl", "vlmevalkit", "mindie", "mindie_guide")
Entry = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class AnnotatedQuestion(Question):
    """A question with its annotations as they stand in the file: MindIE's rule compares all of each."""

    entries: tuple[Entry, ...] = ()


def score(question: Question, answer: str, profile: Profile) -> Score:
    """VQA accuracy; in MindIE's profiles its own variant, with VQA accuracy beside it as `vqa`."""
    agreement = vqa_accuracy(question.truths, answer)
    if not profile.name.startswith("mindie"):
        return Score(agreement, vqa_words(answer) or None)
    numbered = [{"answer": truth, "answer_id": number} for number, truth in enumerate(question.truths)]
    entries = question.entries if isinstance(question, AnnotatedQuestion) else numbered
    return Score(mindie_textvqa(entries, answer), mindie_words(answer) or None, {"vqa": agreement})


_AS_TSV: Final = TsvTask(name="textvqa_val", file="TextVQA_VAL.tsv", ask=ask_open, rule=score, profiles=_PROFILES)


@dataclass(frozen=True)
class TextVqa:
    """`textvqa_val.jsonl` with `textvqa_val_annotations.json` beside it, or VLMEvalKit's `TextVQA_VAL.tsv`."""

    name: str = "textvqa_val"
    groups: tuple[str, ...] = ()
    profiles: tuple[str, ...] = _PROFILES

    def questions(self, path: Path, profile: Profile) -> Questions:
        """See `Task`."""
        if path.suffix == ".tsv":
            return _AS_TSV.questions(path, profile)
        require_profile(self.name, self.profiles, profile)
        path = data_file(path, "textvqa_val.jsonl")
        annotations = _annotations(path.with_name(path.name.split(".")[0] + "_annotations.json"))
        rows = RecordRows(path, index="question_id")
        for column in ("image", "question", "question_id"):
            if column not in rows.columns:
                raise DataError(f"{path}: has no {column!r}; its keys are {', '.join(rows.columns)}")
        return Questions(len(rows), lambda number: _question(rows[number], number, annotations, path.parent, profile))

    def score(self, question: Question, answer: str, profile: Profile) -> Score:
        """See `Task`."""
        return score(question, answer, profile)


def _annotations(path: Path) -> dict[str, tuple[Entry, ...]]:
    """The ten answers to each question, by its id."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; the answers of TextVQA are expected there, beside its questions")
    content = read_object(path, DataError)
    try:
        return {str(item["question_id"]): tuple(map(_entry, item["answers"])) for item in content["annotations"]}
    except (KeyError, TypeError):
        raise DataError(
            f'{path}: expected {{"annotations": [{{"question_id": ..., "answers": [{{"answer": ...}}]}}]}}'
        ) from None


def _entry(answer: Any) -> Entry:
    return {**answer, "answer": str(answer["answer"])}


def _question(
    row: Row, number: int, annotations: Mapping[str, tuple[Entry, ...]], folder: Path, profile: Profile
) -> Question:
    name = row.text("image")
    entries, problem = annotations.get(row.id, ()), ""
    parts: tuple[Part, ...] = ()
    try:
        parts = (profile.picture(find_medium(name, (folder, Path()))), row.text("question") + profile.open_suffix)
    except DataError as error:
        problem = str(error)
    return AnnotatedQuestion(
        index=number,
        id=row.id,
        kind="open",
        conversation=one_turn(parts),
        truths=tuple(entry["answer"] for entry in entries),
        cluster=name,
        problem=problem or ("" if entries else "its answers are not among the annotations"),
        entries=entries,
    )


TEXTVQA: Final = TextVqa()
