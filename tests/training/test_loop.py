"""Whole runs of a small real model: resuming, stopping, refusing, on both backends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import bag_model
import numpy as np
import pytest
from bag_model import write_records

from duetvl.core.backend import load_backend
from duetvl.core.errors import CheckpointError, ConfigError, DataError
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.checkpoints.run_directory import locked
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.schedule import total_steps
from duetvl.training.step import NonFiniteError
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics


@pytest.fixture
def recipe(tmp_path):
    write_records(tmp_path / "train.jsonl", 30)
    write_records(tmp_path / "val.jsonl", 9, seed=1)
    return {
        "model": {"path": "-", "dtype": "float32"},
        "data": {"train": str(tmp_path / "train.jsonl"), "pack_tokens": 32},
        "train": {"steps": 20, "global_batch": 8, "output_dir": str(tmp_path / "run")},
        "optim": {"lr": 0.05, "warmup": 0.1, "weight_decay": 0.01},
        "checkpoint": {"every": 5, "keep_last": None},
        "log": {"tensorboard": False, "plot": False},
    }


class Interrupted(BaseException):
    """As a kill, but in this process."""


def run(be, recipe, *overrides, at=None, what=None, **options):
    """Train; just before update number `at`, `what` happens."""

    def prepare(given, backend):
        job = bag_model.prepare(given, backend)
        if at is not None:
            _happen(job.model, at, what)
        return job

    return train(recipe, overrides, backend=be, prepare=prepare, **options)


def _happen(model, at, what):
    plain, seen = model.forward, []

    def forward(batch, last, **options):
        seen.append(batch)
        if len(seen) == at:
            what()
        return plain(batch, last, **options)

    model.forward = forward


def interrupt():
    raise Interrupted


def weights(run_dir) -> dict[str, bytes]:
    latest = Path(run_dir) / "checkpoints" / (Path(run_dir) / "checkpoints" / "latest").read_text().strip()
    found = {}
    for path in sorted(latest.glob("*.safetensors")):
        file = TensorFile(path)
        found |= {f"{path.name}:{name}": np.array(file.view(name)) for name in file.specs}
    return found


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(run_dir)) if "loss" in row]


def assert_same_run(be, one, other):
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    if be.capabilities.bitwise_repeatable:
        assert losses(one) == losses(other)
        assert all((left[name] == right[name]).all() for name in left)
    else:
        assert losses(one) == pytest.approx(losses(other), rel=1e-4)


def test_a_run_learns_and_leaves_its_files(be, recipe, tmp_path):
    evaluate = f"data.val={tmp_path}/val.jsonl", "train.eval_every=10"
    result = run(be, recipe, *evaluate, "log.plot=true", "checkpoint.export=true")
    assert (result.step, result.stopped_by) == (20, None)
    rows = read_metrics(tmp_path / "run")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[-1]["loss"] == result.loss < 0.3 * steps[0]["loss"]
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20]
    assert result.eval_loss < 2.0
    assert steps[0]["lr"] == 0.0
    assert max(row["lr"] for row in steps) == 0.05
    assert all(row["micro_batches"] >= row["tokens"] / 32 and row["peak_memory"] > 2**20 for row in steps)
    assert {"resolved_recipe.yaml", "checkpoints", "metrics.jsonl", "loss.png", "export"} <= set(
        os.listdir(tmp_path / "run")
    )
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-0000020"


def test_twenty_steps_are_ten_and_a_kill_and_ten(be, recipe, tmp_path, capsys):
    run(be, recipe)
    other = f"train.output_dir={tmp_path}/other"
    with pytest.raises(Interrupted):
        run(be, recipe, other, "checkpoint.every=10", at=40, what=interrupt)
    assert 10 < len(losses(tmp_path / "other")) < 20
    run(be, recipe, other, "checkpoint.every=10")
    assert "step-0000010 (step 10)" in capsys.readouterr().out
    assert_same_run(be, tmp_path / "run", tmp_path / "other")


def test_half_precision_resumes_exactly(recipe, tmp_path):
    be = load_backend("torch_npu", "cpu")
    run(be, recipe, "model.dtype=bfloat16")
    other = f"train.output_dir={tmp_path}/other"
    with pytest.raises(Interrupted):
        run(be, recipe, "model.dtype=bfloat16", other, at=30, what=interrupt)
    run(be, recipe, "model.dtype=bfloat16", other)
    assert_same_run(be, tmp_path / "run", tmp_path / "other")
    assert any(name.startswith("master") for name in weights(tmp_path / "run"))


def test_a_small_optimizer_state_resumes_exactly(be, recipe, tmp_path):
    options = "model.dtype=bfloat16", "optim.state_dtype=bfloat16", "optim.offload=true"
    run(be, recipe, *options)
    other = f"train.output_dir={tmp_path}/other"
    with pytest.raises(Interrupted):
        run(be, recipe, *options, other, at=30, what=interrupt)
    run(be, recipe, *options, other, "optim.offload=false")  # where it is kept does not matter
    assert_same_run(be, tmp_path / "run", tmp_path / "other")
    assert losses(tmp_path / "run")[-1] < 0.3 * losses(tmp_path / "run")[0]


SCRIPT = """
import sys
import bag_model
from duetvl.core.backend import load_backend
from duetvl.training.train import train
train(sys.argv[1], sys.argv[2:], backend=load_backend("torch_npu", "cpu"), prepare=bag_model.prepare)
"""


def start(recipe, tmp_path, *overrides) -> subprocess.Popen:
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    place = {"PYTHONPATH": str(Path(bag_model.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.json"), *overrides]
    return subprocess.Popen(command, env={**os.environ, **place}, stdout=subprocess.PIPE, text=True)


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run_dir)) < step:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_process_leaves_a_run_that_goes_on(recipe, tmp_path):
    be = load_backend("torch_npu", "cpu")
    steps = "train.steps=200"
    process = start(recipe, tmp_path, steps)
    wait_for_step(tmp_path / "run", 60)
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "run")) < 200
    run(be, recipe, steps)
    run(be, recipe, steps, f"train.output_dir={tmp_path}/whole", "checkpoint.every=null")
    assert_same_run(be, tmp_path / "run", tmp_path / "whole")


def test_a_signal_finishes_the_step_and_saves(be, recipe, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    result = run(be, recipe, "checkpoint.every=null", at=7, what=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert result.stopped_by == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert result.checkpoint.name == f"step-{result.step:07}"
    out = capsys.readouterr().out
    assert "SIGTERM: finishing this step, then saving" in out
    assert f"stopped at step {result.step} of 20" in out
    assert run(be, recipe, "checkpoint.every=null").step == 20
    run(be, recipe, f"train.output_dir={tmp_path}/whole")
    assert_same_run(be, tmp_path / "run", tmp_path / "whole")


def test_a_checkpoint_of_one_backend_goes_on_on_the_other(recipe, tmp_path):
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    backends = [load_backend(name, "cpu") for name in ("torch_npu", "mindspore")]
    for be in backends:
        run(be, recipe, f"train.output_dir={tmp_path}/{be.name}")
    first, second = (losses(tmp_path / be.name) for be in backends)
    assert first == pytest.approx(second, rel=1e-4)
    for be, other in (backends, backends[::-1]):
        target = f"train.output_dir={tmp_path}/on_{be.name}"
        run(be, recipe, target, resume=f"{tmp_path}/{other.name}@10")
        assert losses(tmp_path / f"on_{be.name}") == pytest.approx(first, rel=1e-4)


def test_a_longer_run_says_what_becomes_of_its_learning_rate(torch_be, recipe, capsys):
    linear = ("optim.schedule=linear", "optim.warmup=0")
    run(torch_be, recipe, "train.steps=4", *linear)
    assert "the schedule" not in capsys.readouterr().out
    run(torch_be, recipe, "train.steps=8", *linear)
    said = "the schedule spanned 4 steps and now spans 8: the learning rate was 0.0125 at step 4 and is"
    assert f"warning: {said} 0.025 at step 5\n" in capsys.readouterr().out
    run(torch_be, recipe, "train.steps=8", *linear)
    assert "the schedule" not in capsys.readouterr().out


def test_a_constant_learning_rate_is_the_same_in_a_longer_run(torch_be, recipe, capsys):
    run(torch_be, recipe, "train.steps=4", "optim.schedule=constant", "optim.warmup=0")
    run(torch_be, recipe, "train.steps=6", "optim.schedule=constant", "optim.warmup=0")
    assert "the schedule" not in capsys.readouterr().out


def test_a_finished_run_stays_as_it_is(be, recipe, tmp_path, capsys):
    done = run(be, recipe, "train.steps=4")
    before = weights(tmp_path / "run")
    again = run(be, recipe, "train.steps=4")
    assert "all 4 steps are done already" in capsys.readouterr().out
    assert (again.step, again.loss) == (4, done.loss)
    shorter = run(be, recipe, "train.steps=3")
    assert "all 3 steps are done already; it is at step 4" in capsys.readouterr().out
    assert (shorter.step, shorter.loss) == (4, done.loss)
    assert all((before[name] == values).all() for name, values in weights(tmp_path / "run").items())


# -- decisions that need no training; one backend is enough ----------------------------------------------------------


@pytest.fixture
def torch_be():
    return load_backend("torch_npu", "cpu")


def test_another_recipe_is_refused_with_the_keys(torch_be, recipe, tmp_path):
    run(torch_be, recipe, "train.steps=5")
    with pytest.raises(ConfigError) as caught:
        run(torch_be, recipe, "optim.lr=0.1", "data.seed=3", "train.steps=9", "log.every=2")
    assert "was trained with another recipe: data.seed 0 -> 3, optim.lr 0.05 -> 0.1; restore these" in str(caught.value)
    assert len(losses(tmp_path / "run")) == 5


def test_a_section_that_is_absent_now_makes_another_recipe(torch_be, recipe):
    run(torch_be, recipe, "train.steps=5", "lora.rank=4")
    with pytest.raises(ConfigError, match=r"with another recipe: .*lora\.rank 4 -> None, .*lora\.alpha"):
        run(torch_be, recipe, "train.steps=6")


def test_harmless_differences_are_said(torch_be, recipe, capsys):
    run(torch_be, recipe, "train.steps=5")
    assert run(torch_be, recipe, "train.steps=6", "data.pack_tokens=64").step == 6
    changed = "data.cutoff_len 32 -> 64, data.pack_tokens 32 -> 64, train.steps 5 -> 6"
    assert f"changed since then: {changed}" in capsys.readouterr().out
    val = recipe["data"]["train"]
    assert run(torch_be, recipe, "train.steps=6", "data.pack_tokens=64", f"data.val={val}").step == 6
    assert f"changed since then: data.val [] -> ['{val}']\n" in capsys.readouterr().out


def test_what_becomes_of_long_samples_may_change_until_one_was_cut(torch_be, recipe):
    run(torch_be, recipe, "train.steps=5")
    assert run(torch_be, recipe, "train.steps=6", "data.too_long=drop", "data.on_bad_sample=skip").step == 6
    with pytest.raises(ConfigError, match=r"with another recipe: data.cutoff_len 32 -> 64; restore this"):
        run(torch_be, recipe, "train.steps=7", "data.too_long=drop", "data.pack_tokens=64")
    same = "data.too_long=drop", "data.cutoff_len=32", "data.pack_tokens=64"
    assert run(torch_be, recipe, "train.steps=7", *same).step == 7


def test_other_packs_are_another_run_where_the_loss_sees_them(torch_be, recipe):
    run(torch_be, recipe, "train.steps=5", "train.loss=micro_batch")
    with pytest.raises(ConfigError, match=r"with another recipe: data.pack_tokens 32 -> 64; restore this"):
        run(torch_be, recipe, "train.steps=6", "train.loss=micro_batch", "data.pack_tokens=64")


def test_resume_needs_a_checkpoint(torch_be, recipe, tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        run(torch_be, recipe, resume="")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        run(torch_be, recipe, resume=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_resume_from_an_earlier_step(torch_be, recipe, tmp_path):
    run(torch_be, recipe)
    before = losses(tmp_path / "run")
    run(torch_be, recipe, resume="@10")
    assert losses(tmp_path / "run") == before
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; there are 5, 10, 15, 20"):
        run(torch_be, recipe, resume="@7")
    with pytest.raises(CheckpointError, match="after @ comes the number of a step"):
        run(torch_be, recipe, resume="x@last")


def test_a_run_that_went_back_stays_there_when_it_is_killed_before_it_saves(torch_be, recipe, tmp_path):
    run(torch_be, recipe)
    with pytest.raises(Interrupted):
        run(torch_be, recipe, "checkpoint.every=null", resume="@5", at=6, what=interrupt)
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-0000005\n"
    run(torch_be, recipe)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 21))


def test_another_run_never_replaces_this_one(torch_be, recipe, tmp_path):
    run(torch_be, recipe, "train.steps=5")
    run(torch_be, recipe, "train.steps=5", f"train.output_dir={tmp_path}/other")
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        run(torch_be, recipe, resume=str(tmp_path / "other"))


def test_other_data_is_refused(torch_be, recipe, tmp_path):
    run(torch_be, recipe, "train.steps=5")
    write_records(tmp_path / "train.jsonl", 31)
    with pytest.raises(
        DataError,
        match=r"train\.jsonl: has 31 records, but .* data position is one of 30, of .*step-0000005; restore",
    ):
        run(torch_be, recipe)


def test_a_damaged_checkpoint_is_passed_over_aloud(torch_be, recipe, tmp_path, capsys):
    run(torch_be, recipe, "train.steps=10")
    damaged = next((tmp_path / "run" / "checkpoints" / "step-0000010").glob("weights*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert run(torch_be, recipe, "train.steps=12").step == 12
    out = capsys.readouterr().out
    assert "damaged, skipped" in out
    assert "step-0000005 (step 5)" in out


def test_bad_data_at_the_start_writes_nothing(torch_be, recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "x y"}]}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:1: not numbers"):
        run(torch_be, recipe)
    assert not (tmp_path / "run").exists()


def test_not_finite_stops_and_keeps_the_last_checkpoint(torch_be, recipe, tmp_path):
    with pytest.raises(NonFiniteError, match=r"samples of the step: train\.jsonl:\d+"):
        run(torch_be, recipe, "optim.lr=1e30", "optim.clip=null", "checkpoint.every=1")
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_step_without_trained_tokens_is_skipped_aloud(torch_be, recipe, tmp_path, capsys):
    lines = (tmp_path / "train.jsonl").read_text().splitlines()[:8]
    only_user = [line.replace("assistant", "user") for line in lines[:4]]
    (tmp_path / "train.jsonl").write_text("\n".join([*only_user, *lines[4:]]))
    result = run(torch_be, recipe, "train.global_batch=4", "train.steps=2", "data.shuffle=false")
    assert result.step == 2
    out = capsys.readouterr().out
    assert "warning: step 1 has no trained token and is skipped; samples: train.jsonl:1, train.jsonl:2" in out
    assert losses(tmp_path / "run")[0] is None


def test_two_processes_do_not_train_in_one_place(torch_be, recipe, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(ConfigError, match="another process is training there"):
        run(torch_be, recipe)


def test_a_directory_that_cannot_be_written(torch_be, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        run(torch_be, recipe, f"train.output_dir={tmp_path}/file/run")


def test_epochs_round_up_to_whole_steps():
    def steps(**train_section):
        return total_steps(make_recipe({"model": {"path": "m"}, "data": {"train": "d"}, "train": train_section}), 30)

    assert steps(global_batch=8) == 4
    assert steps(global_batch=8, epochs=2) == 8
    assert steps(global_batch=8, epochs=0.5) == 2
    assert steps(global_batch=64) == 1
    assert steps(steps=7) == 7


def test_a_layout_for_another_number_of_processes_is_refused(torch_be, recipe):
    with pytest.raises(ConfigError, match=r"needs 2 processes, and 1 was started; .* or parallel.tp=1 takes the same"):
        run(torch_be, recipe, "parallel.tp=2")
