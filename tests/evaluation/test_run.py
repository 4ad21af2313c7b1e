"""duetvl eval from the command line, on both backends: one process, several, a kill, and what makes no sense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import miniatures
import pytest
import tiny_run

import duetvl
from duetvl.cli import main
from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError
from duetvl.data.conversation import ImagePart
from duetvl.data.media.images import Resize
from duetvl.evaluation.answers import Asked
from duetvl.evaluation.profiles import find_profile
from duetvl.evaluation.run import engine_answers
from duetvl.evaluation.tasks.registry import find_task
from duetvl.inference.request import Request
from duetvl.storage.answers_file import alone

SMALL = [
    "--min-pixels",
    "784",
    "--max-pixels",
    "3136",
    "--max-new-tokens",
    "4",
    "--device",
    "cpu",
    "--cache-tokens",
    "8192",
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of either family, and a benchmark of each kind."""
    directory = tmp_path_factory.mktemp("eval")
    tiny_run.write_model(directory / "model", std=0.2)
    tiny_run.write_model(directory / "older", std=0.2, family="qwen2_vl")
    miniatures.ai2d(directory)
    for make in (miniatures.chartqa, miniatures.docvqa, miniatures.mmmu, miniatures.textvqa, miniatures.videobench):
        (directory / make.__name__).mkdir()
        make(directory / make.__name__)
    return directory


