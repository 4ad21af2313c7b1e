"""A run that is killed again and again, at random moments and while it saves, ends as one that was not.

5 moments for each backend; 50 with `--full`. What a start is and how it is killed is in killed_run.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_run
from frameworks import FRAMEWORKS

from duetvl.storage.finding import checkpoints_dir, find_checkpoint, has_checkpoint
from duetvl.storage.tensor_files import TensorFile
from duetvl.training.watching.metrics import read_metrics

STEPS = 16
LAST_CALL = 90  # a start makes some 10 calls before its first save, and 25 for each save and its rotation
LONGEST = 0.8  # seconds


class Starter:
    """The process that forks the starts."""

    def __init__(self, backend, recipe):
        overrides = [f"train.steps={STEPS}", "train.eval_every=5", "checkpoint.every=2", "optim.lr=5e-3"]
        command = [sys.executable, str(Path(__file__).with_name("killed_run.py")), backend, str(recipe), *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, moment, place, background):
        self.process.stdin.write(f"{moment}\t{place}\tcheckpoint.background={str(background).lower()}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer in ("killed", "done"), f"{moment}: {answer}"
        return answer == "killed"

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(params=list(FRAMEWORKS))
def starter(request, tmp_path):
    if find_spec(FRAMEWORKS[request.param]) is None:
        pytest.skip(f"{FRAMEWORKS[request.param]} is not installed")
    made = Starter(request.param, tiny_run.write_recipe(tmp_path))
    made.exact = request.param == "torch_npu"
    yield made
    made.close()


def moments(number, seed):
    """The first one inside of a save; then half at a call that changes the directory, half at a time; half of each
    while saving in the background."""
    yield "save 2", True
    chosen = random.Random(seed)
    for index in range(1, number):
        call, after = chosen.randint(1, LAST_CALL), chosen.uniform(0, LONGEST)
        yield (f"call {call}" if index % 2 == 0 else f"after {after:.3f}"), index % 4 < 2


def losses(run):
    return [row.get("loss", row.get("eval_loss")) for row in read_metrics(run)]


def tensors(run):
    files = [TensorFile(path) for path in sorted(find_checkpoint(run).path.glob("*.safetensors"))]
    return {f"{file.path.name}:{name}": file.view(name).tobytes() for file in files for name in file.specs}


def assert_equal_ends(one, other, exact):
    assert find_checkpoint(one).step == find_checkpoint(other).step == STEPS
    if exact:
        assert losses(one) == losses(other)
        assert tensors(one) == tensors(other)
    else:
        assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    assert not [path for path in checkpoints_dir(one).iterdir() if path.name.startswith(".")]


def test_a_run_that_is_killed_ends_as_one_that_is_not(starter, tmp_path, full):
    whole = tmp_path / "whole"
    assert not starter.start("never", whole, background=False)
    kills = killed_in_a_save = finished = 0
    run = tmp_path / "run0"
    for moment, background in moments(50 if full else 5, seed=5):
        while not starter.start(moment, run, background):  # it was faster: once more, from the beginning
            assert_equal_ends(run, whole, starter.exact)
            finished += 1
            run = tmp_path / f"run{finished}"
        kills += 1
        killed_in_a_save += bool(list(checkpoints_dir(run).glob(".step-*.saving")))
        if has_checkpoint(run):
            assert find_checkpoint(run).rejected == (), moment
    assert not starter.start("never", run, background=False)
    assert_equal_ends(run, whole, starter.exact)
    assert kills == (50 if full else 5)
    assert killed_in_a_save > 0
