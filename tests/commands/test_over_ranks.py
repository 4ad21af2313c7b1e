"""Commands that answer over many ranks: the same answers, and one end for all, however it comes."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_run
from evaluation import miniatures
from frameworks import FRAMEWORKS, need

from duetvl.cli import main
from duetvl.commands.processes import environment_of
from duetvl.commands.session import dtype_of
from duetvl.core.backend import load_backend
from duetvl.core.errors import ConfigError

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and records of which one has no picture where it says."""
    directory = tmp_path_factory.mktemp("ranks")
    tiny_run.write_model(directory / "model", std=0.2, **SIZES)
    lines = tiny_run.write_data(directory, 3).read_text().splitlines()
    lost = lines[1].replace("green1.png", "lost.png")
    (directory / "data.jsonl").write_text("\n".join([*lines, lost]) + "\n")
    return directory


class Command:
    """`duetvl WORDS` in a process of its own, which starts ranks."""

    def __init__(self, here: Path, *words: str):
        self.logs = here / f"logs-{words[0]}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "duetvl", *words, "--device", "cpu", "--log-dir", str(self.logs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here,
            env={key: value for key, value in os.environ.items() if key != "DUETVL_BACKEND"},
        )  # fmt: skip

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answers(self) -> None:
        """Wait for the beginning of an answer; what came before is left out."""
        assert self.process.stdout is not None
        assert os.read(self.process.stdout.fileno(), 1), self.end()

    def told(self, words: str) -> str:
        """What it tells up to a line with these words; the answers so far are left out."""
        assert self.process.stderr is not None and self.process.stdout is not None
        lines = [""]
        while words not in lines[-1]:
            lines.append(self.process.stderr.readline())
            assert lines[-1], lines
        out = self.process.stdout.fileno()
        os.set_blocking(out, False)
        with suppress(BlockingIOError):
            while os.read(out, 1 << 16):
                pass
        os.set_blocking(out, True)
        return "".join(lines)

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in sorted(self.logs.glob("*/rank-*.pid"))]

    def end(self) -> tuple[int, str, str]:
        """Status and output, once all ranks have ended."""
        out, told = self.process.communicate(timeout=240)
        assert [pid for pid in self.pids() if Path(f"/proc/{pid}").exists()] == [], told
        return self.process.returncode, out, told

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=60)


