"""The programs of docs/examples, run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import duetvl
from duetvl.training.watching.metrics import read_metrics

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_a_loop_of_ones_own_is_the_run_of_the_same_recipe(be, tmp_path):
    recipe = tiny_run.write_recipe(tmp_path)
    options = [f"backend.name={be.name}", "optim.lr=1e-3"]
    main = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]
    losses = main(recipe, tmp_path / "mine", *options)
    same = [*options, "optim.schedule=constant", "optim.weight_decay=0.01", "model.freeze=[vision]", "data.val=null"]
    rows = read_metrics(duetvl.train(recipe, same, backend=be).run_dir)
    assert len(losses) == 4
    assert losses == pytest.approx([row["loss"] for row in rows], rel=1e-4)  # there, norms are not decayed
    assert losses[-1] < losses[0]
    assert (
        duetvl.load_model(tmp_path / "mine", backend=be).config
        == duetvl.load_model(tmp_path / "model", backend=be).config
    )


def test_it_is_a_program(tmp_path):
    recipe = tiny_run.write_recipe(tmp_path)
    command = [sys.executable, str(EXAMPLES / "own_loop.py"), str(recipe), str(tmp_path / "mine"), "train.steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("step 1  loss 5.")


def test_it_is_as_short_as_it_says():
    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 42
