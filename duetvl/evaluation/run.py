"""The questions of a run through an engine: those that have no answer yet, in their order, pixels made ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from duetvl.core.batch import Sample
from duetvl.data.encode import Processor
from duetvl.evaluation.answers import Asked, RunAnswers
from duetvl.evaluation.scoring import Row
from duetvl.inference.answering import ahead, answers, sample_of
from duetvl.inference.engine import Engine
from duetvl.inference.request import Request

Answers = Iterator[tuple[int, Row]]
_KEPT = ("text", "error", "finish_reason", "prompt_tokens", "completion_tokens", "seconds")


def engine_answers(
    engine: Engine,
    processor: Processor,
    asked: Asked,
    numbers: Sequence[int],
    request: Callable[[Sample, str], Request],
) -> Answers:
    """Index and row of every answer as it comes. Questions about one picture that follow each other share its features
    and the rows of their prompts up to where they differ."""

    def sample(number: int) -> Sample:
        question = asked.questions[number]
        return sample_of(processor, question.conversation, question.id)

    for number, row in answers(engine, ahead(numbers, sample), request, processor.tokenizer):
        yield number, {name: row[name] for name in _KEPT if name in row}


class Running:
    """The score so far, of a run that goes on."""

    def __init__(self, asked: Asked):
        self.asked, self.sum, self.count = asked, 0.0, 0

    def add(self, number: int, row: Row) -> None:
        """Count an answer."""
        if row.get("text") is not None:
            question = self.asked.questions[number]
            self.sum += self.asked.task.score(question, row["text"], self.asked.profile).value
            self.count += 1

    @property
    def score(self) -> float | None:
        """In percent, None before the first answer."""
        return 100 * self.sum / self.count if self.count else None


def keep(run: RunAnswers, source: Answers, process: int, look: Callable[[int, Row], None]) -> None:
    """Write every answer as it comes; `look` sees it afterwards."""
    with run.file.adding(process) as add:
        for number, row in source:
            run.add(add, number, row)
            look(number, row)
