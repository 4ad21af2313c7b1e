"""evaluate_*.json of MindSpeed-MM: what of it `duetvl eval` takes, and why the rest is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.inference_keys import HOW_IT_RUNS, INFERENCE, how_tokens_are_chosen, where_it_runs
from duetvl.migrate.reading import flat_keys
from duetvl.migrate.report import Report, Values
from duetvl.migrate.tables import Table
from duetvl.storage.files import read_object

EVALUATION: Final = Table(
    "evaluate.json",
    used={
        **HOW_IT_RUNS, "dataset_path": "--data", "evaluation_dataset": "--task",
        "result_output_path": "-o, a directory in it named after evaluation_model and evaluation_dataset",
        "evaluation_model": "-o, see result_output_path",
        "use_custom_prompt": "--profile: qwen2_vl, or vlmevalkit if it is false",
    },
    not_needed={**INFERENCE.not_needed},
    cannot={**INFERENCE.cannot},
)  # fmt: skip


def read_evaluation(path: Path, *, allow_unknown: bool = False) -> tuple[dict[str, Any], Report]:
    """The options of `duetvl eval` that a file says, and what became of each of its keys.

    Raises ConfigError for what is not known, or would change the answers and is not done, unless that is allowed and
    noted.
    """
    content = read_object(path, ConfigError)
    if not {"evaluation_dataset", "dataset_path"} & content.keys():
        raise ConfigError(f"{path}: is not an evaluate_*.json: it has neither evaluation_dataset nor dataset_path")
    report = Report(allow_unknown)
    values = Values(EVALUATION, flat_keys(content), report)
    options = {**_asked(values, report), **where_it_runs(values, report), **how_tokens_are_chosen(values, report)}
    values.account()
    return options, report


def _asked(values: Values, report: Report) -> dict[str, Any]:
    """The benchmark, its data, the prompts and where results go."""
    data, task = values.text("dataset_path"), values.text("evaluation_dataset")
    place, model = values.text("result_output_path"), values.text("evaluation_model")
    custom = values.switch("use_custom_prompt", True)
    output = None if place is None else Path(place) / "_".join(name for name in (model, task) if name)
    found = {
        "data": None if data is None else Path(data),
        "task": task,
        "output": output,
        "profile": "qwen2_vl" if custom else "vlmevalkit",
    }
    for key, option, value in (
        ("dataset_path", "--data", data), ("evaluation_dataset", "--task", task),
        ("result_output_path", "-o", output), ("evaluation_model", "part of -o", output and model),
    ):  # fmt: skip
        if value is not None:
            report.add("used", key, f"{option} {value}")
    said = "" if "use_custom_prompt" in values else ", as where it is not given"
    report.add("used" if not said else "assumed", "use_custom_prompt", f"--profile {found['profile']}{said}")
    return found
