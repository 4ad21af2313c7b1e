"""ChartQA: questions about charts, written by people (human) or by a program (augmented)."""

from __future__ import annotations

from typing import Final

from duetvl.evaluation.metrics import relaxed_accuracy
from duetvl.evaluation.tasks.tsv_task import TsvTask, ask_open, scored_by

CHARTQA: Final = TsvTask(
    name="chartqa_test", file="ChartQA_TEST.tsv", ask=ask_open, rule=scored_by(relaxed_accuracy), groups=("split",)
)
