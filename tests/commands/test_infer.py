"""duetvl infer on the command line: the answers are the model's, nothing is asked twice, one failure is one failure."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run

import duetvl
from duetvl.cli import main
from duetvl.convert.commands import hf_to_mm
from duetvl.convert.layouts import Layout
from duetvl.convert.plans import Options
from duetvl.core.backend import Backend
from duetvl.inference.engine import Engine
from duetvl.models.qwen_vl.config import load_config


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and twelve records, of which a third have no picture and are alike."""
    directory = tmp_path_factory.mktemp("infer")
    tiny_run.write_model(directory / "model", std=0.2)
    tiny_run.write_data(directory)
    return directory


@pytest.fixture
def run(be: Backend, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`duetvl infer WORDS` beside the records, as status, what it printed, and what it told."""
    monkeypatch.chdir(here)
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)

    def infer(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["infer", *words, "--backend", be.name, "--device", "cpu"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return infer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def messages(*parts: str) -> list[dict[str, Any]]:
    """A question; a name of a picture stands for it."""
    content = [
        {"type": "image", "image": part} if part.endswith(".png") else {"type": "text", "text": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


# -- what is answered -------------------------------------------------------------------------------------------------


def test_a_prompt_with_pictures_in_order(run: Any, be: Backend, here: Path) -> None:
    model = duetvl.load_model(here / "model", backend=be)
    for media in (["green1.png", "blue2.png"], ["blue2.png", "green1.png"], []):
        words = [word for name in media for word in ("--image", name)]
        status, out, told = run("model", "--prompt", "which?", *words, "--max-new-tokens", "9")
        expected = model.generate(messages(*media, "which?"), max_new_tokens=9)
        assert (status, out) == (0, f"{expected.text}\n")
        assert told == f"model: float32 on {be.name}, cpu\n"


def test_one_rule_of_defaults(run: Any, be: Backend, here: Path, tmp_path: Path) -> None:
    """generation_config.json says it to the command and to an engine, and to `generate` where it is asked to."""
    shutil.copytree(here / "model", tmp_path / "model")
    plain = duetvl.load_model(here / "model", backend=be).generate(messages("tell"), max_new_tokens=9, stop=())
    penalty = duetvl.Sampling(repetition_penalty=1.7)
    model = duetvl.load_model(tmp_path / "model", backend=be)
    whole = model.generate(messages("tell"), max_new_tokens=9, stop=(), sampling=penalty).token_ids
    assert whole != plain.token_ids
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "repetition_penalty": 1.7, "eos_token_id": [whole[4]]})
    )
    model = duetvl.load_model(tmp_path / "model", backend=be)
    assert model.generate(messages("tell"), max_new_tokens=9, stop=()).token_ids == plain.token_ids  # greedy
    expected = model.generate(messages("tell"), max_new_tokens=9, sampling=model.defaults.sampling)
    assert expected.token_ids == whole[: whole.index(whole[4]) + 1]
    status, out, _ = run(str(tmp_path / "model"), "--prompt", "tell", "--max-new-tokens", "9")
    prompt = model.processor(messages("tell"), add_generation_prompt=True)
    engine = duetvl.Engine(model, cache_tokens=512)
    (own,) = engine.generate([duetvl.Request(prompt, max_new_tokens=9)])
    assert own.token_ids == expected.token_ids and own.text is not None
    assert (status, out) == (0, f"{own.text}\n")
    told = duetvl.Request(prompt, max_new_tokens=9, sampling=duetvl.Sampling(), stop_ids=frozenset())
    assert engine.generate([told])[0].token_ids == plain.token_ids


def test_more_new_tokens_than_the_context_has(run: Any, be: Backend, tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path / "model", std=0.2, max_position_embeddings=200)
    model = duetvl.load_model(tmp_path / "model", backend=be)
    assert model.context == 200
    prompt = model.processor(messages("tell"), add_generation_prompt=True)
    request = duetvl.Request(prompt, max_new_tokens=10**15, stop_ids=frozenset())
    (expected,) = duetvl.Engine(model, cache_tokens=256).generate([request])
    assert expected.finish_reason == "length" and len(prompt) + len(expected.token_ids) == model.context
    words = ("--max-new-tokens", str(10**15), "--ignore-eos")
    assert run(str(tmp_path / "model"), "--prompt", "tell", *words)[:2] == (0, f"{expected.text}\n")


def test_records_are_answered_in_order_without_their_last_answers(
    run: Any, be: Backend, here: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    words = ["model", "--input", "data.jsonl", "-o", str(out), "--max-new-tokens", "7", "--logprobs", "1"]
    status, _, told = run(*words)
    assert status == 0 and f"{out}: 12 answers, " in told
    found = rows(out)
    assert [row["id"] for row in found] == [f"data.jsonl:{number}" for number in range(1, 13)]
    model = duetvl.load_model(here / "model", backend=be)
    for row, line in zip(found, (here / "data.jsonl").read_text().splitlines(), strict=True):
        record = json.loads(line)
        question = record["messages"][0]["content"].removeprefix("<image>")
        expected = model.generate(messages(*record["images"], question), max_new_tokens=7)
        assert (row["text"], row["token_ids"]) == (expected.text, expected.token_ids)
        assert row["completion_tokens"] == len(expected.token_ids) == len(row["logprobs"])
        assert row["prompt_tokens"] > 20 and row["finish_reason"] in ("stop", "length")
        assert 0 <= row["seconds"]["queue"] <= row["seconds"]["first_token"] <= row["seconds"]["total"]
        greedy = row["logprobs"][0]
        assert greedy["id"] == row["token_ids"][0] and greedy["top_logprobs"][0]["logprob"] == greedy["logprob"] < 0
    assert not out.with_name("out.jsonl.part").exists()


def test_every_picture_of_a_directory(run: Any, be: Backend, here: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("blue2.png", "green1.png"):
        shutil.copy(here / name, tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    out = tmp_path / "out.jsonl"
    given = ["--input", str(tmp_path / "photos"), "--prompt", "which?", "--system", "Be brief."]
    assert run("model", *given, "-o", str(out), "--max-new-tokens", "5")[0] == 0
    model = duetvl.load_model(here / "model", backend=be)
    for row, name in zip(rows(out), ("blue2.png", "green1.png"), strict=True):
        asked = [{"role": "system", "content": "Be brief."}, *messages(str(here / name), "which?")]
        assert (row["id"], row["text"]) == (name, model.generate(asked, max_new_tokens=5).text)


def test_how_tokens_are_chosen(run: Any, be: Backend, here: Path, tmp_path: Path) -> None:
    """The model's generation_config.json, replaced by options; what was taken over is said."""
    model = shutil.copytree(here / "model", tmp_path / "model")
    values = {"do_sample": True, "temperature": 5.0, "top_k": 0, "eos_token_id": [300], "num_beams": 4}
    (model / "generation_config.json").write_text(json.dumps(values))
    asked = [str(model), "--prompt", "which?", "--max-new-tokens", "12"]
    _, first, told = run(*asked)
    assert "generation_config.json: sampling: temperature 5.0; not done: num_beams 4\n" in told
    found = duetvl.load_model(model, backend=be).defaults
    assert (found.sampling.temperature, found.stop_ids) == (5.0, {300})
    assert run(*asked)[1] == first  # the same seed, the same answer
    assert run(*asked, "--seed", "1")[1] != first
    greedy = run("model", "--prompt", "which?", "--max-new-tokens", "12", "--ignore-eos")[1]
    assert run(*asked, "--temperature", "0", "--ignore-eos")[1] == greedy != first
    stop = greedy[3]
    assert run(*asked, "--temperature", "0", "--ignore-eos", "--stop", stop)[1] == f"{greedy[: greedy.index(stop)]}\n"


def test_whatever_holds_the_model(run: Any, here: Path, tmp_path: Path) -> None:
    expected = run("model", "--prompt", "which?", "--max-new-tokens", "6")[1]
    hf_to_mm(here / "model", tmp_path / "mm", Layout.one_stage(load_config(here / "model"), 1), Options())
    words = ["--prompt", "which?", "--max-new-tokens", "6"]
    assert run(str(tmp_path / "mm"), "--base", "model", *words)[1] == expected
    status, out, told = run(str(tmp_path / "mm"), *words)
    assert (status, out) == (2, "") and "is a MindSpeed-MM checkpoint, which has neither" in told
    file = tmp_path / "inference.json"
    generation = {
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.001,
        "max_new_tokens": 6,
        "num_beams": 1,
    }
    file.write_text(json.dumps({
        "pipeline_class": "Qwen2VlPipeline", "prompts": "which?", "dtype": "fp32", "device": "npu",
        "tokenizer": {"from_pretrained": str(here / "model")}, "generation_config": generation,
    }))  # fmt: skip
    for model in ([str(tmp_path / "mm")], []):
        status, out, told = run(*model, "--from-mindspeed", str(file))
        assert (status, out) == (0, expected)
        assert "generation_config.temperature" in told and "--temperature 0.01" in told


# -- nothing is asked twice -------------------------------------------------------------------------------------------


def many(here: Path, path: Path, count: int) -> Path:
    """Records that are all different."""
    records = [{"messages": [{"role": "user", "content": f"question {number}"}]} for number in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_killed_run_goes_on(run: Any, be: Backend, here: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data, out, whole = many(here, tmp_path / "many.jsonl", 40), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    words = ["model", "--input", str(data), "--max-new-tokens", "60", "--ignore-eos", "--max-sequences", "2"]
    assert run(*words, "-o", str(whole))[0] == 0
    part = tmp_path / "out.jsonl.part"
    command = [sys.executable, "-m", "duetvl", "infer", *words, "-o", str(out), "--backend", be.name, "--device", "cpu"]
    started = subprocess.Popen(command, cwd=here, stderr=subprocess.DEVNULL)
    try:
        while started.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
    finally:
        os.kill(started.pid, signal.SIGKILL)
        started.wait()
    assert not out.exists()
    kept = part.read_bytes().count(b"\n")
    assert 3 <= kept < 40
    with open(part, "ab") as handle:  # a line that the kill has cut off
        handle.write(b'{"text": "half')
    asked: list[str] = []
    plain = Engine.submit
    monkeypatch.setattr(
        Engine, "submit", lambda self, request, *more: asked.append(request.id) or plain(self, request, *more)
    )
    status, _, told = run(*words, "-o", str(out))
    assert status == 0 and f"{kept} of 40 answers already exist" in told
    assert len(asked) == len(set(asked)) == 40 - kept
    same = ("id", "text", "token_ids", "key")
    assert [[row[name] for name in same] for row in rows(out)] == [[row[name] for name in same] for row in rows(whole)]
    assert run(*words, "-o", str(out))[0] == 0
    assert len(asked) == 40 - kept
    more = many(here, data, 42)
    assert run("model", "--input", str(more), *words[3:], "-o", str(out))[0] == 0
    assert len(asked) == 42 - kept and len(rows(out)) == 42


def test_a_full_disk(run: Any, be: Backend, here: Path, tmp_path: Path) -> None:
    """Its error names the file; what was written before is not asked again."""
    data, out = many(here, tmp_path / "many.jsonl", 12), tmp_path / "out.jsonl"
    words = ["model", "--input", str(data), "-o", str(out), "--max-new-tokens", "30", "--ignore-eos"]
    command = [sys.executable, "-m", "duetvl", "infer", *words, "--backend", be.name, "--device", "cpu"]
    limited = f"ulimit -f 2; exec {shlex.join(command)}"  # 2 KiB
    ended = subprocess.run(["bash", "-c", limited], cwd=here, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1] == f"error: {out}.part: File too large"
    status, _, told = run(*words)
    kept = int(re.findall(r"(\d+) of 12 answers already exist", told)[0])
    assert status == 0 and 0 < kept < 12
    assert [row["id"] for row in rows(out)] == [f"many.jsonl:{number}" for number in range(1, 13)]


def test_unfinished_answers_of_another_kind_are_kept(run: Any, here: Path, tmp_path: Path) -> None:
    data, out, part = many(here, tmp_path / "two.jsonl", 2), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    words = ["model", "--input", str(data), "-o", str(out), "--max-new-tokens", "3"]
    assert run(*words)[0] == 0
    out.rename(part)
    before = part.read_text()
    status, _, told = run(*words, "--temperature", "1")
    assert status == 2 and "out.jsonl.part beside it holds 2 answers to other questions, or made in another" in told
    assert part.read_text() == before
    status, _, told = run(*words)
    assert status == 0 and "2 of 2 answers already exist" in told and not part.exists()


def test_answers_of_another_kind_are_not_written_over(run: Any, here: Path, tmp_path: Path) -> None:
    data, out = many(here, tmp_path / "two.jsonl", 2), tmp_path / "out.jsonl"
    words = ["model", "--input", str(data), "-o", str(out), "--max-new-tokens", "3"]
    assert run(*words)[0] == 0
    before = out.read_text()
    status, _, told = run(*words, "--temperature", "1")
    assert status == 2 and "2 of its lines are answers to other questions, or made in another way" in told
    out.write_text("my own notes\n")
    status, _, told = run(*words)
    assert status == 2 and "out.jsonl:1: exists already, and is not an answer of duetvl infer" in told
    assert out.read_text() == "my own notes\n"
    out.write_text(before)
    assert run(*words)[0] == 0 and out.read_text() == before


def test_one_that_fails_is_named_and_asked_again(run: Any, here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    records = [
        {"messages": messages("one")},
        {"messages": messages("gone.png", "two")},
        {"messages": messages("three")},
    ]
    data = tmp_path / "three.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records) + "{broken\n")
    words = ["model", "--input", str(data), "-o", str(out), "--max-new-tokens", "3"]
    status, _, told = run(*words)
    assert status == 1 and "2 failed, see their error" in told
    found = rows(out)
    assert [row["finish_reason"] == "error" for row in found] == [False, True, False, True]
    assert "three.jsonl:2: " in found[1]["error"] and "gone.png: no such file" in found[1]["error"]
    assert "three.jsonl:4" in found[3]["error"]
    shutil.copy(here / "blue2.png", tmp_path / "gone.png")
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    status, _, told = run(*words)
    assert status == 0 and "2 of 3 answers already exist" in told
    assert all(row["text"] for row in rows(out))


# -- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model"], "there is no question: give --prompt TEXT, or --input"),
        ([], "no model is given: duetvl infer MODEL --prompt TEXT"),
        (["model", "--prompt", "x", "--top-p", "2"], "top_p is 2.0, expected a number above 0 and at most 1"),
        (["model", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["model", "--prompt", "x", "--stop", ""], "stop: '' is not a text of 1 to 256 characters"),
        (["model", "--prompt", "x", "--logprobs", "3"], "-o OUT.jsonl is missing"),
        (["model", "--prompt", "x", "--logprobs", "99"], "--logprobs is 99, expected a whole number from 0 to 20"),
        (["model", "--input", "data.jsonl"], "-o OUT.jsonl is missing"),
        (["model", "--input", "data.jsonl", "--image", "blue2.png"], "--image and --video do not go with --input"),
        (["model", "--input", "data.jsonl", "--prompt", "x"], "data.jsonl is none: leave out --prompt"),
        (["model", "--input", "model", "--prompt", "x"], "a directory without pictures and videos"),
        (["model", "--prompt", "x", "--image", "gone.png"], "gone.png: no such file"),
        (["model", "--prompt", "x", "--image", "data.jsonl"], "data.jsonl"),
        (
            ["model", "--prompt", "x", "--min-pixels", "99999999"],
            "not a valid range; give --min-pixels and --max-pixels",
        ),
        (["model", "--prompt", "x", "--fps", "0"], "--fps 0.0"),
        (["model", "--prompt", "x", "--max-pixels", "0"], "not a valid range; give --min-pixels and --max-pixels"),
        (["model", "--prompt", "x", "--stop-token", "99999"], "--stop-token 99999: is not one of the model's"),
        (["model", "--prompt", "x", "--cache-tokens", "0"], "cache_tokens is 0, it must be at least 1"),
        (["model", "--prompt", "x", "--media-tokens", "0"], "media_tokens is 0, it must be at least 1"),
        (["none", "--prompt", "x"], "none: no such directory"),
        (["model", "--prompt", "x", "--choice", "a", "--regex", "b"], "--regex and --choice: an answer can follow one"),
        (["model", "--prompt", "x", "--cache-tokens", "1", "--max-new-tokens", "999"], "do not fit into the cache"),
        (["--from-mindspeed", "data.jsonl"], "data.jsonl: cannot be read as JSON"),
    ],
)
def test_mistakes_are_one_line(run: Any, words: list[str], message: str) -> None:
    status, out, told = run(*words)
    last = told.splitlines()[-1]
    assert (status, out) == (2, "")
    assert last.startswith("error: ") and message in last


def test_two_runs_into_one_file(run: Any, here: Path, tmp_path: Path) -> None:
    from duetvl.storage.answers_file import alone

    with alone(tmp_path / "out.jsonl"):
        status, _, told = run("model", "--input", "data.jsonl", "-o", str(tmp_path / "out.jsonl"))
    assert status == 2 and "another process is writing it" in told
