"""Shares of a device's peaks, fitted to runs: found again where they are known, and what a run must have for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from duetvl.cli import main
from duetvl.core.errors import ConfigError
from duetvl.cost_model.devices import Shares, device_type
from duetvl.models.qwen_vl.config import published_config
from duetvl.planning.calibration import Measured, describe, fitted, read_run, shares_of, written
from duetvl.training.expected import SampleSize, cost_model
from duetvl.training.memory import division_of
from duetvl.training.recipe.reading import load_recipe, make_recipe
from duetvl.training.recipe.yaml_values import write_yaml

DEVICE = device_type("910B3")


def run_of(name: str, **parallel: object) -> Measured:
    """A run of the 7B shape, whose seconds are still to be set."""
    values = {"model": {"path": name, "dtype": "bfloat16"}, "data": {"train": "-"}, "train": {"global_batch": 64}}
    recipe = make_recipe({**values, "parallel": parallel})
    config, sizes = published_config("Qwen2.5-VL-7B"), [SampleSize(128, (512,), np.array([[1, 36, 36]]))]
    return Measured(Path(name), division_of(recipe, config), cost_model(recipe, config, None, sizes, DEVICE), 1.0, 10)


def taken(run: Measured, shares: Shares) -> Measured:
    """The run on a device that reaches these shares."""
    return replace(run, seconds=run.expected(shares).seconds)


def test_one_run_tells_what_its_products_reach():
    run = taken(run_of("alone"), Shares(products=0.31))
    found = fitted([run])
    assert found == replace(DEVICE.shares, products=pytest.approx(0.31, rel=0.02))
    before, after = run.expected(DEVICE.shares), run.expected(found)
    assert abs(after.seconds - run.seconds) < 0.01 * run.seconds < abs(before.seconds - run.seconds)


def test_runs_of_several_layouts_tell_what_links_reach():
    shares = Shares(products=0.42, links=0.35)
    runs = [taken(run_of("alone"), shares), taken(run_of("divided", tp=8, sequence=True), shares)]
    found = fitted(runs)
    assert (found.products, found.links) == (pytest.approx(0.42, rel=0.03), pytest.approx(0.35, rel=0.05))
    other = run_of("other", dp=2, tp=4, sequence=True)  # and with them another layout is foretold
    true, foretold = (other.expected(one).seconds for one in (shares, found))
    assert foretold == pytest.approx(true, rel=0.03)
    assert [line.split(":")[0] for line in describe(runs, found)] == [
        "alone",
        "divided",
        "shares of the peaks, to give again",
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of a tiny model: what `read_run` looks at."""
    place = tmp_path_factory.mktemp("calibration")
    recipe = load_recipe(tiny_run.write_recipe(place), ["model.dtype=float32"])
    directory = place / "run"
    directory.mkdir()
    (directory / "resolved_recipe.yaml").write_text(write_yaml(recipe.model_dump(mode="json")))
    rows = [{"step": step, "step_s": 9.0 if step < 3 else 0.02, "data_wait": 0.25} for step in range(1, 8)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_a_plan_from_a_run(run, capsys):
    measured = read_run(run, None)
    assert (measured.seconds, measured.steps) == (
        pytest.approx(0.015),
        5,
    )  # without its first two, and the waits for data
    command = ["plan", str(run.parent / "model"), "--devices", "1", "--sample", "64", "--picture", "56x56"]
    command += ["--answer", "8", "--pictures", "1", "--device-type", "cpu"]
    assert main([*command, "--measured", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{run}: 0.015 s a step (median of 5), expected ")
    assert said[0].endswith("with the shares below 0.015 s")
    shares = said[1].rpartition(" ")[2]
    assert main([*command, "--shares", shares]) == 0
    assert capsys.readouterr().out


def test_what_cannot_be_fitted_to(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is not the directory of a run, it has no resolved_recipe\.yaml"):
        read_run(tmp_path, None)
    (tmp_path / "resolved_recipe.yaml").write_bytes((run / "resolved_recipe.yaml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_s": 2.0, "data_wait": 0.0}\n')
    with pytest.raises(ConfigError, match="a run of at least 5 is needed"):
        read_run(tmp_path, None)


def test_shares_as_text():
    assert shares_of("products=0.4, links=0.25", Shares()) == Shares(products=0.4, links=0.25)
    assert shares_of(written(Shares(0.37, 0.7, 0.6)), Shares()) == Shares(0.37, 0.7, 0.6)
    for text in ("0.4", "product=0.4", "links=0", "links=a", "products=9", ""):
        with pytest.raises(ConfigError, match="give numbers above 0"):
            shares_of(text, Shares())
