"""From a training YAML of LLaMA-Factory to the sections of a recipe. Only text is read; nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.migrate.importer import Imported, recipe_text
from duetvl.migrate.llamafactory.data_part import data_section
from duetvl.migrate.llamafactory.keys import Keys
from duetvl.migrate.llamafactory.model_part import dpo_section, lora_section, model_section, unused_preferences
from duetvl.migrate.llamafactory.run_part import (
    checkpoint_section,
    log_section,
    optim_section,
    parallel_section,
    train_section,
)
from duetvl.migrate.llamafactory.tables import STAGES
from duetvl.migrate.report import Report
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.yaml_values import read_yaml


def import_yaml(path: Path, *, devices: int = 1, allow_unknown: bool = False) -> Imported:
    """The recipe of LLaMA-Factory's run. `devices`: how many it ran on, which its YAML does not say.

    Raises ConfigError for a file that cannot be read, stages other than sft and dpo, keys that are not known (unless
    they are allowed) and what makes no valid recipe; DataError for a name that dataset_info.json does not have.
    """
    if devices < 1:
        raise ConfigError(f"--devices is {devices}, expected 1 or more")
    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{path}: has no keys and values, as LLaMA-Factory's training YAML has")
    report = Report(allow_unknown)
    keys = Keys(path, values, report)
    recipe_sections = _sections(keys, devices)
    keys.account()
    recipe = make_recipe(recipe_sections, name=path.stem)
    method = "dpo" if recipe.dpo else "sft"
    summary = (
        f"{method}{' with lora' if recipe.lora else ''}, {recipe.train.global_batch} samples a step on {devices} "
        f"device{'s' * (devices > 1)}"
    )
    head = f"import-llamafactory {path.name}" + f" --devices {devices}" * (devices > 1)
    return Imported(recipe_text(recipe_sections, head), report, summary)


def _sections(keys: Keys, devices: int) -> dict[str, Any]:
    stage, method = _stage(keys), _method(keys)
    model, data = model_section(keys, method), data_section(keys)
    parallel, offload = parallel_section(keys, devices)
    train = train_section(keys, devices, "val" in data or "val_rate" in data)
    optim = optim_section(keys) | ({"offload": True} if offload else {})
    sections: dict[str, Any] = {"model": model, "data": data, "train": train, "optim": optim}
    if parallel.get("zero") == 3 and train.get("recompute") != "full":
        keys.report.add("added", "train.recompute", "full, which parallel.zero 3 needs")
        train["recompute"] = "full"
    if method == "lora":
        sections["lora"] = lora_section(keys)
    if stage == "dpo":
        sections["dpo"] = dpo_section(keys)
    else:
        unused_preferences(keys)
    sections |= {
        "parallel": parallel,
        "checkpoint": checkpoint_section(keys, "eval_every" in train),
        "log": log_section(keys),
    }
    return {name: fields for name, fields in sections.items() if fields}


def _stage(keys: Keys) -> str:
    stage = keys.get("stage")
    if stage not in ("sft", "dpo"):
        why = "duetvl does not train that stage" if stage in STAGES else "no stage has that name"
        raise ConfigError(f"{keys.table.title}: stage is {stage}, expected sft or dpo; {why}")
    if not keys.switch("do_train", True):
        raise ConfigError(f"{keys.table.title}: do_train is false, so it describes no training; give a training YAML")
    if "do_train" in keys:
        keys.note("do_train", "`duetvl train`")
    keys.note("stage", f"{stage}: the section dpo is {'given' if stage == 'dpo' else 'left out'}")
    return str(stage)


def _method(keys: Keys) -> str:
    method = keys.get("finetuning_type")
    if method not in ("full", "lora", "freeze"):
        raise ConfigError(f"{keys.table.title}: finetuning_type is {method}, expected full, lora or freeze")
    keys.note("finetuning_type", f"{method}: the section lora is {'given' if method == 'lora' else 'left out'}")
    return str(method)
