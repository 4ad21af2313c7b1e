"""A model that has learnt a benchmark's question scores far above chance on pictures that it has not seen; the same
weights in another order score as chance does."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from miniatures import write_tsv
from PIL import Image
from runs import read_json
from safetensors.numpy import load_file, save_file

import duetvl
from duetvl.cli import main
from duetvl.evaluation.profiles import VLMEVALKIT

pytest.importorskip("llguidance")

COLOURS = {"A": (220, 40, 40), "B": (40, 200, 60), "C": (40, 60, 220), "D": (230, 210, 40)}
OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "yellow"}
QUESTION = "Which?"
COUNT = 40
CHANCE = 25.0


def picture(rng: np.random.Generator, letter: str) -> bytes:
    """Every one of its own shade."""
    shade = np.clip(np.array(COLOURS[letter]) + rng.integers(-30, 31, 3), 0, 255)
    file = io.BytesIO()
    Image.new("RGB", (56, 28), tuple(map(int, shade))).save(file, "PNG")
    return file.getvalue()


def write_training_data(rng: np.random.Generator, directory: Path) -> Path:
    records = []
    for number in range(64):
        letter = "ABCD"[number % 4]
        (directory / f"{number}.png").write_bytes(picture(rng, letter))
        prompt = "<image>" + VLMEVALKIT.choice(QUESTION, OPTIONS, "")
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": letter}]
        records.append({"messages": messages, "images": [f"{number}.png"]})
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_benchmark(rng: np.random.Generator, directory: Path) -> Path:
    """AI2D_TEST.tsv: each letter is right as often as the others."""
    rows: list[dict[str, Any]] = [
        {
            "index": number, "image": base64.b64encode(picture(rng, "ABCD"[number % 4])).decode(),
            "question": QUESTION, **OPTIONS, "answer": "ABCD"[number % 4],
        }
        for number in range(COUNT)
    ]  # fmt: skip
    return write_tsv(directory / "AI2D_TEST.tsv", rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the model, `export`, and the benchmark that it was trained for."""
    directory, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    recipe = {
        "model": {"path": str(tiny_run.write_model(directory / "model", std=0.1)), "freeze": []},
        "data": {"train": str(write_training_data(rng, directory)), "pack_tokens": 4096},
        "train": {"output_dir": str(directory / "run"), "global_batch": 8, "steps": 40},
        "optim": {"lr": 1e-2},
        "checkpoint": {"export": True},
        "log": {"tensorboard": False, "plot": False, "every": 20},
    }
    (directory / "recipe.json").write_text(json.dumps(recipe))
    duetvl.train(directory / "recipe.json", [], backend=duetvl.load_backend("torch_npu", "cpu"))
    write_benchmark(rng, directory)
    return directory


def scores(model: Path, here: Path, target: Path) -> Any:
    """Of `duetvl eval`, whose answers are one of the letters."""
    words = ["--task", "ai2d_test", "--data", str(here / "AI2D_TEST.tsv"), "-o", str(target)]
    letters = [word for letter in OPTIONS for word in ("--choice", letter)]
    size = ["--min-pixels", "784", "--max-pixels", "3136", "--max-new-tokens", "2", "--cache-tokens", "8192"]
    assert main(["eval", str(model), "--backend", "torch_npu", "--device", "cpu", *words, *letters, *size]) == 0
    return read_json(target / "scores.json")


def shuffled(model: Path, target: Path, seed: int) -> Path:
    """The model with the numbers of each tensor in another order."""
    rng = np.random.default_rng(seed)
    target.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            weights = load_file(file)
            mixed = {name: rng.permuted(weight.ravel()).reshape(weight.shape) for name, weight in weights.items()}
            save_file(mixed, target / file.name, metadata={"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_what_is_learnt_is_scored_and_what_is_shuffled_is_not(trained: Path, tmp_path: Path) -> None:
    model = trained / "run" / "export"
    learnt = scores(model, trained, tmp_path / "learnt")
    assert learnt["n"] == learnt["clusters"] == COUNT and learnt["low"] > 2 * CHANCE, learnt["score"]
    chance = scores(shuffled(model, tmp_path / "shuffled", seed=1), trained, tmp_path / "chance")
    assert chance["n"] == COUNT and chance["unparsed"] == 0
    assert chance["low"] <= CHANCE <= chance["high"] < learnt["low"], chance["score"]
