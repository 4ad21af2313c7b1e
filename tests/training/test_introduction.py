"""What a run says before its first step, and where that is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run

from duetvl.storage.files import write_text
from duetvl.training.introduction import WIDTH
from duetvl.training.train import train


def blocks(run: Path) -> list[dict[str, str]]:
    """By start of the run, the lines of its introduction by their names."""
    starts: list[dict[str, str]] = []
    for line in (run / "train.log").read_text().splitlines():
        name, colon, words = line.partition(":")
        if line.startswith("-- "):
            starts.append({})
        elif line.startswith("         "):
            starts[-1][list(starts[-1])[-1]] += f" {line.strip()}"
        elif colon and " " not in name:
            starts[-1][name] = words.strip()
    return starts


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("introduction")
    tiny_run.write_recipe(directory)
    return directory


def test_a_run_says_what_it_is_before_its_first_step(be, home, capsys):
    recipe, run = home / "tiny.json", home / "runs" / "whole"
    shutil.rmtree(run, ignore_errors=True)  # the other backend's
    overrides = [f"train.output_dir={run}", "train.steps=2", "model.freeze=vision"]
    train(recipe, overrides, backend=replace(be, passed_over="no NPU (nothing was plugged in)"))
    before = capsys.readouterr().out.partition("step 1/2")[0].splitlines()
    assert before and all(len(line) <= WIDTH or str(home) in line for line in before)
    (block,) = blocks(run)
    assert block["backend"] == f"{be.name} ({be.capabilities.framework}) on cpu"
    assert block["device"] == "auto took the CPU: found no NPU (nothing was plugged in)"
    assert block["model"] == f"{home}/model, qwen2_5_vl, weights in float32"
    assert block["trained"] == "44.8k parameters, 44.57%: projector 20.7k, language 24.1k"
    assert block["frozen"] == "55.7k parameters, 55.43%: vision 55.7k"
    assert block["data"] == "12 records, 12 for evaluation"
    assert block["steps"] == "2 of 4 samples each (0.667 epochs)"
    assert block["layout"] == "1 process" and block["run"] == str(run)
    assert block["memory"].startswith("tensors of about ")
    said = (run / "train.log").read_text()
    assert f"saved {run}/checkpoints/step-0000002" in said and "step 1/2" not in said

    train(recipe, [*overrides, "train.steps=3"], backend=be)
    first, second = blocks(run)
    assert first == block and "device" not in second
    assert second["steps"] == "3 of 4 samples each (1 epochs); 2 are done"


def test_adapters_are_what_is_trained(home, capsys):
    train(home / "tiny.json", [f"train.output_dir={home}/runs/lora", "train.steps=1", "lora.rank=2"])
    (block,) = blocks(home / "runs" / "lora")
    assert block["trained"] == "1.86k parameters, 1.81%, adapters alone: language 1.86k"
    assert block["frozen"] == "100k parameters, 98.19%: vision 55.7k, projector 20.7k, language 24.1k"


def test_a_log_that_cannot_be_written_is_said_once(home, capsys):
    run = home / "runs" / "blocked"
    (run / "train.log").mkdir(parents=True)
    write_text(run / "train.log" / "mine", "")
    train(home / "tiny.json", [f"train.output_dir={run}", "train.steps=1"])
    assert capsys.readouterr().out.count(f"warning: {run}/train.log cannot be written: Is a directory") == 1
