"""What a run directory keeps: who may start there, what is never overwritten, what a restart sets aside."""

from __future__ import annotations

import json
import os
import shutil
from itertools import product
from pathlib import Path

import bag_model
import pytest
from bag_model import write_records

from duetvl.cli import main
from duetvl.core.backend import load_backend
from duetvl.core.errors import ConfigError
from duetvl.storage.finding import find_checkpoint, parse_run
from duetvl.training.checkpoints import space
from duetvl.training.checkpoints.differences import BOUNDS, differences
from duetvl.training.checkpoints.run_directory import find_start, locked
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.yaml_values import read_yaml
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import read_metrics


class Killed(BaseException):
    """As a kill, but in this process."""


class KillAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, run, row):
        if run.step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def be():
    return load_backend("torch_npu", "cpu")


@pytest.fixture
def recipe(tmp_path):
    write_records(tmp_path / "train.jsonl", 30)
    return {
        "model": {"path": "-", "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "pack_tokens": 32},
        "train": {"steps": 6, "global_batch": 8, "output_dir": str(tmp_path / "run")},
        "optim": {"lr": 0.05},
        "checkpoint": {"every": 2, "export": True},
        "log": {"tensorboard": False},
    }


def prepare(recipe, backend):
    """As bag_model's, with an export of one file."""

    def export(ref, target):
        target.mkdir(exist_ok=True)
        (target / "config.json").touch()
        (target / "model").write_text(f"lr {recipe.optim.lr}")

    job = bag_model.prepare(recipe, backend)
    return type(job)(**{**vars(job), "export": export})


def run(be, recipe, *overrides, **options):
    return train(recipe, overrides, backend=be, prepare=prepare, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# -- one at a time ----------------------------------------------------------------------------------------------------


def test_who_loads_has_the_directory_already(be, recipe, tmp_path):
    """While a start loads, another could train to the end; the first would then go back and undo that."""
    run(be, recipe, "train.steps=2")

    def slowly(given, backend):
        with pytest.raises(ConfigError, match="another process is training there"):
            run(be, recipe)
        return prepare(given, backend)

    assert train(recipe, [], backend=be, prepare=slowly).step == 6
    assert find_checkpoint(tmp_path / "run").step == 6


def test_a_start_that_fails_leaves_no_directory(be, recipe, tmp_path):
    with pytest.raises(ConfigError, match="no field 'nothing'"):
        run(be, recipe, "train.nothing=1")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "x y"}]}\n')
    with pytest.raises(Exception, match="not numbers"):
        run(be, recipe, f"train.output_dir={tmp_path}/a/b/run")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


# -- results without a checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "override"),
    [
        *product(["metrics.jsonl", "export", "loss.png"], ["train.steps=6", "optim.lr=0.1"]),
        ("resolved_recipe.yaml", "optim.lr=0.1"),
    ],
)
def test_results_are_never_emptied(be, recipe, tmp_path, kept, override):
    """People remove `checkpoints/` to save space, and keep what they want to keep."""
    run(be, recipe)
    place = tmp_path / "run"
    for path in list(place.iterdir()):
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(place)
    run(be, recipe, override, f"train.output_dir={tmp_path}/other")
    for resume in (None, f"{tmp_path}/other"):
        expected = rf"run: holds {kept} and no checkpoint to go on from; give a new directory .* with --restart$"
        with pytest.raises(ConfigError, match=expected):
            run(be, recipe, override, resume=resume)
        assert contents(place) == before


