"""DocVQA: questions about scanned documents. The answers of its test are on a server; these are of its validation."""

from __future__ import annotations

from typing import Final

from duetvl.evaluation.metrics import anls
from duetvl.evaluation.tasks.tsv_task import TsvTask, ask_open, scored_by

DOCVQA: Final = TsvTask(name="docvqa_val", file="DocVQA_VAL.tsv", ask=ask_open, rule=scored_by(anls))
