"""duetvl chat: turns follow each other, media belong to the next message, what fails leaves the conversation alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run

import duetvl
from duetvl.cli import main
from duetvl.core.backend import Backend


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat")
    tiny_run.write_model(directory / "model", std=0.2)
    tiny_run.write_data(directory)
    return directory


@pytest.fixture
def talk(be: Backend, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Lines typed, to what was answered and what was told."""
    monkeypatch.chdir(here)

    def chat(*lines: str, options: tuple[str, ...] = ("--max-new-tokens", "6")) -> tuple[str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", "model", *options, "--backend", be.name, "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err.splitlines()

    return chat


def picture(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_turns_with_pictures(talk: Any, be: Backend, here: Path) -> None:
    model = duetvl.load_model(here / "model", backend=be)
    turns: list[dict[str, Any]] = []
    expected = []
    for content in ([picture("blue2.png"), picture("green1.png"), text("first")], [text("second")], [text("third")]):
        turns.append({"role": "user", "content": content})
        answer = model.generate(turns, max_new_tokens=6).text
        assert answer is not None
        turns.append({"role": "assistant", "content": answer})
        expected.append(answer)
    out, told = talk("/image blue2.png", "/image green1.png", "first", "", "second", "third", "/exit", "not asked")
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert told[-1] == "max_new_tokens 6, greedy"


def test_a_reset_and_what_fails(talk: Any, be: Backend, here: Path) -> None:
    model = duetvl.load_model(here / "model", backend=be)
    alone = model.generate([{"role": "user", "content": "second"}], max_new_tokens=6).text
    out, told = talk(
        "first", "/image gone.png", "/image", "/nothing", "/image blue2.png", "/reset", "/params top_p=7",
        "/params colour=1", "second",
    )  # fmt: skip
    assert out.endswith(f"\n{alone}\n")
    assert "error: gone.png: no such file" in told
    assert "error: /image takes the path of one file, found nothing" in told
    assert "error: top_p is 7.0, expected a number above 0 and at most 1" in told
    assert any(line.startswith("error: /nothing is not a command") for line in told)
    assert any(line.startswith("error: /params: 'colour=1' is not of the form NAME=VALUE") for line in told)


def test_params_change_how_answers_are_made(talk: Any) -> None:
    plain, _ = talk("hello")
    out, told = talk("/params max_new_tokens=3 temperature=2 seed=5 top_k=50", "hello", "/params")
    assert told[-1] == told[-2] == "max_new_tokens 3, temperature 2.0, top_k 50, seed 5"
    assert out != plain


def test_the_command_in_a_process_of_its_own(here: Path, be: Backend) -> None:
    """The end of the input is the end."""
    command = [sys.executable, "-m", "duetvl", "chat", "model", "--backend", be.name, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "4"], cwd=here, input="hello\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n") and len(done.stdout) > 1
    assert "Traceback" not in done.stderr


def test_an_interrupted_answer_is_no_part_of_the_conversation(
    be: Backend, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from duetvl.commands.chat import Chat
    from duetvl.commands.session import Way
    from duetvl.inference.engine import Engine
    from duetvl.inference.sampling import Sampling

    model = duetvl.load_model(here / "model", backend=be)
    engine = Engine(model, tokenizer=model.processor.tokenizer, cache_tokens=512)
    said: list[str] = []
    told: list[str] = []
    way = Way(Sampling(), max_new_tokens=5)
    chat = Chat(engine, model.processor, way, out=said.append, say=told.append)
    chat.line("first")
    first = "".join(said)
    plain, passes = engine.runner.run, []

    def interrupted(plan: Any) -> Any:
        passes.append(plan)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(plan)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    chat.line("interrupted")
    assert (
        not engine.busy and len(passes) == 3 and told == ["interrupted: this message is not part of the conversation"]
    )
    said.clear()
    chat.line("second")
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": first.removesuffix("\n")}]
    expected = model.generate([*turns, {"role": "user", "content": "second"}], max_new_tokens=5).text
    assert "".join(said) == f"{expected}\n"


def test_a_quote_that_is_not_closed(talk: Any) -> None:
    out, told = talk("/image it's.png", '/params "x', "still here")
    assert told[-2:] == [
        r"error: it's.png: No closing quotation; write \' or \" for a literal quote",
        r'error: "x: No closing quotation; write \' or \" for a literal quote',
    ]
    assert out.strip()
