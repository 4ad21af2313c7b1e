"""Benchmarks while a model is trained: the scores of the steps, as `duetvl eval` gives them for what was saved."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import miniatures
import pytest
import tiny_run

import duetvl
from duetvl.cli import main
from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError, DataError
from duetvl.evaluating import TaskScores
from duetvl.evaluation.answers import read_answers
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback, Running
from duetvl.training.watching.metrics import read_metrics

OPTIONS = [
    "eval.every=2", "eval.limit=10", "eval.min_pixels=784", "eval.max_pixels=3136", "eval.max_new_tokens=4",
    "eval.at_once=4", "log.tensorboard=true", "data.val=null",
]  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_scores_as_a_run_goes_along(be: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, data = tiny_run.write_recipe(tmp_path, std=0.2), miniatures.ai2d(tmp_path)
    options = [*OPTIONS, f"eval.tasks={{ai2d_test: {data}}}"]
    result = duetvl.train(recipe, [*options, "checkpoint.export=true", "checkpoint.every=2"], backend=be)
    rows = [row for row in read_metrics(result.run_dir) if "eval_ai2d_test" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["eval_ai2d_test_low"] <= rows[1]["eval_ai2d_test"] <= rows[1]["eval_ai2d_test_high"]
    assert "step 4/4  ai2d_test " in capsys.readouterr().out
    last = result.run_dir / "evals" / "ai2d_test" / "step-0000004"
    assert read(last / "scores.json")["score"] == rows[1]["eval_ai2d_test"]

    # What was exported answers the same.
    words = ["--task", "ai2d_test", "--data", str(data), "-o", str(tmp_path / "own"), "--limit", "10"]
    pixels = ["--min-pixels", "784", "--max-pixels", "3136", "--max-new-tokens", "4"]
    model = ["eval", str(result.run_dir / "export"), "--backend", be.name, "--device", "cpu"]
    assert main([*model, *words, *pixels]) == 0
    ours, kept = read_answers(tmp_path / "own"), read_answers(last)
    assert {n: row["text"] for n, row in ours.items()} == {n: row["text"] for n, row in kept.items()}
    assert len(kept) == 10 and read(tmp_path / "own" / "scores.json")["score"] == rows[1]["eval_ai2d_test"]
    assert main(["eval", "--compare", str(last.with_name("step-0000002")), str(last)]) == 0
    assert "10 questions that both have answered" in capsys.readouterr().out

    # From an earlier checkpoint, asked otherwise: the later step is done and asked again.
    again = duetvl.train(recipe, [*options, "eval.max_new_tokens=2", "eval.limit=4"], backend=be, resume="@2")
    assert again.step == 4 and len(read_answers(last)) == 4
    assert main(["plot", str(again.run_dir), "--key", "eval_ai2d_test"]) == 0


def test_a_last_step_before_its_time_and_one_that_a_signal_cut_short_have_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Signal(Callback):
        def on_step(self, run: Running, row: Any) -> None:
            if run.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe, data = tiny_run.write_recipe(tmp_path, std=0.2), miniatures.ai2d(tmp_path)
    options = [*OPTIONS[:-2], f"eval.tasks={{ai2d_test: {data}}}", "eval.limit=2", "eval.max_new_tokens=2"]
    options += ["optim.lr=1e-30", "train.eval_every=1", "train.eval_first=true"]  # never better than at the start

    def trained(*more: str) -> tuple[int, list[int]]:
        be = duetvl.load_backend("torch_npu", "cpu")
        result = train(recipe, [*options, *more], backend=be, callbacks=[Signal(), TaskScores()])
        return result.step, [row["step"] for row in read_metrics(result.run_dir) if "eval_ai2d_test" in row]

    assert trained("train.patience=1") == (1, [1])
    assert trained() == (2, [1]) and "ai2d_test is not asked at step 2" in capsys.readouterr().out
    assert trained() == trained() == (4, [1, 2, 4])
    evaluated = [row["step"] for row in read_metrics(tmp_path / "runs" / "tiny") if "eval_loss" in row]
    assert evaluated == [0, 1, 2, 3, 4]  # that of step 2 by the next start, and each once


def test_what_is_wrong_is_told_before_the_first_step(tmp_path: Path) -> None:
    recipe, be = tiny_run.write_recipe(tmp_path), duetvl.load_backend("torch_npu", "cpu")
    with pytest.raises(ConfigError, match=r"no task 'ai2d'; did you mean 'ai2d_test'"):
        duetvl.train(recipe, [*OPTIONS, "eval.tasks={ai2d: x.tsv}"], backend=be)
    with pytest.raises(DataError, match=r"x\.tsv: no such file"):
        duetvl.train(recipe, [*OPTIONS, "eval.tasks={ai2d_test: x.tsv}"], backend=be)
