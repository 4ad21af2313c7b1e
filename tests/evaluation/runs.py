"""Runs of `duetvl eval` as they lie on disk, with answers that a test gives: what scores and reports are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duetvl.evaluation.answers import Asked, RunAnswers, data_md5, open_run
from duetvl.evaluation.profiles import find_profile
from duetvl.evaluation.question import Question
from duetvl.evaluation.tasks.registry import find_task

Answer = Callable[[Question], str | dict[str, Any] | None]


def asked_of(task: str, data: Path, profile: str = "vlmevalkit", count: int | None = None, way: str = "") -> Asked:
    """The questions of a benchmark."""
    found = find_task(task)
    questions = found.questions(data, find_profile(profile))
    return Asked(found, find_profile(profile), questions, len(questions) if count is None else count, way)


def write_run(directory: Path, asked: Asked, data: Path, answer: Answer, **told: Any) -> Path:
    """A run whose answers are `answer`'s: a text, a whole row, or None for a question that is not answered."""
    settings = {"task": asked.task.name, "profile": asked.profile.name, "md5": data_md5(data), "max_new_tokens": 2048}
    open_run(directory, settings, {"task": asked.task.name, "data": data, "questions": asked.count, **told})
    run = RunAnswers(asked, directory)
    with run.file.adding() as add:
        for number in run.missing():
            given = answer(asked.questions[number])
            if given is not None:
                row = given if isinstance(given, dict) else {"text": given, "finish_reason": "stop"}
                run.add(add, number, row)
    run.finish()
    return directory


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
