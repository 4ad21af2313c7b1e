"""From data.json, model.json and a script to the sections of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.migrate.data_keys import data_section
from duetvl.migrate.layout_keys import Devices
from duetvl.migrate.model_keys import compare, family, freeze, frozen_parts, layers, published, recompute
from duetvl.migrate.reading import follow_script, program_arguments, read_keys
from duetvl.migrate.report import Report, Values
from duetvl.migrate.script import training_start
from duetvl.migrate.tables import DATA, MODEL, SCRIPT
from duetvl.migrate.training_keys import Wanted, sections
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.yaml_values import write_yaml

_PATH = "dataset_param.preprocess_parameters.model_name_or_path"
_BASIC = "dataset_param.basic_parameters."
_ORDER = ("model", "data", "train", "optim", "lora", "dpo", "parallel", "checkpoint", "log", "backend")


@dataclass(frozen=True)
class Imported:
    """A recipe as text, and the report that goes with it."""

    text: str
    report: Report
    summary: str


def import_run(
    data: Path, model: Path, script: Path, *, variables: Mapping[str, str] | None = None, allow_unknown: bool = False
) -> Imported:
    """The recipe of a MindSpeed-MM run. `variables` replace the script's. Nothing of the script is executed.

    Raises ConfigError for files that cannot be read, keys that are not known (unless they are allowed), values that
    only running the script would give, and what does not make a valid recipe.
    """
    report = Report(allow_unknown)
    keys = {
        "data": Values(DATA, read_keys(data, "data"), report),
        "model": Values(MODEL, read_keys(model, "model"), report),
    }
    read = follow_script(script, variables or {}, report)
    start = training_start(read, script)
    keys["script"] = Values(SCRIPT, program_arguments(read, start, script, report), report)
    made = _Import(keys["data"], keys["model"], keys["script"], Devices(read, start, str(script)), report).sections()
    for given in keys.values():
        given.account()
    recipe = make_recipe(made, name=script.stem)
    mesh = recipe.parallel.mesh
    what = ("dpo" if recipe.dpo else "sft") + (" with lora" if recipe.lora else "")
    summary = (
        f"{what}, pp {mesh.pp} x dp {mesh.dp} x cp {mesh.cp} x tp {mesh.tp} on {mesh.size} "
        f"device{'s' * (mesh.size > 1)}, {recipe.train.global_batch} samples a step"
    )
    head = f"import-mindspeed {data.name} {model.name} {script.name}"
    return Imported(recipe_text(made, head), report, summary)


@dataclass
class _Import:
    """One import: the three inputs, and what is found out about them together."""

    data: Values
    model: Values
    script: Values
    devices: Devices
    report: Report

    def sections(self) -> dict[str, Any]:
        """The recipe's sections, without those that take their defaults."""
        config = published(self.model, str(self.data.peek(_PATH) or ""), self.report)
        compare(self.model, self.script, config, self.report)
        frozen = frozen_parts(self.model)
        evaluates = bool(self.data.peek(f"{_BASIC}val_dataset") or self.data.peek(f"{_BASIC}val_rate"))
        wanted = Wanted(self._gated(config), self._pairs(), evaluates, frozen, self.data.whole(f"{_BASIC}cutoff_len"))
        made = sections(self.script, self.devices, wanted, self.report)
        made["model"] = {"path": self._path(), **made.pop("model"), **freeze(self.model, frozen, self.report)}
        made["data"] = {**data_section(self.data, self.report), **made.pop("data")}
        made["train"] |= recompute(self.model, self.script, self.report)
        if made["parallel"].get("zero") == 3 and made["train"].get("recompute") != "full":
            self.report.add("added", "train.recompute", "full, which parallel.zero 3 needs")
            made["train"]["recompute"] = "full"
        made["parallel"] |= layers(self.model, self.script, made["parallel"]["pp"], config, self.devices.script)
        self._bound_evaluation(made)
        return {name: made[name] for name in _ORDER if made.get(name) or (name in ("lora", "dpo") and name in made)}

    def _pairs(self) -> bool:
        """Whether it is DPO."""
        collate = self.data.text("dataloader_param.collate_param.model_name") or ""
        ranking = self.data.switch("dataset_param.attr.ranking")
        taken = f"taken as {'pairs of answers' if ranking else 'conversations'}"
        if ranking != collate.endswith("_dpo") and collate:
            said = f"{json.dumps(ranking)}, but collate_param.model_name is {collate}; {taken}"
            self.report.add("contradiction", "attr.ranking", said)
        else:
            self.report.add("used", "attr.ranking, collate_param.model_name", taken)
        preferences = [name for name in SCRIPT.used if SCRIPT.used[name].startswith("dpo.") and name in self.script]
        if preferences and not ranking:
            said = f"given, but attr.ranking is not true, so the section dpo is left out; {taken}"
            self.report.add("contradiction", ", ".join(preferences), said)
        return ranking

    def _path(self) -> str:
        path = self.data.text(_PATH)
        if not path:
            raise ConfigError(f"{DATA.title}: {_PATH} is missing: the directory of the Hugging Face model")
        self.report.add("used", "model_name_or_path", f"model.path: {path}; no converted weights are needed")
        return path

    def _gated(self, config: ModelConfig | None) -> bool:
        return config.vision.mlp == "gated" if config else family(self.model) == "Qwen2.5-VL"

    def _bound_evaluation(self, made: dict[str, Any]) -> None:
        """`--eval-iters` batches are the most that an evaluation takes."""
        data, train = made["data"], made["train"]
        if not (data.get("val") or data.get("val_rate")):
            return
        count = self.script.whole("--eval-iters", 100)
        default = "" if "--eval-iters" in self.script else " (Megatron's default)"
        if count < 1:
            for name in ("val", "val_rate", "val_max_samples"):
                data.pop(name, None)
            train.pop("eval_every", None)
            said = "nothing is evaluated there, so data.val and data.val_rate are left out"
            self.report.add("changed", "--eval-iters", f"{count}: {said}")
            return
        most = count * train["global_batch"]
        data["val_max_samples"] = min(most, data.get("val_max_samples", most))
        self.report.add(
            "changed", "--eval-iters",
            f"{count}{default}: data.val_max_samples: {data['val_max_samples']}, the most that an evaluation takes; "
            f"they are chosen by data.seed, there they are the first",
        )  # fmt: skip


def recipe_text(made: Mapping[str, Any], command: str) -> str:
    """The recipe as it is written: sections apart, and the command of duetvl that made it on top."""
    head = f"# Made by `duetvl {command}`.\n"
    return head + "".join(f"\n{write_yaml({name: values}, flow=True)}" for name, values in made.items())
