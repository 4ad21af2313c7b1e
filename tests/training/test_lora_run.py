"""Training adapters of a tiny Qwen2.5-VL by recipe: what is trained and kept, a kill, the other backend, exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run

import duetvl
from duetvl.convert.commands import hf_to_mm, mm_to_hf
from duetvl.convert.layouts import Layout
from duetvl.convert.plans import Options
from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.adapters import merge_directories
from duetvl.models.qwen_vl.config import load_config
from duetvl.storage.finding import find_checkpoint
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.check import check
from duetvl.training.checkpoints.export import export_run
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

STD = 0.2  # of the base's weights: a head of small numbers leaves an adapter next to nothing to change
ALONG = 1e-4  # relative difference of losses between backends


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Adapters with dropout in both towers and the projector."""
    file = tiny_run.write_recipe(tmp_path_factory.mktemp("lora"), STD)
    values = json.loads(file.read_text())
    values["data"]["pack_tokens"] = 120  # several micro-batches in a step: each has masks of its own
    values["train"] |= {"steps": 8}
    values["optim"] = {"lr": 4e-3, "schedule": "constant", "eps": 1e-6}
    values["checkpoint"] = {"every": 4, "keep_last": None}
    values["lora"] = {
        "rank": 4,
        "alpha": 64.0,
        "dropout": 0.2,
        "targets": ["language", "projector", "visual.blocks.1.attn.*"],
    }
    file.write_text(json.dumps(values))
    return file


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run) if "loss" in row]


