"""Benchmarks by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from duetvl.core.errors import ConfigError, did_you_mean, shown
from duetvl.evaluation.question import Task
from duetvl.evaluation.tasks.ai2d import AI2D
from duetvl.evaluation.tasks.chartqa import CHARTQA
from duetvl.evaluation.tasks.custom import read_task
from duetvl.evaluation.tasks.docvqa import DOCVQA
from duetvl.evaluation.tasks.mmmu import MMMU
from duetvl.evaluation.tasks.textvqa import TEXTVQA
from duetvl.evaluation.tasks.videobench import VIDEOBENCH

TASKS: Final[dict[str, Task]] = {task.name: task for task in (AI2D, CHARTQA, DOCVQA, MMMU, TEXTVQA, VIDEOBENCH)}


def find_task(name: str) -> Task:
    """A benchmark by its name, `videobench:NBA,MOT` for some of its sets, or a user's own by the path of its YAML.

    Raises ConfigError with the nearest name.
    """
    if name.endswith((".yaml", ".yml")):
        return read_task(Path(name))
    base, colon, sets = name.partition(":")
    if colon and base == VIDEOBENCH.name:
        return VIDEOBENCH.of(tuple(part.strip() for part in sets.split(",")))
    if name not in TASKS:
        raise ConfigError(f"no task {shown(name)}{did_you_mean(name, TASKS)}, or the path of a task's .yaml")
    return TASKS[name]
