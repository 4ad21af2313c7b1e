"""Evaluation before the first step, the end of a run that does not become better, and the best checkpoint."""

from __future__ import annotations

import math

import bag_model
import pytest
from bag_model import write_records

from duetvl.core.backend import load_backend
from duetvl.core.errors import CheckpointError
from duetvl.storage.finding import parse_run, saved_steps
from duetvl.training.evaluations import Evaluations
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback
from duetvl.training.watching.metrics import read_metrics


@pytest.fixture
def recipe(tmp_path):
    write_records(tmp_path / "train.jsonl", 30)
    write_records(tmp_path / "val.jsonl", 9, seed=1)
    return {
        "model": {"path": "-", "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "val": str(tmp_path / "val.jsonl"), "pack_tokens": 32},
        "train": {"steps": 12, "global_batch": 8, "output_dir": str(tmp_path / "run"), "eval_every": 2},
        "optim": {"lr": 0.05},
        "checkpoint": {"every": 100, "keep_last": 1},
        "log": {"tensorboard": False, "plot": False},
    }


def run(recipe, *overrides, **options):
    return train(recipe, overrides, backend=load_backend("torch_npu", "cpu"), prepare=bag_model.prepare, **options)


def losses(run_dir):
    return {row["step"]: row["eval_loss"] for row in read_metrics(run_dir) if "eval_loss" in row}


def lowest(run_dir):
    evaluations = losses(run_dir)
    return min(evaluations, key=evaluations.get)


def test_evaluations_count_from_the_best():
    some = Evaluations({0: 3.0, 2: 2.0, 4: 2.0})
    assert (some.best(), some.best({0, 4}), some.best({1}), some.last_step) == (2, 4, None, 4)
    assert some.reason_to_stop(None) is some.reason_to_stop(2) is None
    some.add(6, math.nan)  # no better one
    assert some.reason_to_stop(2) == "no better eval_loss in 2 evaluations (the lowest is 2.0000 at step 2)"
    some.add(8, None)  # nothing was evaluated
    assert some.last_step == 8 and some.reason_to_stop(3) is None
    some.add(10, 1.0)
    assert some.improved_at(10) and some.reason_to_stop(1) is None
    assert Evaluations({0: 1.0, 2: 2.0}).improved_at(2)  # nothing trained is better


def test_a_run_that_does_not_become_better_ends_as_finished(recipe, tmp_path, capsys):
    still = "optim.lr=1e-30", "train.eval_first=true"  # an update that no float32 weight can hold
    result = run(recipe, *still, "train.patience=2", "checkpoint.export=true")
    assert (result.step, result.stopped_by, result.checkpoint.name) == (4, None, "step-0000004")
    assert result.stop_reason.startswith("no better eval_loss in 2 evaluations (the lowest is ")
    assert list(losses(tmp_path / "run")) == [0, 2, 4] and len(set(losses(tmp_path / "run").values())) == 1
    assert f"stopped at step 4 of 12: {result.stop_reason}" in capsys.readouterr().out
    assert (tmp_path / "run/export").is_dir()
    again = run(recipe, *still, "train.patience=2")
    assert (again.step, again.stop_reason) == (4, result.stop_reason)
    longer = run(recipe, *still, "train.patience=3")
    assert longer.step == 6 and list(losses(tmp_path / "run")) == [0, 2, 4, 6]


def test_a_run_that_becomes_better_goes_to_its_end(recipe, tmp_path):
    result = run(recipe, "train.patience=1", "train.eval_first=true", "checkpoint.keep_best=eval_loss")
    assert (result.step, result.stop_reason) == (12, None)
    assert saved_steps(tmp_path / "run") == {12}, "no best that has been replaced"
    evaluations = [*losses(tmp_path / "run").values()]
    assert len(evaluations) == 7 and evaluations == sorted(evaluations, reverse=True)


def test_the_best_checkpoint_is_kept_and_has_a_name(recipe, tmp_path):
    """The learning rate is so high that the validation loss is at its lowest long before the end."""
    place, note = tmp_path / "run", tmp_path / "run/checkpoints/best"
    high = "optim.lr=2", "optim.schedule=constant", "checkpoint.every=5"
    keep = *high, "checkpoint.keep_best=eval_loss"
    run(recipe, *keep, "train.steps=10")
    best = lowest(place)
    assert best < 10 and best % 5, "neither the last one nor one that is due anyway"
    assert saved_steps(place) == {best, 10} and parse_run(f"{place}@best") == (place, best)
    note.unlink()  # as after a kill before it was written
    run(recipe, *keep, "train.steps=11")
    best = lowest(place)
    assert best < 11 and saved_steps(place) == {best, 11} and parse_run(f"{place}@best") == (place, best)
    back = run(recipe, *keep, "train.steps=11", resume="@best")
    assert back.step == 11 and lowest(place) == best
    run(recipe, *high, "train.steps=13")
    assert saved_steps(place) == {13}
    with pytest.raises(
        CheckpointError, match=r"run@best: no best checkpoint is recorded .*checkpoint.keep_best=eval_loss"
    ):
        parse_run(f"{place}@best")


def test_other_validation_data_begin_to_count_anew(recipe, tmp_path, capsys):
    """That of before stays the best as long as there is nothing to compare with."""
    best_at = {}

    class Look(Callback):
        def on_step(self, run, row):
            best_at[run.step] = parse_run(f"{run.run_dir}@best")[1]

    place = tmp_path / "run"
    write_records(tmp_path / "other.jsonl", 9, seed=2)
    worse = "optim.lr=2", "optim.schedule=constant", "checkpoint.keep_best=eval_loss", "checkpoint.every=100"
    run(recipe, *worse, "train.steps=11")
    before = parse_run(f"{place}@best")[1]
    (tmp_path / "moved").mkdir()
    (tmp_path / "val.jsonl").rename(tmp_path / "moved/val.jsonl")
    run(recipe, *worse, "train.steps=11", f"data.val={tmp_path}/moved/val.jsonl")
    assert "validation data" not in capsys.readouterr().out
    other = *worse, f"data.val={tmp_path}/other.jsonl"
    run(recipe, *other, "train.steps=14", callbacks=[Look()])
    assert "no eval_loss of before counts" in capsys.readouterr().out
    assert best_at == {12: before, 13: 12, 14: 12}
    run(recipe, *other, "train.steps=14")
    assert "validation data" not in capsys.readouterr().out
    new = {step: loss for step, loss in losses(place).items() if step > 11}
    assert list(new) == [12, 14] and parse_run(f"{place}@best")[1] == min(new, key=new.get)


def test_an_evaluation_of_a_run_that_has_saved_nothing_is_made_again(recipe, tmp_path):
    class Killed(BaseException):
        pass

    class Kill(Callback):
        def on_eval(self, run, row):
            raise Killed

    first = "train.eval_first=true", "train.steps=2"
    with pytest.raises(Killed):
        run(recipe, *first, callbacks=[Kill()])
    assert list(losses(tmp_path / "run")) == [0]
    run(recipe, *first)
    rows = [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row]
    assert rows == [0, 2]