def stored(run: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint."""
    files = [TensorFile(path) for path in sorted(find_checkpoint(run, step).path.glob("*.safetensors"))]
    return {f"{file.path.name}/{name}": file.view(name) for file in files for name in file.specs}


@pytest.fixture(scope="module")
def straight(be, recipe, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    return train(recipe, [f"train.output_dir={run}", "checkpoint.export=true"], backend=be).run_dir


def test_it_learns_and_keeps_the_adapters_alone(straight):
    curve = losses(straight)
    assert curve[-1] < 0.8 * curve[0]
    manifest = find_checkpoint(straight).manifest
    names = set(manifest.tensors["weights"])
    assert names == set(manifest.tensors["exp_avg"]) and all(map(is_adapter, names))
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    assert not any(name.startswith("visual.blocks.0") for name in names)
    assert {stored.dtype for stored in manifest.tensors["weights"].values()} == {"float32"}
    assert manifest.meta.extra["base_model"]["fingerprint"]


def test_both_backends_follow_one_curve_with_dropout(straight, be, recipe, tmp_path):
    other = other_than(be)
    train(recipe, [f"train.output_dir={tmp_path}/run", "checkpoint.every=null"], backend=other)
    assert apart(losses(tmp_path / "run"), losses(straight)).max() <= ALONG
    train(recipe, [f"train.output_dir={tmp_path}/none", "checkpoint.every=null", "lora.dropout=0"], backend=other)
    assert apart(losses(tmp_path / "none"), losses(straight)).max() > 100 * ALONG  # the masks do matter


def other_than(be: Backend) -> Backend:
    name, framework = ("mindspore", "mindspore") if be.name == "torch_npu" else ("torch_npu", "torch")
    pytest.importorskip(framework)
    return load_backend(name, device="cpu")


def apart(one: list[float], other: list[float]) -> np.ndarray:
    assert len(one) == len(other)
    return np.abs(np.array(one) / np.array(other) - 1)


# -- a kill -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from duetvl.core.backend import load_backend
from duetvl.training import train as train_module
from duetvl.training.step import Trainer

name, recipe, run = sys.argv[1:]
plain, done = Trainer.step, []

def step(self, *args, **keywords):
    if len(done) == 6:
        os.kill(os.getpid(), 9)
    done.append(1)
    return plain(self, *args, **keywords)

Trainer.step = step
train_module.train(recipe, [f"train.output_dir={run}"], backend=load_backend(name, device="cpu"))
"""


@pytest.fixture(scope="module")
def killed(be, recipe, tmp_path_factory) -> Path:
    """A run that was killed in its 7th step of 8."""
    run = tmp_path_factory.mktemp("killed") / "run"
    place = dict(os.environ)
    if "torch" in sys.modules:  # sums over other numbers of threads round otherwise
        place["OMP_NUM_THREADS"] = str(sys.modules["torch"].get_num_threads())
    arguments = [be.name, str(recipe), str(run)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=place, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return run


def test_after_a_kill_the_run_ends_as_if_there_had_been_none(killed, straight, be, recipe, tmp_path):
    other = other_than(be)
    train(recipe, [f"train.output_dir={tmp_path}/other"], backend=other, resume=f"{killed}@4")
    assert apart(losses(tmp_path / "other"), losses(straight)).max() <= ALONG
    train(recipe, [f"train.output_dir={killed}"], backend=be)
    assert [row["step"] for row in read_metrics(killed) if "loss" in row] == list(range(1, 9))
    if be.capabilities.bitwise_repeatable:
        assert losses(killed) == losses(straight)
        ours, theirs = stored(killed), stored(straight)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    else:
        assert apart(losses(killed), losses(straight)).max() <= ALONG


# -- what it leaves ---------------------------------------------------------------------------------------------------


def test_the_export_is_the_adapter_and_can_be_trained_on(straight, be, recipe, tmp_path):
    export, model_dir = straight / "export", json.loads(recipe.read_text())["model"]["path"]
    assert sorted(path.name for path in export.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = duetvl.load_model(model_dir, backend=be, adapter=export)
    weights = stored(straight)
    for path in filter(is_adapter, model.parameters):
        kept = weights[f"weights-00000-of-00001.safetensors/{path}@0{',0' * (len(model.parameters[path].shape) - 1)}"]
        assert np.array_equal(be.to_numpy(model.parameters[path].tensor), kept)
    options = ["train.steps=1", f"train.output_dir={tmp_path}/on", "checkpoint.every=null"]
    values = json.loads(recipe.read_text()) | {"lora": {"adapter": str(export), "dropout": 0.2}}
    train(values, options, backend=be)
    assert losses(tmp_path / "on")[0] < 0.8 * losses(straight)[0]


def test_any_checkpoint_can_be_exported(straight, tmp_path):
    export_run(str(straight), tmp_path / "last")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "last" / name).read_bytes() == (straight / "export" / name).read_bytes()
    export_run(f"{straight}@4", tmp_path / "fourth")
    fourth = TensorFile(tmp_path / "fourth" / "adapter_model.safetensors")
    assert fourth.specs == TensorFile(tmp_path / "last" / "adapter_model.safetensors").specs
    half_way = stored(straight, 4)["weights-00000-of-00001.safetensors/model.layers.0.mlp.up_proj.lora_B.weight@0,0"]
    key = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B.weight"
    assert np.array_equal(fourth.view(key), half_way)


def test_a_merged_export_is_a_plain_model_that_does_the_same(be, recipe, straight, tmp_path):
    options = [f"train.output_dir={tmp_path}/run", "checkpoint.export=merged", "train.steps=8"]
    train(recipe, options, backend=be, resume=f"{straight}@8")
    model_dir = json.loads(recipe.read_text())["model"]["path"]
    ours = duetvl.load_model(model_dir, backend=be, adapter=straight / "export")
    merged = duetvl.load_model(tmp_path / "run" / "export", backend=be)
    assert merged.adapters is None
    batch = ours.pack([ours.processor([{"role": "user", "content": "say hello"}])])
    np.testing.assert_allclose(be.to_numpy(merged.logits(batch)), be.to_numpy(ours.logits(batch)), rtol=0, atol=1e-4)
    assert (tmp_path / "run" / "export" / "tokenizer.json").is_file()


def test_an_export_is_of_the_kind_that_is_asked_for_now(be, recipe, straight, tmp_path, capsys):
    """A finished run is started for another kind: nothing of the one before is mixed into it, or taken for it."""
    place = tmp_path / "run"
    options = [f"train.output_dir={place}", "checkpoint.export=true"]
    train(recipe, options, backend=be, resume=f"{straight}@8")
    (place / "export/notes.txt").write_text("mine")
    before = {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    marks = {
        "merged": "config.json",
        "mindspeed_mm": "latest_checkpointed_iteration.txt",
        "true": "adapter_config.json",
    }
    for number, kind in enumerate(marks, 1):
        train(recipe, [*options, f"checkpoint.export={kind}"], backend=be)
        assert (
            f"{place}/export held another kind of export: it is {place}/export-before-{number}"
            in capsys.readouterr().out
        )
        assert {path.name for path in (place / f"export-before-{number}").iterdir()} == before
        before = {path.name for path in (place / "export").iterdir()}
        assert before & set(marks.values()) == {marks[kind]}
    train(recipe, options, backend=be)
    assert "exported" not in capsys.readouterr().out


def test_the_mindspeed_mm_export_is_merged_too(be, recipe, straight, tmp_path):
    model_dir = Path(json.loads(recipe.read_text())["model"]["path"])
    options = [f"train.output_dir={tmp_path}/run", "checkpoint.export=mindspeed_mm"]
    release = train(recipe, options, backend=be, resume=f"{straight}@8").run_dir / "export"
    mm_to_hf(release, model_dir, tmp_path / "back", Layout.one_stage(load_config(model_dir)), Options())
    merge_directories(model_dir, straight / "export", tmp_path / "merged")
    back, merged = (TensorFile(tmp_path / name / "model.safetensors") for name in ("back", "merged"))
    assert back.specs == merged.specs
    assert all(np.array_equal(back.view(name), merged.view(name)) for name in merged.specs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_export_is_bit_for_bit_the_model_in_memory_merged(be, recipe, straight, tmp_path, dtype):
    """Written from files alone: the base's float32 weights are rounded to the run's dtype before they are merged."""
    options = [f"train.output_dir={tmp_path}/run", "checkpoint.export=merged", f"model.dtype={dtype}"]
    values = json.loads(recipe.read_text())
    base = shutil.copytree(values["model"]["path"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))  # which exports follow
    values["model"]["path"] = str(base)
    values["lora"] = {"adapter": str(straight / "export")}
    train(values, [*options, "train.steps=1"], backend=be)
    export_run(str(tmp_path / "run"), tmp_path / "adapter")
    adapter = tmp_path / "adapter"
    model = duetvl.load_model(values["model"]["path"], backend=be, dtype=dtype, adapter=adapter)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    ours, theirs = (sorted(path.iterdir()) for path in (tmp_path / "run" / "export", tmp_path / "merged"))
    assert [file.name for file in ours] == [file.name for file in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_run_directory_is_no_adapter_and_no_model(straight, be, recipe, tmp_path):
    model_dir = json.loads(recipe.read_text())["model"]["path"]
    with pytest.raises(CheckpointError, match="write a run's adapter with `duetvl export`"):
        duetvl.load_model(model_dir, backend=be, adapter=straight)
    with pytest.raises(CheckpointError, match="holds the adapters of a LoRA run alone"):
        hf_to_mm(straight, tmp_path / "mm", Layout.one_stage(load_config(model_dir)), Options())


def test_a_frozen_bfloat16_base_with_float32_adapters(be, recipe, straight, tmp_path):
    options = [f"train.output_dir={tmp_path}/half", "model.dtype=bfloat16", "train.steps=4", "checkpoint.export=true"]
    train(recipe, options, backend=be)
    assert apart(losses(tmp_path / "half"), losses(straight)[:4]).max() <= 0.02
    kinds = find_checkpoint(tmp_path / "half").manifest.tensors
    assert {tensor.dtype for tensor in kinds["weights"].values()} == {"float32"} and not kinds["master"]
    file = TensorFile(tmp_path / "half" / "export" / "adapter_model.safetensors")
    assert {spec.dtype for spec in file.specs.values()} == {"float32"}


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_other_base_weights_are_noticed(straight, be, recipe, tmp_path):
    values = json.loads(recipe.read_text())
    moved = tmp_path / "model"
    tiny_run.write_model(moved, STD)
    weights = moved / "model.safetensors"
    bits = bytearray(weights.read_bytes())
    bits[-2] ^= 1
    weights.write_bytes(bits)
    source = Path(values["model"]["path"])
    kept = source.with_name("kept")
    source.rename(kept)
    try:
        moved.rename(source)
        with pytest.raises(CheckpointError, match="belong to other weights"):
            train(values, [f"train.output_dir={tmp_path}/run"], backend=be, resume=str(straight))
        source.rename(moved)
    finally:
        kept.rename(source)


def test_a_lora_run_is_not_resumed_without_its_section(straight, be, recipe, tmp_path):
    values = json.loads(recipe.read_text())
    del values["lora"]
    with pytest.raises(ConfigError, match=r"with another recipe: lora\.rank \d+ -> None"):
        train(values, [f"train.output_dir={tmp_path}/run"], backend=be, resume=str(straight))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.targets=[q_porj]"], r"lora.targets: 'q_porj' matches no parameter; did you mean q_proj"),
        (["lora.targets=[model.layer.*.mlp.*]"], r"did you mean model\.layers\.\*\.mlp"),
        (["lora.targets=[lm_head]"], "the head has no adapter"),
        (["lora.targets=[vision]", "model.freeze=vision"], r"model.freeze \(vision\) freezes all that 'vision' names"),
        (["lora.adapter=somewhere"], "lora.adapter somewhere has its own .* remove lora.rank, lora.alpha"),
    ],
)
def test_recipes_that_make_no_sense(recipe, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        list(check(recipe, [*options, f"train.output_dir={tmp_path}/run"]))


def test_there_is_nothing_to_merge_without_adapters(recipe):
    values = {key: value for key, value in json.loads(recipe.read_text()).items() if key != "lora"}
    with pytest.raises(ConfigError, match=r"checkpoint.export merged applies to lora only"):
        list(check(values, ["checkpoint.export=merged"]))


def test_check_tells_what_will_be_trained(recipe, tmp_path):
    line = next(line for line in check(recipe, [f"train.output_dir={tmp_path}/run"]) if line.startswith("lora"))
    assert line == "lora: LoRA of 18 linear layers, 0.01 million parameters are trained"
