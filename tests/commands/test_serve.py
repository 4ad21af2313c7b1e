"""What `duetvl serve` finds out before it reads a weight."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run

from duetvl.cli import main
from duetvl.commands.serve import served_names


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def taken() -> Iterator[int]:
    """A port that another process has."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "{taken}"], "cannot listen at --host '127.0.0.1' --port {taken}: Address already in use"),
        (["--port", "70000"], "--port 70000: a port is between"),
        (["--adapter", "mine"], "--adapter 'mine': expected NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "the name 'a' is given twice"),
        (["--adapter", "tiny=x"], "--adapter tiny=x: the model itself has this name"),
        (["--adapter", "other=nowhere"], "nowhere"),
        (["--max-requests", "0"], "limit requests is 0, it must be above 0"),
        (["--media-root", "nowhere"], "media root nowhere is not a directory"),
        (["--api-key-file", "nowhere"], "API keys: nowhere cannot be read"),
        (["--prepare-threads", "0"], "--prepare-threads 0: expected 1 or more"),
        (["--drain", "nan"], "--drain nan: expected 0 or more"),
        (["--max-pixels", "1"], "not a valid range"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    model: Path, taken: int, words: list[str], told: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(model.parent)
    assert main(["serve", str(model), *(word.format(taken=taken) for word in words)]) == 2
    error = capsys.readouterr().err
    assert told.format(taken=taken) in error and "\n" not in error.strip(), error


def test_names_that_requests_give(model: Path) -> None:
    assert served_names(None, str(model), {"cats": Path("x")}) == {"tiny": "", "cats": "cats"}
    assert served_names(None, "Qwen/Qwen2-VL-2B-Instruct", {}) == {"Qwen/Qwen2-VL-2B-Instruct": ""}
    assert list(served_names(["a", "b"], str(model), {})) == ["a", "b"]