@pytest.fixture(params=list(FRAMEWORKS))
def backend(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


@pytest.fixture
def start(here: Path) -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        command.close()


def only_on(backend: str, wanted: str, full: bool) -> None:
    """Each meets one backend in every run of the tests, and the other one with --full."""
    if backend != wanted and not full:
        pytest.skip("with --full")


def test_records_are_answered_as_by_one_process(
    backend: str, here: Path, start: list[Command], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that cannot be answered is no failure of a rank."""
    only_on(backend, "mindspore", full)
    words = ("model", "--input", "data.jsonl", "--max-new-tokens", "6", "--backend", backend)
    start.append(Command(here, "infer", *words, "-o", f"many-{backend}.jsonl", "--pp", "2"))
    monkeypatch.chdir(here)
    assert main(["infer", *words, "-o", f"one-{backend}.jsonl", "--device", "cpu"]) == 1
    status, _, told = start[0].end()
    assert status == 1 and "2 ranks, tp 1 x pp 2" in told, told
    assert "4 answers, " in told and "1 failed, see their error" in told and "launch: rank" not in told, told
    one, many = (answers_in(Path(f"{kind}-{backend}.jsonl")) for kind in ("one", "many"))
    assert many == one and len(one) == 4


def answers_in(file: Path) -> list[tuple[str | None, list[int] | None]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["text"], row.get("token_ids")) for row in rows]


def test_copies_over_ranks_answer_as_one_process_and_end_with_a_lost_rank(
    backend: str, here: Path, start: list[Command], full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two copies of two ranks: one rank is killed in the middle; what is missing then one process answers."""
    only_on(backend, "torch_npu", full)
    miniatures.ai2d(here)
    words = ("model", "--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "--min-pixels", "784", "--max-pixels", "3136",
             "--max-new-tokens", "60", "--cache-tokens", "4096", "--backend", backend)  # fmt: skip
    together = f"copies-{backend}"
    start.append(Command(here, "eval", *words, "-o", together, "--nproc", "4", "--tp", "2", "--max-sequences", "1"))
    answered = here / together / "answers.jsonl.part"
    while start[0].process.poll() is None and not (answered.exists() and answered.read_bytes().count(b"\n") > 11):
        time.sleep(0.02)
    (lost,) = (file for file in start[0].logs.glob("*/rank-00001.pid") if of_copy(file, 1))
    os.kill(int(lost.read_text()), signal.SIGKILL)
    status, _, told = start[0].end()
    assert status == 2 and len(told.splitlines()[-1]) < 400, told
    assert re.search(r"process 1 of 2 ended with status 1: rank 1 \(process \d+\) was killed", told), told
    monkeypatch.chdir(here)
    kept = len(answered.read_text().splitlines())
    for output in (together, "alone"):
        assert main(["eval", *words, "-o", output, "--device", "cpu"]) == 0
    alone, copies = (answers_in(Path(output, "answers.jsonl")) for output in ("alone", together))
    assert copies == alone and len(alone) == 48 and 12 <= kept < 48


def of_copy(file: Path, number: int) -> bool:
    """Whether a rank of this pid file runs the command for this copy."""
    words = json.loads((file.parent / "words.json").read_text())
    return words[words.index("--process") + 1] == str(number)


def test_a_conversation_survives_ctrl_c_and_not_the_loss_of_a_rank(
    backend: str, here: Path, start: list[Command], full: bool
) -> None:
    only_on(backend, "torch_npu", full)
    words = ("model", "--ignore-eos", "--max-new-tokens", "2000", "--nproc", "2", "--backend", backend)
    talk = Command(here, "chat", *words)
    start.append(talk)
    for _ in range(3):
        talk.type("hello")
        talk.answers()
        talk.process.send_signal(signal.SIGINT)
        talk.told("interrupted: this message is not part")
    for line in ("/params max_new_tokens=3", "hello", "/params top_k=2"):
        talk.type(line)
    assert "max_new_tokens 3" in talk.told("top_k 2")  # now it waits for the next line
    os.kill(talk.pids()[1], signal.SIGKILL)
    status, _, told = talk.end()
    assert status == 1 and re.search(r"launch: rank 1 \(process \d+\) was killed", told), told
    assert "Traceback" not in told


def test_devices_of_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    second = environment_of(1, 2, 2)
    assert (second["CUDA_VISIBLE_DEVICES"], second["ASCEND_RT_VISIBLE_DEVICES"]) == ("2,3", "6,7")
    whole = environment_of(3, 4, 1)
    assert (whole["LOCAL_RANK"], whole["ASCEND_RT_VISIBLE_DEVICES"]) == ("3", "4,5,6,7")


def test_copies_that_cannot_be_are_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--task", "ai2d_test", "--data", "AI2D_TEST.tsv", "-o", "refused")
    for words, told in (
        (
            ["--nproc", "6", "--tp", "4"],
            "--nproc 6 --tp 4: each copy of the model takes tp x pp = 4 processes; --nproc 4 or",
        ),
        (["--nproc", "16", "--tp", "8"], "--tp 8: the model has 4 query heads"),
    ):
        assert main(["eval", str(here / "model"), *data, *words]) == 2
        error = capsys.readouterr().err
        assert told in error and len(error.splitlines()) == 1, error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nproc", "8"], "--tp 8: the model has 4 query heads, of which each rank needs one at least; possible are"),
        (["--nproc", "4", "--tp", "3"], "possible are --tp 4 --pp 1, --tp 2 --pp 2, --tp 1 --pp 4"),
        (["--pp", "3"], "--pp 3: the language model has 2 layers, of which each stage needs one at least; possible"),
        (["--tp", "0"], "--tp 0: ranks are counted from 1"),
    ],
)
def test_degrees_that_cannot_be_are_refused_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main(["infer", str(here / "model"), "--prompt", "x", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1, error


def test_half_precision_where_a_device_lacks_one() -> None:
    """An Atlas 300I DUO has float16 and no bfloat16."""
    cpu = load_backend("mindspore", device="cpu").device
    duo = copy.copy(cpu)
    duo.product = "Ascend310P3"
    for stored, wanted in (("bfloat16", "float16"), ("float16", "float16"), ("float32", "float32"), (None, "float32")):
        assert dtype_of("auto", stored, duo) == dtype_of(None, stored, duo) == wanted
    assert dtype_of(None, "bfloat16", cpu) == "bfloat16"
    assert dtype_of("float16", "bfloat16", cpu) == "float16"
    with pytest.raises(
        ConfigError, match="--dtype bfloat16: the device cpu does not support it; use float16 or float32"
    ):
        dtype_of("bfloat16", "bfloat16", duo)
    for product, has in (("Ascend910B3", True), ("Ascend910B", False), ("Ascend910PremiumA", False)):
        duo.product = product
        assert duo.supports("bfloat16") is has and duo.supports("float16")
