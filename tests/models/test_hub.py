"""Ids of hubs in the place of directories: resolved from the libraries' caches, and what is said where they cannot be.

Nothing here needs a network. huggingface_hub reads its settings when it is imported, hence processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_run

from duetvl.core.errors import CheckpointError
from duetvl.models.hub import is_id
from duetvl.models.model_directory import open_model

ROOT = Path(__file__).parents[2]
BACKEND = "torch" if find_spec("torch") else "mindspore"
NOWHERE = "http://127.0.0.1:9"  # the port of discard: refused at once


def run(directory: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "DUETVL_"))}
    return subprocess.run(
        [sys.executable, *argv], cwd=directory, capture_output=True, text=True, check=False,
        env={**kept, "PYTHONPATH": str(ROOT), "HF_HOME": str(directory / "hf"), **environment},
    )  # fmt: skip


def cached(directory: Path, model: str) -> Path:
    """The tiny model as huggingface_hub keeps what it has fetched."""
    place = directory / "hf" / "hub" / f"models--{model.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123456789abcdef")
    (place / "snapshots").mkdir()
    return tiny_run.write_model(place / "snapshots" / "0123456789abcdef")


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["offline", "no net"])
def test_a_run_takes_its_model_from_the_cache(tmp_path, environment):
    snapshot = cached(tmp_path, "Qwen/Tiny-VL")
    tiny_run.write_data(tmp_path)
    recipe = {
        "model": {"path": "Qwen/Tiny-VL"},
        "data": {"train": "data.jsonl", "pack_tokens": 250},
        "train": {"output_dir": "run", "global_batch": 2, "steps": 1},
        "checkpoint": {"export": True},
        "log": {"tensorboard": False, "plot": False},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(recipe))
    checked = run(
        tmp_path, "-m", "duetvl.cli", "check", "tiny.json", "--backend", BACKEND, "--device", "cpu", **environment
    )
    assert f"model: {snapshot}, qwen2_5_vl" in checked.stdout, checked.stderr
    trained = run(
        tmp_path, "-m", "duetvl.cli", "train", "tiny.json", "--backend", BACKEND, "--device", "cpu", **environment
    )
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "export" / "tokenizer.json").is_file()


def test_the_interface_takes_ids(tmp_path):
    snapshot = cached(tmp_path, "Qwen/Tiny-VL")
    program = (
        "import duetvl\n"
        f"be = duetvl.load_backend({BACKEND!r}, device='cpu')\n"
        "model = duetvl.load_model('Qwen/Tiny-VL', backend=be)\n"
        "from duetvl.models.lora import Adapters, Size\n"
        "from duetvl.models.qwen_vl.adapters import add_adapters\n"
        "add_adapters(model, Adapters({'model.layers.0.mlp.up_proj': Size(2, 2.0)}), seed=0)\n"
        "model.save_adapter('adapter')\n"
        "print(model.source.path, len(duetvl.load_processor('Qwen/Tiny-VL')([{'role': 'user', 'content': 'hi'}])))\n"
    )
    done = run(tmp_path, "-c", program, HF_HUB_OFFLINE="1")
    assert done.stdout.startswith(f"{snapshot} "), done.stderr
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "Qwen/Tiny-VL"


def test_exports_of_a_lora_run_name_the_id_and_no_place_in_a_cache(tmp_path):
    cached(tmp_path, "Qwen/Tiny-VL")
    tiny_run.write_data(tmp_path)
    recipe = {
        "model": {"path": "Qwen/Tiny-VL"},
        "data": {"train": "data.jsonl", "pack_tokens": 250},
        "lora": {"rank": 2},
        "train": {"output_dir": "run", "global_batch": 2, "steps": 1},
        "checkpoint": {"export": True},
        "log": {"tensorboard": False, "plot": False},
    }
    (tmp_path / "tiny.json").write_text(json.dumps(recipe))
    device = ("--backend", BACKEND, "--device", "cpu")
    trained = run(tmp_path, "-m", "duetvl.cli", "train", "tiny.json", *device, HF_HUB_OFFLINE="1")
    assert trained.returncode == 0, trained.stderr
    exported = run(tmp_path, "-m", "duetvl.cli", "export", "run", "-o", "again", HF_HUB_OFFLINE="1")
    assert exported.returncode == 0, exported.stderr
    for directory in ("run/export", "again"):
        saved = json.loads((tmp_path / directory / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == "Qwen/Tiny-VL"


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["offline", "no net"])
def test_what_is_neither_here_nor_in_the_cache_is_one_line(tmp_path, environment):
    tiny_run.write_data(tmp_path)
    (tmp_path / "tiny.json").write_text('{"model": {"path": "Qwen/None"}, "data": {"train": "data.jsonl"}}')
    for command in ("check", "train"):
        done = run(
            tmp_path, "-m", "duetvl.cli", command, "tiny.json", "--backend", BACKEND, "--device", "cpu", **environment
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: Qwen/None: no such directory, and Hugging Face did not give it (")
        assert done.stderr.endswith("point the library's cache there (HF_HOME)\n")
    assert not (tmp_path / "runs").exists()


def test_a_directory_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_run.write_model(tmp_path / "Qwen" / "Tiny-VL")
    assert not is_id("Qwen/Tiny-VL")
    assert open_model("Qwen/Tiny-VL").path == Path("Qwen/Tiny-VL")


@pytest.mark.parametrize("path", ["model", "./a/b", "/a/b", "a/b/c", "../b", "a/.b", "C:/x"])
def test_what_is_no_id_is_left_to_whoever_reads_it(path):
    assert not is_id(path)
    assert open_model(path).path == Path(path)


def test_modelscope_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError) as caught:
        open_model("modelscope:Qwen/Qwen2.5-VL-7B-Instruct")
    assert "needs the modelscope library, which is not installed: pip install modelscope" in str(caught.value)
    with pytest.raises(CheckpointError, match="is no id of ModelScope: expected OWNER/NAME"):
        open_model("modelscope:Qwen2.5-VL-7B-Instruct")


def test_modelscope_takes_the_cache_where_there_is_no_network(tmp_path):
    if find_spec("modelscope") is None:
        pytest.skip("modelscope is not installed")
    snapshot = tiny_run.write_model(tmp_path / "models" / "Qwen--Tiny-VL" / "snapshots" / "master")
    program = "from duetvl.models.model_directory import open_model as o; print(o('modelscope:Qwen/Tiny-VL').path)"
    done = run(tmp_path, "-c", program, MODELSCOPE_CACHE=str(tmp_path), MODELSCOPE_ENDPOINT=NOWHERE)
    assert done.stdout.splitlines()[-1:] == [str(snapshot)], done.stderr
