"""The tiny Qwen2.5-VL with pictures, from a recipe to an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from duetvl.api import load_model
from duetvl.core.backend import load_backend
from duetvl.core.errors import CheckpointError, ConfigError, DataError
from duetvl.data.sources.catalog import Records
from duetvl.training.check import check
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.sft import record_encoder
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics


@pytest.fixture
def recipe(tmp_path) -> Path:
    return tiny_run.write_recipe(tmp_path)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def test_the_curves_of_both_backends_agree_and_the_export_is_the_model(be, recipe, tmp_path):
    result = train(recipe, ["checkpoint.export=true", "train.steps=6"], backend=be)
    assert result.loss < losses(result.run_dir)[0]
    assert losses(result.run_dir) == pytest.approx(EXPECTED, rel=1e-4)

    def mean_loss(directory):
        model = load_model(directory, backend=be)
        encoder = record_encoder(load_recipe(recipe, [f"model.path={directory}"]))
        batch = model.pack([encoder.load(encoder.draft(record)) for record in Records([tmp_path / "data.jsonl"])])
        return float(be.to_numpy(model.eval_loss(batch))) / batch.trained_tokens

    assert mean_loss(result.run_dir / "export") == pytest.approx(result.eval_loss, rel=1e-5)
    assert mean_loss(tmp_path / "model") > result.eval_loss


# torch on CPU; a change means that the order, the model, the step or the schedule has changed
EXPECTED = [5.518757, 5.538012, 5.447505, 5.368707, 5.340416, 5.36897]


def test_frozen_parts_stay(be, recipe, tmp_path):
    train(recipe, ["checkpoint.export=true", "train.steps=2", "model.freeze=[vision, language]"], backend=be)
    before, after = (load_model(path, backend=be) for path in (tmp_path / "model", tmp_path / "runs/tiny/export"))
    changed = {
        path
        for path, parameter in before.parameters.items()
        if (np.array(be.to_numpy(parameter.tensor)) != be.to_numpy(after.parameters[path].tensor)).any()
    }
    assert changed
    assert all(path.startswith("visual.merger.") for path in changed)


def test_resume_is_exact(be, recipe, tmp_path):
    schedule = "optim.schedule=constant"
    train(recipe, [schedule, f"train.output_dir={tmp_path}/whole"], backend=be)
    train(recipe, [schedule, "train.steps=2"], backend=be)
    train(recipe, [schedule], backend=be)
    exact = be.capabilities.bitwise_repeatable
    assert losses(tmp_path / "runs/tiny") == pytest.approx(losses(tmp_path / "whole"), rel=0 if exact else 1e-4, abs=0)


def test_a_run_goes_on_where_model_and_data_have_moved(recipe, tmp_path, capsys):
    be = load_backend("torch_npu", "cpu")
    schedule = "optim.schedule=constant"
    train(recipe, [schedule, f"train.output_dir={tmp_path}/whole"], backend=be)
    train(recipe, [schedule, "train.steps=2"], backend=be)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model", "data.jsonl", *(path.name for path in tmp_path.glob("*.png"))):
        (tmp_path / name).rename(moved / name)
    places = [f"model.path={moved}/model", f"data.train={moved}/data.jsonl", f"data.val={moved}/data.jsonl"]
    train(recipe, [schedule, *places], backend=be)
    assert f"model.path {tmp_path}/model -> {moved}/model" in capsys.readouterr().out
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "whole")
    lines = (moved / "data.jsonl").read_text().splitlines(keepends=True)
    (moved / "data.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(DataError, match="11 records"):
        train(recipe, [schedule, *places, "train.steps=6"], backend=be)


def test_recomputation_is_refused_before_anything_is_loaded_where_it_does_not_work(recipe):
    be = load_backend("torch_npu", "cpu")
    without = replace(be, capabilities=replace(be.capabilities, recomputation=False))
    with pytest.raises(ConfigError, match=r"^train\.recompute full: torch .* cannot recompute; set it to none$"):
        train(recipe, ["train.recompute=full", "model.path=not/there"], backend=without)


def test_check_says_what_will_be_done(recipe):
    lines = list(check(recipe))
    assert lines[1] == "recipe: 4 steps of 4 samples, 1.33 epochs"
    assert any(line.startswith("data.train: 12 records") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "error", "expected"),
    [
        (["data.pack_tokens=60"], DataError, r"data\.jsonl:\d+: has \d+ tokens, the longest may have 60"),
        (["data.max_pixels=10"], ConfigError, "give data.min_pixels and data.max_pixels together"),
        (["model.path=nowhere"], CheckpointError, "nowhere"),
        (["data.image_root=/nowhere"], DataError, r"data\.jsonl:2: .*green1\.png"),
        (["data.train=nowhere.jsonl"], DataError, "no such file"),
    ],
)
@pytest.mark.parametrize("what", ["train", "check"])
def test_mistakes_are_named_before_anything_is_written(recipe, tmp_path, overrides, error, expected, what):
    with pytest.raises(error, match=expected):
        train(recipe, [*overrides, "data.shuffle=false"]) if what == "train" else list(check(recipe, overrides))
    written = [path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert written == []


def test_a_model_without_weights_is_checked_in_all_else_and_not_trained(recipe, tmp_path):
    def lines_of_check() -> list[str]:
        measured = "expected on "  # seconds of this machine, others each time
        return [line for line in check(recipe) if not line.startswith(measured)]

    with_them = lines_of_check()
    (tmp_path / "model" / "model.safetensors").unlink()
    lines = lines_of_check()
    (unchecked,) = (line for line in lines if line not in with_them)
    assert unchecked.startswith(f"  not checked: its weights, of which {tmp_path}/model has none")
    assert [line for line in lines if line != unchecked] == with_them
    with pytest.raises(CheckpointError, match="model"):
        train(recipe)


def test_export_for_mindspeed_mm_holds_the_trained_weights(be, recipe, tmp_path, capsys):
    from duetvl.convert.cli import main

    result = train(recipe, ["checkpoint.export=mindspeed_mm", "train.steps=1"], backend=be)
    assert (result.run_dir / "export" / "release" / "mp_rank_00" / "model_optim_rng.pt").is_file()
    command = ["verify", str(result.run_dir), str(result.run_dir / "export"), "--cfg.hf_config.hf_dir"]
    assert main([*command, str(tmp_path / "model")]) == 0, capsys.readouterr()
