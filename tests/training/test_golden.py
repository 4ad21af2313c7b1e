"""Loss curves that stay: 20 steps of each family and kind of training on each backend, in tests/training/golden.

A change means that the order of the data, the model, the objective, the optimizer or the schedule has changed. To
write the curves again after one that was meant: DUETVL_WRITE_GOLDEN=1 python -m pytest tests/training/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from duetvl.core.backend import Backend
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

GOLDEN = Path(__file__).parent / "golden"
WITHIN = 1e-4  # relative: the curves cross machines and versions of the frameworks
KINDS = {
    "sft": {"optim": {"lr": 1e-3, "weight_decay": 0.1}},
    "lora": {
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ["vision", "projector", "language"]},
        "optim": {"lr": 1e-2},
    },
    "dpo": {"dpo": {"beta": 0.1}, "optim": {"lr": 2e-4}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family; records of text, one picture and several, as conversations and as pairs."""
    directory = tmp_path_factory.mktemp("golden")
    for family in tiny_run.FAMILIES:
        tiny_run.write_model(directory / family, std=0.1, family=family)
    plain, pairs = [], []
    for number in range(24):
        images = [f"{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(images):
            colour = (37 * number % 256, 91 * i % 256, 200 - 5 * number)
            Image.new("RGB", (28 + 28 * (number % 4), 28 + 28 * i), colour).save(directory / name)
        question = {"role": "user", "content": "<image>" * len(images) + "which colour? " + "x" * (number % 7)}
        good, bad = ({"role": "assistant", "content": text} for text in (f"shade {number}", "none of them"))
        plain.append({"messages": [question, good], "images": images})
        pairs.append({"messages": [question], "chosen": good, "rejected": bad, "images": images})
    for name, records in (("plain", plain), ("pairs", pairs)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


@pytest.mark.parametrize("family", list(tiny_run.FAMILIES))
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_loss_curve_is_the_committed_one(be: Backend, place: Path, kind: str, family: str) -> None:
    records = "pairs" if kind == "dpo" else "plain"
    recipe = {
        "model": {"path": str(place / family), "freeze": []},
        "data": {"train": str(place / f"{records}.jsonl"), "pack_tokens": 300},
        "train": {"output_dir": str(place / be.name / kind / family), "global_batch": 5, "steps": 20},
        "log": {"tensorboard": False, "plot": False},
        **KINDS[kind],
    }
    rows = read_metrics(train(recipe, backend=be).run_dir)
    losses = [row["loss"] for row in rows if "loss" in row]
    file = GOLDEN / f"{family}.{kind}.{be.name}.txt"
    if os.environ.get("DUETVL_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text("".join(f"{step} {loss:.8g}\n" for step, loss in enumerate(losses, 1)))
    expected = [float(line.split()[1]) for line in file.read_text().splitlines()]
    assert len(losses) == 20
    assert losses == pytest.approx(expected, rel=WITHIN)