@pytest.fixture
def run(be: Backend, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`duetvl eval WORDS` beside the data, as status, what it printed, and what it told."""
    monkeypatch.chdir(here)
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)

    def evaluate(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["eval", *words, "--backend", be.name])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return evaluate


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(run)]


def test_one_process_and_several_killed_and_started_again(run: Run, be: Backend, here: Path, tmp_path: Path) -> None:
    words = ["model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", *SMALL]
    one, many = tmp_path / "one", tmp_path / "many"
    status, out, told = run(*words, "-o", str(one))
    assert status == 0 and "ai2d_test, profile vlmevalkit: " in out and "question 48/48" in told
    answers = rows(one)
    assert [row["index"] for row in answers] == list(range(48))
    _same_as_the_engine(be, here, answers)

    # Two processes are killed in the middle; three go on, or one, and ask what the two have not.
    command = [sys.executable, "-m", "duetvl", "eval", *words, "--backend", be.name, "-o", str(many)]
    command += ["--nproc", "2", "--max-sequences", "1"]
    started = subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    kept = 0
    while started.poll() is None and kept < 3:
        time.sleep(0.02)
        kept = _lines(many)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert not (many / "answers.jsonl").exists()
    deadline = time.monotonic() + 60
    while list(many.glob(".answers.jsonl.?.lock")) and not _free(many) and time.monotonic() < deadline:
        time.sleep(0.05)  # its processes notice that it has gone
    kept = _lines(many)
    assert 3 <= kept <= 48
    with open(many / "answers.jsonl.part", "ab") as file:
        file.write(b'{"text": "half')
    if be.name == "mindspore":  # which takes long to start
        status, _, told = run(*words, "-o", str(many))
    else:
        status, _, told = run(*words, "-o", str(many), "--nproc", "3")
        assert len(list((many / "logs").iterdir())) == 3
    assert status == 0 and f"{kept} of 48 questions are answered already" in told, told
    assert untimed(many) == untimed(one)
    assert not list(many.glob("*.part*"))
    scores = [json.loads((directory / "scores.json").read_text()) for directory in (one, many)]
    for name in ("task", "profile", "score", "low", "high", "n", "unparsed", "truncated", "groups", "settings"):
        assert scores[0][name] == scores[1][name]
    assert scores[0]["n"] == 48 and set(scores[0]["groups"]) == {"category"}

    # Nothing is left to ask: no weight is read, and the directory takes no other run.
    status, _, told = run(*words, "-o", str(many))
    assert status == 0 and "48 of 48 questions are answered already" in told and "float32" not in told
    for other in (["--profile", "qwen2_vl"], ["--max-pixels", "6272"], ["--temperature", "1"], ["--dtype", "float32"]):
        status, _, told = run(*words, *other, "-o", str(many))
        assert status == 2 and "give each run a directory of its own" in told, other
    status, _, told = run("older", *words[1:], "--profile", "vlmevalkit", "-o", str(many))
    assert status == 2 and "holds a run with weights" in told
    assert untimed(many) == untimed(one)


def _lines(run: Path) -> int:
    return sum(part.read_bytes().count(b"\n") for part in run.glob("answers.jsonl.part*"))


def _free(run: Path) -> bool:
    """Whether no process writes there any more."""
    try:
        for number in range(2):
            with alone(run / f"answers.jsonl.{number}"):
                pass
    except ConfigError:
        return False
    return True


def _same_as_the_engine(be: Backend, here: Path, answers: list[dict[str, Any]]) -> None:
    """What is written is what the model answers to the profile's words and the row's own picture."""
    model = duetvl.load_model(here / "model", backend=be)
    questions = find_task("ai2d_test").questions(here / "AI2D_TEST.tsv", find_profile("vlmevalkit"))
    for number in (0, 13, 47):
        question = questions[number]
        picture, text = question.conversation.turns[0].parts
        assert isinstance(picture, ImagePart) and isinstance(text, str)
        content = [
            {"type": "image", "image": picture.source, "min_pixels": 784, "max_pixels": 3136},
            {"type": "text", "text": text},
        ]
        expected = model.generate([{"role": "user", "content": content}], max_new_tokens=4)
        assert (answers[number]["id"], answers[number]["text"]) == (question.id, expected.text)


def test_every_benchmark_and_more_questions_later(run: Run, be: Backend, here: Path, tmp_path: Path) -> None:
    data = {
        "chartqa_test": "chartqa/ChartQA_TEST.tsv", "docvqa_val": "docvqa/DocVQA_VAL.tsv",
        "mmmu_dev_val": "mmmu/MMMU_DEV_VAL.tsv", "textvqa_val": "textvqa", "videobench": "videobench",
    }  # fmt: skip
    for task, path in data.items():
        words = ["older", "--task", task, "--data", path, "-o", str(tmp_path / task), *SMALL, "--max-frames", "2"]
        status, out, told = run(*words, "--limit", "5")
        assert status == 0, told
        assert f"{task}, profile qwen2_vl: " in out and "note: these are the first 5 of" in out
        scores = json.loads((tmp_path / task / "scores.json").read_text())
        assert (scores["task"], scores["n"], scores["profile"]) == (task, 5, "qwen2_vl")
        assert 0 <= scores["low"] <= scores["score"] <= scores["high"] <= 100
        assert 0 <= scores["unparsed"] <= 5 and 0 <= scores["truncated"] <= 5
    before = rows(tmp_path / "chartqa_test")
    words = ["older", "--task", "chartqa_test", "--data", data["chartqa_test"], "-o", str(tmp_path / "chartqa_test")]
    status, _, told = run(*words, *SMALL, "--max-frames", "2", "--limit", "7")
    assert status == 0 and "5 of 7 questions are answered already" in told
    assert rows(tmp_path / "chartqa_test")[:5] == before and len(rows(tmp_path / "chartqa_test")) == 7
    status, out, _ = run(*words, *SMALL, "--max-frames", "2", "--limit", "3")  # what is answered stays
    assert status == 0 and "of 3 questions" in out and len(rows(tmp_path / "chartqa_test")) == 7


def test_scored_again_without_the_model(run: Run, here: Path, tmp_path: Path) -> None:
    words = ["model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", *SMALL, "--limit", "40"]
    status, _, told = run(*words, "-o", str(tmp_path / "a"))
    assert status == 0, told
    first = json.loads((tmp_path / "a" / "scores.json").read_text())
    questions = find_task("ai2d_test").questions(here / "AI2D_TEST.tsv", find_profile("vlmevalkit"))
    right = [
        {**row, "text": miniatures.truth_of(questions[row["index"]]) if row["index"] % 4 else row["text"]}
        for row in rows(tmp_path / "a")
    ]
    better = tmp_path / "b"
    better.mkdir()
    (better / "run.json").write_bytes((tmp_path / "a" / "run.json").read_bytes())
    (better / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    status, out, _ = run("--rescore", "-o", str(better))
    scores = json.loads((better / "scores.json").read_text())
    assert status == 0 and scores["score"] >= 75 > first["score"] and f"{scores['score']:.1f}%" in out
    assert scores["settings"] == first["settings"]
    status, out, _ = run("--compare", str(tmp_path / "a"), str(better), "-o", str(tmp_path / "both"))
    assert status == 0 and "B is better: the interval is above 0" in out
    assert (tmp_path / "both" / "report.html").exists() and (tmp_path / "both" / "comparison.json").exists()


def test_questions_about_one_picture_share_its_features(
    be: Backend, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower sees each of twelve pictures once, whatever is asked about it."""
    model, task = duetvl.load_model(here / "model", backend=be), find_task("ai2d_test")
    profile = replace(find_profile("vlmevalkit"), pixels=Resize(784, 3136))
    asked = Asked(task, profile, task.questions(here / "AI2D_TEST.tsv", profile), 48)
    pictures: list[int] = []
    plain = type(model).features
    monkeypatch.setattr(
        type(model), "features", lambda self, batch: pictures.append(len(batch.grids)) or plain(self, batch)
    )
    engine = duetvl.Engine(model, tokenizer=model.processor.tokenizer, cache_tokens=16384)
    request = partial(Request, max_new_tokens=2)
    answered = list(engine_answers(engine, model.processor, asked, range(48), request))
    assert sorted(number for number, _ in answered) == list(range(48))
    assert 8 <= sum(pictures) <= 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--task", "ai2d_tset", "--data", "AI2D_TEST.tsv", "-o", "x"], "did you mean 'ai2d_test'?"),
        (["model", "--task", "ai2d_test", "-o", "x"], "--data is missing: duetvl eval MODEL --task NAME --data PATH"),
        (["model", "--data", "AI2D_TEST.tsv", "-o", "x"], "--task is missing"),
        (["model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv"], "-o DIR is missing"),
        (["--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x"], "no model is given"),
        (["model", "--task", "ai2d_test", "--data", "gone.tsv", "-o", "x"], "gone.tsv"),
        (["model", "--task", "ai2d_test", "--data", "chartqa", "-o", "x"], "chartqa/AI2D_TEST.tsv: no such file"),
        (["model", "--task", "chartqa_test", "--data", "AI2D_TEST.tsv", "-o", "x", "--profile", "mindy"], "'mindie'?"),
        (["model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x", "--limit", "0"], "--limit 0: expected"),
        (["model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x", "--nproc", "0"], "--nproc 0: ranks"),
        (["gone", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x"], "gone: no such directory"),
        (["--rescore", "-o", "model"], "model: is not a directory of duetvl eval: it has no run.json"),
        (["--compare", "model", "older"], "model: is not a directory of duetvl eval"),
        (["m", "--server", "http://127.0.0.1:9/v1", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x"],
         "--server http://127.0.0.1:9/v1: gives no list of models"),
        (["m", "--server", "127.0.0.1", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "x"],
         "expected http://HOST:PORT/v1"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run: Run, here: Path, words: list[str], message: str) -> None:
    status, out, told = run(*words)
    last = told.splitlines()[-1]
    assert (status, out) == (2, "") and last.startswith("error: ") and message in last
    assert not (here / "x").exists()
