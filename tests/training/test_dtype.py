"""`model.dtype: auto`, and the dtype of an export: config.json's on an accelerator and on disk, float32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from duetvl.cli import main
from duetvl.core.backend import load_backend
from duetvl.core.errors import ConfigError
from duetvl.core.half import narrowed
from duetvl.storage.finding import find_checkpoint
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.check import check
from duetvl.training.dtype import with_dtype
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.train import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that says it is bfloat16, as the published ones do."""
    file = tiny_run.write_recipe(tmp_path_factory.mktemp("dtype"))
    config = file.parent / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": "bfloat16"}))
    return file


def test_auto_is_what_the_device_computes_well(recipe: Path) -> None:
    asked = load_recipe(recipe)
    assert asked.model.dtype == "auto"
    assert with_dtype(asked, on_cpu=True).model.dtype == "float32"
    assert with_dtype(asked, on_cpu=False).model.dtype == "bfloat16"
    assert with_dtype(asked, on_cpu=False, supports=lambda name: name != "bfloat16").model.dtype == "float32"
    assert with_dtype(load_recipe(recipe, ["model.dtype=float16"]), on_cpu=True).model.dtype == "float16"
    scaled = load_recipe(recipe, ["optim.loss_scale=1024"])  # may be right: it depends on the model
    with pytest.raises(ConfigError, match=r"optim\.loss_scale applies to model\.dtype float16 only, not to bfl"):
        with_dtype(scaled, on_cpu=False)
    assert any("parameters in float32" in line for line in check(recipe, [f"train.output_dir={recipe.parent}/none"]))


def test_an_export_has_the_dtype_of_the_models_config(recipe: Path, tmp_path: Path) -> None:
    options = [f"train.output_dir={tmp_path}/run", "train.steps=1", "checkpoint.export=true", "data.val=null"]
    train(recipe, options, backend=load_backend("torch_npu", "cpu"))
    assert load_recipe(tmp_path / "run" / "resolved_recipe.yaml").model.dtype == "float32"
    assert main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    stored = find_checkpoint(tmp_path / "run").stored
    for directory, dtype in (("run/export", "bfloat16"), ("wide", "float32")):
        weights = TensorFile(tmp_path / directory / "model.safetensors")
        assert json.loads((tmp_path / directory / "config.json").read_text())["torch_dtype"] == dtype
        for name in weights.specs:
            trained, kind = stored.read("weights", name)
            assert (kind, weights.specs[name].dtype) == ("float32", dtype)
            np.testing.assert_array_equal(weights.view(name), narrowed(trained, dtype))
