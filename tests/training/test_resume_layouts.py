"""A run over ranks goes on with other ranks and on the other backend as if it had never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from duetvl.storage.finding import find_checkpoint
from duetvl.training.checkpoints.export import export_run
from duetvl.training.watching.metrics import read_metrics

OPTIONS = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=null", "data.val=null", "model.freeze=[vision]")
DUETVL = Path(sys.executable).with_name("duetvl")


@pytest.fixture
def run(tmp_path):
    """Trains the tiny model to a directory's name, on so many ranks of a backend: the losses."""
    pytest.importorskip("torch")
    pytest.importorskip("mindspore")
    recipe = tiny_run.write_recipe(tmp_path)

    def start(name, backend, ranks, *options):
        launch = [DUETVL, "launch", "--backend", backend, "--nproc", str(ranks), "--"] if ranks > 1 else [DUETVL]
        place = [f"train.output_dir={tmp_path / name}", f"backend.name={backend}"]
        command = [*map(str, launch), "train", str(recipe), *place, *OPTIONS, *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]

    return start


def test_two_by_two_ranks_one_process_and_three_ranks_make_one_curve(run, tmp_path):
    whole = run("whole", "torch_npu", 1)
    grid = ("parallel.dp=2", "parallel.tp=2", "checkpoint.background=true", "checkpoint.export=true")
    assert run("grid", "torch_npu", 4, *grid) == pytest.approx(whole, rel=1e-4)
    alone = run("alone", "mindspore", 1, "--resume", f"{tmp_path}/grid@2")
    assert alone == pytest.approx(whole, rel=1e-4)
    three = run("three", "torch_npu", 3, "parallel.dp=3", "--resume", f"{tmp_path}/alone@4")
    assert three == pytest.approx(whole, rel=1e-4)
    export_run(f"{tmp_path}/grid", tmp_path / "exported")
    for file in (tmp_path / "grid" / "export").iterdir():
        assert file.read_bytes() == (tmp_path / "exported" / file.name).read_bytes(), file.name


def test_a_pipeline_goes_on_over_divided_sequences_and_weights_and_back(run, tmp_path):
    whole = run("whole", "torch_npu", 1)
    stages = ("parallel.pp=2", "parallel.tp=2", "parallel.sequence=true")
    assert run("stages", "torch_npu", 4, *stages) == pytest.approx(whole, rel=1e-4)
    pieces = ("parallel.dp=2", "parallel.cp=2", "parallel.zero=3", "train.recompute=full")
    pieces += ("--resume", f"{tmp_path}/stages@2")
    assert run("pieces", "mindspore", 4, *pieces) == pytest.approx(whole, rel=1e-4)
    assert run("back", "torch_npu", 4, *stages, "--resume", f"{tmp_path}/pieces@4") == pytest.approx(whole, rel=1e-4)


def test_a_stream_goes_on_in_mid_epoch_with_the_same_samples_on_fewer_ranks(run, tmp_path):
    """Twelve records in steps of five: each checkpoint lies within an epoch."""
    stream = ("data.streaming=true", "data.shuffle_buffer=5", "data.workers=2", "train.global_batch=5")
    stream += ("optim.eps=1e-4",)
    whole = run("whole", "torch_npu", 1, *stream, "data.workers=0")
    three = run("three", "torch_npu", 3, *stream, "parallel.dp=3", "checkpoint.every=2")
    two = run("two", "mindspore", 2, *stream, "parallel.dp=2", "--resume", f"{tmp_path}/three@2")
    assert three == pytest.approx(whole, rel=1e-5)
    assert two == pytest.approx(whole, rel=1e-5)
    ends = [find_checkpoint(tmp_path / name, 6).meta.data_position for name in ("whole", "two")]
    assert ends[0] == ends[1]
    rows = [read_metrics(tmp_path / name) for name in ("whole", "two")]
    assert [row["total_tokens"] for row in rows[0]] == [row["total_tokens"] for row in rows[1]]
