"""LLaMA-Factory's training YAML becomes a recipe: every key is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from duetvl.cli import main
from duetvl.core.errors import ConfigError, DataError
from duetvl.migrate.importer import Imported
from duetvl.migrate.llamafactory.importer import import_yaml
from duetvl.migrate.llamafactory.tables import DEFAULTS, LLAMAFACTORY
from duetvl.models.qwen_vl.config import published_config
from duetvl.training.check import check
from duetvl.training.lora import plan_adapters
from duetvl.training.recipe.reading import load_recipe, make_recipe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.yaml_values import parse_yaml

LORA: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "image_max_pixels": 262144, "trust_remote_code": True,
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 16, "lora_target": "all",
    "dataset": "mllm_demo,identity", "template": "qwen2_vl", "cutoff_len": 2048, "max_samples": 1000,
    "preprocessing_num_workers": 16, "dataloader_num_workers": 4, "output_dir": "saves/lora", "logging_steps": 10,
    "save_steps": 300, "plot_loss": True, "overwrite_output_dir": True, "report_to": "none",
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip


def imported(directory: Path, devices: int = 1, allow_unknown: bool = False, **changes: Any) -> Imported:
    """The import of the LoRA run with some keys changed; `...` leaves a key out."""
    values = {key: value for key, value in (LORA | changes).items() if value is not ...}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return import_yaml(path, devices=devices, allow_unknown=allow_unknown)


def recipe_of(run: Imported) -> Recipe:
    return make_recipe(parse_yaml(run.text, "run"), name="run")


def test_a_lora_run(tmp_path):
    run = imported(tmp_path, devices=4)
    recipe = recipe_of(run)
    assert recipe.model.path == LORA["model_name_or_path"] and recipe.model.dtype == "bfloat16"
    assert [source.path for source in recipe.data.train] == [
        "data/dataset_info.json:mllm_demo", "data/dataset_info.json:identity",
    ]  # fmt: skip
    assert {source.max_samples for source in recipe.data.train} == {1000}
    assert (recipe.data.max_pixels, recipe.data.cutoff_len, recipe.data.pack_tokens) == (262144, 2048, 4096)
    assert (recipe.data.video_max_pixels, recipe.data.seed) == (65536, 42)
    assert (recipe.train.global_batch, recipe.parallel.dp, recipe.train.epochs) == (64, 4, 3.0)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32.0, ("language",))
    assert (recipe.optim.lr, recipe.optim.schedule, recipe.optim.warmup) == (1e-4, "cosine", 0.1)
    assert (recipe.checkpoint.every, recipe.checkpoint.keep_last, recipe.log.tensorboard) == (300, None, False)
    assert recipe.train.recompute == "full" and recipe.dpo is None
    assert all(run.report.mentions(key) for key in LORA)
    off = imported(tmp_path, neftune_noise_alpha=0, quantization_bit=None, use_galore=False).report
    assert {
        note.kind for note in off.notes if note.key in ("neftune_noise_alpha", "quantization_bit", "use_galore")
    } == {"not needed"}


@pytest.mark.parametrize(("changes", "parts"), [
    ({}, {"language"}),
    ({"freeze_vision_tower": False}, {"language", "vision"}),
    ({"freeze_vision_tower": False, "freeze_language_model": True}, {"vision"}),
    ({"lora_target": "q_proj,gate_proj"}, {"language"}),
    ({"lora_target": "gate_proj", "freeze_vision_tower": False}, {"language", "vision"}),
    ({"lora_target": "gate_proj", "freeze_vision_tower": False, "freeze_language_model": True}, {"vision"}),
])  # fmt: skip
def test_frozen_parts_get_no_adapters(tmp_path, changes, parts):
    recipe = recipe_of(imported(tmp_path, **changes))
    modules = plan_adapters(recipe, published_config("Qwen2.5-VL-7B")).adapters.sizes
    assert {"language" if name.startswith("model.") else "vision" for name in modules} == parts
    assert not any(".merger." in name for name in modules)


def test_dpo_full_with_zero(tmp_path):
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    )
    recipe = recipe_of(imported(
        tmp_path, devices=2, stage="dpo", finetuning_type="full", pref_beta=0.2, pref_loss="ipo", ref_model="base",
        deepspeed=str(tmp_path / "ds.json"), disable_gradient_checkpointing=True, eval_dataset="held_out",
        eval_strategy="steps", eval_steps=50, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-5}, freeze_multi_modal_projector=False, max_steps=200,
    ))  # fmt: skip
    assert (recipe.dpo.beta, recipe.dpo.loss, recipe.dpo.reference, recipe.lora) == (0.2, "ipo", "base", None)
    assert (recipe.parallel.zero, recipe.optim.offload, recipe.train.recompute) == (3, True, "full")
    assert recipe.data.val[0].path == "data/dataset_info.json:held_out" and recipe.train.eval_every == 50
    assert (recipe.optim.min_lr_ratio, recipe.train.steps, recipe.model.freeze) == (0.1, 200, ("vision",))


def test_schedules_evaluations_and_the_system_prompt(tmp_path):
    usual = recipe_of(imported(tmp_path))
    assert (usual.data.system, usual.checkpoint.save_only_model, usual.checkpoint.keep_best) == (None, False, None)
    recipe = recipe_of(imported(
        tmp_path, default_system="Be terse.", eval_dataset="held_out", eval_strategy="steps", eval_steps=50,
        eval_on_start=True, early_stopping_steps=3, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        save_only_model=True, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 20, "decay_type": "cosine", "min_lr_ratio": 0.1},
    ))  # fmt: skip
    assert recipe.data.system == "Be terse." and recipe.checkpoint.save_only_model
    assert (recipe.train.eval_first, recipe.train.patience, recipe.checkpoint.keep_best) == (True, 3, "eval_loss")
    assert (recipe.optim.schedule, recipe.optim.decay, recipe.optim.min_lr_ratio) == ("wsd", 20, 0.1)
    two_thirds = recipe_of(imported(tmp_path, lr_scheduler_type="warmup_stable_decay"))
    assert (two_thirds.optim.warmup, two_thirds.optim.decay) == (0.1, 0.6)
    in_steps = recipe_of(imported(tmp_path, lr_scheduler_type="warmup_stable_decay", warmup_steps=10, max_steps=101))
    assert (in_steps.optim.warmup, in_steps.optim.decay) == (10, 61)
    assert recipe_of(imported(tmp_path, lr_scheduler_type="inverse_sqrt")).optim.schedule == "inverse_sqrt"
    with pytest.raises(ConfigError, match="metric_for_best_model: accuracy: duetvl keeps the best by eval_loss"):
        imported(tmp_path, eval_dataset="held_out", eval_strategy="steps", eval_steps=50, load_best_model_at_end=True,
                 metric_for_best_model="accuracy")  # fmt: skip
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs.decay_type: is no option of this schedule"):
        imported(tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"decay_type": "linear"})


@pytest.mark.parametrize(("layers", "trained"), [(1, {"1"}), (-1, {"0"})])
def test_freeze_trains_whole_layers_and_check_agrees(tmp_path, monkeypatch, layers, trained):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tiny_run.write_model(tmp_path / "model", num_hidden_layers=2)
    data = tiny_run.write_data(tmp_path / "data")
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": data.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    (data.parent / "dataset_info.json").write_text(json.dumps({"colours": entry}))
    changes = {
        "model_name_or_path": str(tmp_path / "model"), "finetuning_type": "freeze", "freeze_trainable_layers": layers,
        "dataset": "colours", "dataset_dir": str(data.parent), "max_samples": ..., "bf16": ...,
    }  # fmt: skip
    recipe = imported(tmp_path, **changes)
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    frozen = load_recipe(tmp_path / "recipe.yaml").model.freeze
    assert {"0", "1"} - {name.split(".")[2].split("-")[0] for name in frozen if "layers" in name} == trained
    assert any("12" in line for line in check(tmp_path / "recipe.yaml"))
    with pytest.raises(DataError, match="colors"):
        imported(tmp_path, **{**changes, "dataset": "colors"})


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rnak": 8}, r"lora_rnak is not known; did you mean 'lora_rank'\?; --allow-unknown"),
    ({"quantization_bit": 4}, r"run\.yaml: quantization_bit: weights are not quantised"),
    ({"stage": "kto"}, "stage is kto, expected sft or dpo"),
    ({"stage": "dpo", "pref_loss": "orpo"}, "pref_loss: orpo: duetvl has sigmoid, hinge, ipo"),
    ({"finetuning_type": "oft"}, "finetuning_type is oft"),
    ({"dataset": ...}, "dataset is missing"),
    ({"dataset_dir": "ONLINE"}, "not downloaded"),
    ({"bf16": "yes"}, "bf16 is 'yes', expected true or false"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast', expected a number"),
    ({"streaming": True, "max_steps": 9}, "max_samples and streaming are both given"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0 and"),
    ({"val_size": 100}, "val_size: 100 records"),
    ({"do_train": False}, "do_train is false"),
    ({"finetuning_type": "freeze", "model_name_or_path": "someone/else"}, "give its directory"),
    ({"deepspeed": "mine.json"}, "no such file"),
])  # fmt: skip
def test_what_is_refused_says_why(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        imported(tmp_path, **changes)


def test_the_command_writes_the_recipe_and_the_report(tmp_path, capsys):
    imported(tmp_path, allow_unknown=True, made_up=3)
    arguments = ["import-llamafactory", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "recipe.yaml")]
    assert main(arguments) != 0
    assert "made_up is not known" in capsys.readouterr().err
    assert main([*arguments, "--allow-unknown", "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert "not known, and left out:\n  made_up" in shown and "sft with lora, 32 samples a step on 2 devices" in shown
    assert load_recipe(tmp_path / "recipe.yaml").train.global_batch == 32
    assert main(arguments) != 0 and "exists already" in capsys.readouterr().err


def test_each_key_has_one_place():
    known = list(LLAMAFACTORY.known())
    assert len(known) == len(set(known))
    assert set(DEFAULTS) <= set(LLAMAFACTORY.used)
