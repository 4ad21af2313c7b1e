"""One target and several processes, or one that is killed: it is whole, and what the user put there stays."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from duetvl.convert.cli import main
from tests.convert.tiny import mm_files, tiny_config, write_hf

LINE = (
    "Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir out --cfg.hf_config.hf_dir hf --cfg.parallel_config.vit_pp_layers [[4]]"
)
ONE = f"{LINE} --cfg.parallel_config.llm_pp_layers [[4]]"
OVER = f"{ONE} --cfg.overwrite --cfg.parallel_config.tp_size 2"
KILLED_AFTER = """
import os, signal, sys
from duetvl.convert import cli
rename = os.rename
def rename_and_die(source, target):
    rename(source, target)
    if str(target).endswith({ending!r}):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename_and_die
cli.main(sys.argv[1:])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_hf(Path("hf"), tiny_config())
    return tmp_path


def start(line: str, code: str | None = None) -> subprocess.Popen[str]:
    program = ["-c", code] if code else ["-m", "duetvl.convert.cli"]
    words = [sys.executable, *program, *shlex.split(line)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_at_once(here: Path) -> None:
    """One writes; the others say that it does, or that it has."""
    running = [start(ONE) for _ in range(3)]
    ended = [(process.communicate()[1], process.returncode) for process in running]
    assert sorted(code for _, code in ended) == [0, 2, 2]
    refusals = [said for said, code in ended if code]
    assert all("another process is writing it" in said or "exists already" in said for said in refusals)
    assert all(said.count("\n") == 1 for said in refusals)
    assert main(["verify", "hf", "out"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("ending", [".replaced", "/out"])
def test_killed_between_the_renames(here: Path, ending: str) -> None:
    """Before the new one has its name the old one comes back, after it the rest of the old one does."""
    assert main(shlex.split(ONE)) == 0
    (here / "out" / "notes.txt").write_text("the user's")
    (here / "out" / "iter_0000007").mkdir()
    assert start(OVER, KILLED_AFTER.format(ending=ending)).wait() == -signal.SIGKILL
    assert main(shlex.split(ONE)) == 2, "it exists"
    assert len(mm_files(here / "out")) == (1 if ending == ".replaced" else 2)
    assert (here / "out" / "notes.txt").read_text() == "the user's"
    assert main(shlex.split(OVER)) == 0
    assert len(mm_files(here / "out")) == 2
    assert (here / "out" / "notes.txt").read_text() == "the user's"
    assert (here / "out" / "iter_0000007").is_dir()
    assert sorted(path.name for path in here.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_by_a_signal(here: Path, number: int) -> None:
    """While it writes, as a user or a scheduler would; nothing is left, not even the lock."""
    code = (
        "import os, sys, time\nfrom duetvl.convert import cli, streaming\n"
        "write = streaming._write_at\n"
        "def slow(*a):\n    open('writing', 'w').close(); time.sleep(0.05); write(*a)\n"
        "streaming._write_at = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    process = start(ONE, code)
    while not Path("writing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said == "interrupted; nothing was left behind\n"
    Path("writing").unlink()
    assert [path.name for path in here.iterdir()] == ["hf"]


def test_files_that_torch_can_still_load(here: Path) -> None:
    """What a replaced directory holds is the new one's alone."""
    assert main(shlex.split(ONE)) == main(shlex.split(OVER)) == 0
    names = sorted(path.name for path in (here / "out" / "release").iterdir())
    assert names == ["mp_rank_00", "mp_rank_01"]
    loaded = torch.load(here / "out/release/mp_rank_01/model_optim_rng.pt", weights_only=True)
    assert loaded["model"]["text_decoder.embedding.word_embeddings.weight"].shape[0] == 24
