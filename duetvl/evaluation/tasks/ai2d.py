"""AI2D: questions about diagrams of school books, four options each."""

from __future__ import annotations

from typing import Final

from duetvl.evaluation.tasks.tsv_task import TsvTask, ask_choice, choice_score

AI2D: Final = TsvTask(
    name="ai2d_test", file="AI2D_TEST.tsv", ask=ask_choice, rule=choice_score, has_options=True,
    columns=("question", "answer", "A", "B"), groups=("split", "category"),
)  # fmt: skip