def test_the_command_line_says_so_in_one_line(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"epoch": 1}\n')  # of another tool
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert main(["train", str(tmp_path / "r.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "holds metrics.jsonl and no checkpoint to go on from" in error
    assert main(["train", str(tmp_path / "r.json"), "--restart", "--resume"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert contents(tmp_path / "run") == {"metrics.jsonl": b'{"epoch": 1}\n'}


def test_a_restart_sets_aside_and_never_removes(be, recipe, tmp_path, capsys):
    run(be, recipe)
    (tmp_path / "run/notes.txt").write_text("mine")
    (tmp_path / "run/evals/ai2d_test").mkdir(parents=True)
    (tmp_path / "run/evals/ai2d_test/scores.json").write_text("{}")
    first = contents(tmp_path / "run")
    assert run(be, recipe, "optim.lr=0.1", restart=True).step == 6
    assert f"starting over; what {tmp_path}/run held is in {tmp_path}/run/before-restart-1" in capsys.readouterr().out
    assert contents(tmp_path / "run/before-restart-1") == {k: v for k, v in first.items() if k != "notes.txt"}
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert read_yaml(tmp_path / "run/resolved_recipe.yaml")["optim"]["lr"] == 0.1
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    run(be, recipe, "optim.lr=0.2", restart=True)
    assert (tmp_path / "run/before-restart-2/export/model").read_text() == "lr 0.1"


def test_what_a_link_leads_to_is_set_aside_as_well(be, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to("../disk")
    run(be, recipe)
    run(be, recipe, "train.steps=2", restart=True)
    assert find_checkpoint(tmp_path / "run/before-restart-1").step == 6
    assert find_checkpoint(tmp_path / "disk/step-0000006").step == 6
    assert find_checkpoint(tmp_path / "run").step == 2


def test_a_restart_does_not_take_away_its_own_model(be, recipe, tmp_path):
    run(be, recipe)
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.path .*run/export is part of what --restart sets aside"):
        run(be, recipe, f"model.path={tmp_path}/run/export", restart=True)
    assert contents(tmp_path / "run") == before


def test_a_run_that_has_not_saved_is_started_over_by_its_own_recipe(be, recipe, tmp_path, capsys):
    with pytest.raises(Killed):
        run(be, recipe, "checkpoint.every=5", callbacks=[KillAt(3)])
    before = contents(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 3
    with pytest.raises(ConfigError, match=r"another recipe \(optim.lr 0.05 -> 0.1\) that ended before its first"):
        run(be, recipe, "optim.lr=0.1")
    assert contents(tmp_path / "run") == before
    assert run(be, recipe, "log.every=2").step == 6
    assert "has saved no checkpoint: starting it over from step 0" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run/.unsaved").exists()


def test_a_run_that_was_killed_before_its_first_step_holds_nothing(be, recipe, tmp_path):
    with pytest.raises(Killed):
        run(be, recipe, callbacks=[KillBeforeTheFirstStep()])
    assert run(be, recipe, "optim.lr=0.1").step == 6


class KillBeforeTheFirstStep(Callback):
    def on_start(self, run):
        raise Killed


@pytest.mark.parametrize("there", ["a file", "a link to a disk that is not mounted"])
def test_checkpoints_that_cannot_be_written_are_found_before_the_first_step(be, recipe, tmp_path, there):
    (tmp_path / "run").mkdir()
    place = tmp_path / "run/checkpoints"
    place.write_text("mine") if there == "a file" else place.symlink_to(tmp_path / "disk/checkpoints")
    with pytest.raises(ConfigError, match="run/checkpoints: cannot be written: File exists"):
        run(be, recipe)
    assert read_metrics(tmp_path / "run") == []


def test_checkpoints_may_be_a_link_to_another_disk(be, recipe, tmp_path, monkeypatch):
    """Room is looked for there."""
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    asked = []
    monkeypatch.setattr(space, "free_space", lambda path: asked.append(path.resolve()))
    assert run(be, recipe).step == 6
    assert asked == [tmp_path / "disk"]
    assert find_checkpoint(tmp_path / "disk/step-0000006").step == 6


def test_a_run_that_starts_over_has_curves_of_its_own(be, recipe, tmp_path):
    """Weights & Biases drops the steps that it has seen already under the same id."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/trackers.json").write_text('{"wandb": "old"}')
    run(be, recipe, "train.steps=2")
    assert not (tmp_path / "run/trackers.json").exists()
    (tmp_path / "run/trackers.json").write_text('{"wandb": "its own"}')
    run(be, recipe)
    assert (tmp_path / "run/trackers.json").exists()


# -- files of the user's ----------------------------------------------------------------------------------------------


def test_a_recipe_in_its_own_output_directory_stays_as_it_is(be, recipe, tmp_path):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/recipe.yaml"
    file.write_text("# mine\n" + json.dumps(recipe))
    before = file.read_bytes()
    run(be, file)
    assert file.read_bytes() == before
    resolved = tmp_path / "run/resolved_recipe.yaml"
    assert read_yaml(resolved)["optim"]["schedule"] == "cosine"
    resolved.write_text("# what I found: ...\n" + resolved.read_text())
    before = resolved.read_bytes()
    assert run(be, resolved).step == 6
    assert resolved.read_bytes() == before
    shutil.rmtree(tmp_path / "run")
    resolved.parent.mkdir()
    resolved.write_bytes(before)  # copied to where the next run is to be
    assert run(be, resolved).step == 6
    assert resolved.read_bytes() == before


def test_a_broken_line_of_metrics_takes_no_other_with_it(be, recipe, tmp_path):
    run(be, recipe, "train.steps=4")
    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "\0\0\0", '["no row"]', '{"step": "x"}', *lines[1:]]) + "\n")
    run(be, recipe)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_another_layout_goes_on(be, recipe):
    run(be, recipe, "train.steps=2")
    start = find_start(make_recipe(recipe, ["parallel.tp=2", "parallel.dp=4"]))
    assert start.checkpoint.step == 2
    assert start.notes[-1] == "changed since then: train.steps 2 -> 6, parallel.dp 1 -> 4, parallel.tp 1 -> 2"


@pytest.mark.parametrize("named", ["run/checkpoints/step-0000004", "run/./checkpoints@4", "run@4"])
def test_a_step_of_its_own_is_resumed_by_whatever_names_it(be, recipe, tmp_path, named, capsys):
    """As other trainers are handed a checkpoint's own directory."""
    run(be, recipe)
    assert run(be, recipe, "train.steps=5", resume=f"{tmp_path}/{named}").step == 5
    assert "step-0000004 (step 4)" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_run_whose_name_ends_like_a_step(be, recipe, tmp_path):
    run(be, recipe, "train.steps=2", f"train.output_dir={tmp_path}/lr@3")
    assert find_checkpoint(*parse_run(f"{tmp_path}/lr@3")).step == 2
    assert find_checkpoint(*parse_run(f"{tmp_path}/lr@3@2")).step == 2


def test_another_run_is_resumed_from_a_checkpoint_of_it(be, recipe, tmp_path):
    run(be, recipe)
    place = tmp_path / "run/checkpoints/step-0000004"
    assert run(be, recipe, f"train.output_dir={tmp_path}/new", resume=str(place)).step == 6
    assert [row["step"] for row in read_metrics(tmp_path / "new")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="new has checkpoints of its own"):
        run(be, recipe, f"train.output_dir={tmp_path}/new", resume=str(place))


def test_a_newest_checkpoint_that_was_removed_is_told(be, recipe, tmp_path, capsys):
    run(be, recipe)
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000006")
    assert run(be, recipe).step == 6
    out = capsys.readouterr().out
    assert "skipped: " in out
    assert "step-0000006: the newest checkpoint, is not there any more" in out


def test_the_lock_goes_with_the_run(be, recipe, tmp_path):
    run(be, recipe)
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".")]
    with locked(tmp_path / "run") as notes:
        assert notes == ()


def test_a_run_of_before_training_had_bounds_of_its_own_is_not_resumed_with_them(recipe):
    """There, null was the model directory's number. Resuming asks for it to be written out."""
    now = make_recipe(recipe)
    stored = now.model_dump(mode="json")
    assert differences(now, stored) == ([], [])
    del stored["data"]["system"]  # which such a run did not have yet
    harmless, grave = differences(now, stored)
    assert grave == [f"{key} the number of the model directory -> None" for key in BOUNDS] and not harmless
    written = make_recipe(recipe, [f"{key}={2**20}" for key in BOUNDS])
    harmless, grave = differences(written, stored)
    assert len(harmless) == 3 and not grave
    stored["data"]["resize"] = "llamafactory"  # has the bounds that it had
    assert differences(make_recipe(recipe, ["data.resize=llamafactory"]), stored) == ([], [])
