"""Runs over two ranks, started by `duetvl launch`: how they end when one of them is lost, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_run
from frameworks import FRAMEWORKS

from duetvl.storage.finding import find_checkpoint, has_checkpoint
from duetvl.training.failures import read_failures
from duetvl.training.watching.metrics import read_metrics

PEER_TIMEOUT = 8  # seconds
SLOW_START = 20  # the same where four ranks at once load what the first step needs
ENDED = 40 + 20  # seconds in which all is over after a rank is lost; the second part for a machine with other work
# What goes wrong on one rank alone, which reads this file before anything else; of several, one at each start, and the
# last again after that.
FAULT = """
import os
faults = os.environ.get("FAULT", "")
if os.environ.get("RANK", os.environ.get("MS_NODE_ID")) == "1" and os.environ.get("MS_ROLE") != "MS_SCHED" and faults:
    import sys
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "duetvl.training.loop":
                sys.meta_path.remove(self)
                again = sys.argv[1].rpartition("restart-")[2]
                wanted = faults.split(",")
                fault = wanted[min(int(again) if again.isdigit() else 0, len(wanted) - 1)]
                import duetvl.training.step as step
                took = step.Trainer.step
                def failing(self, work, lr, number=0, *more):
                    if number == 3:
                        raise ZeroDivisionError("an accident on this rank")
                    return took(self, work, lr, number, *more)
                if fault == "step":
                    step.Trainer.step = failing
                elif fault != "data":
                    from signal import SIGKILL, SIGSTOP
                    from duetvl.models.qwen_vl.model import QwenVL
                    ran, passes = QwenVL.run, []
                    def run(self, *given, **more):
                        passes.append(given)
                        if len(passes) == 5 and fault == "raise":
                            raise ZeroDivisionError("an accident in this stage")
                        if len(passes) == 5:
                            os.kill(os.getpid(), {"stop": SIGSTOP, "kill": SIGKILL}[fault])
                        return ran(self, *given, **more)
                    QwenVL.run = run
                else:
                    import duetvl.data.loading.samples as samples
                    def thread_fails(self, refs):
                        raise ZeroDivisionError("an accident in the data thread")
                    samples.SampleMaker.drafts = thread_fails
    sys.meta_path.insert(0, Finder())
"""


@dataclass
class Launch:
    """A launch of the tiny run, and what its ranks leave."""

    place: Path
    recipe: Path
    backend: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place / "run"

    def start(
        self, *overrides: str, ranks: int = 2, options: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[str]:
        for old in self.place.glob("logs/*"):
            old.rename(self.place / f"old-{old.name}")
        steps = [] if any(text.startswith("train.steps") for text in overrides) else ["train.steps=5000"]
        words = ["train", str(self.recipe), f"train.output_dir={self.run}", "log.every=1000", *steps, *overrides]
        (self.place / "sitecustomize.py").write_text(FAULT)
        command = [sys.executable, "-m", "duetvl", "launch", f"--nproc={ranks}", f"--log-dir={self.place / 'logs'}"]
        self.started.append(
            subprocess.Popen(
                [*command, f"--backend={self.backend}", *options, "--", *words],
                env={**os.environ, "OMP_NUM_THREADS": "1", "DUETVL_PEER_TIMEOUT": str(PEER_TIMEOUT), **environment,
                     "PYTHONPATH": f"{self.place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.place,
            )
        )  # fmt: skip
        return self.started[-1]

    def pid(self, rank: int) -> int | None:
        found = next(self.place.glob(f"logs/*/rank-{rank:05}.pid"), None)
        return int(found.read_text()) if found else None

    def steps(self) -> int:
        return max((row["step"] for row in read_metrics(self.run)), default=0)

    def wait_for(self, reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.005)

    def send(self, number: int, rank: int) -> None:
        pid = self.pid(rank)
        assert pid is not None
        os.kill(pid, number)

    def end(self, process: subprocess.Popen[str], limit: float = ENDED, *, starts: bool = True) -> str:
        """What it has said, once it and its ranks have ended; `starts`: whether there were any."""
        told = process.communicate(timeout=limit)[0]
        pids = [int(file.read_text()) for file in self.place.glob("logs/**/rank-*.pid")]
        assert bool(pids) == starts and [pid for pid in pids if Path(f"/proc/{pid}").exists()] == [], told
        return told

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.fixture(params=list(FRAMEWORKS))
def launch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Launch]:
    if find_spec(FRAMEWORKS[request.param]) is None:
        pytest.skip(f"{FRAMEWORKS[request.param]} is not installed")
    recipe = tiny_run.write_recipe(tmp_path)
    values = json.loads(recipe.read_text())
    values["parallel"] = {"dp": "auto"}
    recipe.write_text(json.dumps(values))
    made = Launch(tmp_path, recipe, request.param)
    yield made
    made.close()


def only_on(launch: Launch, backend: str, full: bool) -> None:
    """Each kind of accident meets one backend in every run of the tests, and the other one with --full."""
    if launch.backend != backend and not full:
        pytest.skip("with --full")


def test_a_rank_that_is_killed_ends_the_run_and_the_next_start_goes_on(launch: Launch) -> None:
    """Killed in a step, after a signal has stopped and saved an earlier start."""
    process = launch.start()
    launch.wait_for(lambda: launch.steps() >= 2, process)
    process.send_signal(signal.SIGTERM)
    told = launch.end(process)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "start again to resume from" in told
    saved = find_checkpoint(launch.run).step
    assert saved == launch.steps() >= 2

    process = launch.start()
    launch.wait_for(lambda: launch.steps() >= saved + 2, process)
    launch.send(signal.SIGKILL, 1)
    told = launch.end(process)
    assert process.returncode == 1, told
    assert f"resuming {launch.run}" in told and re.search(r"launch: .*rank 1 \(process \d+\) w(as|ere) killed", told), (
        told
    )
    (failure,) = read_failures(launch.run)
    assert failure["rank"] == 0 and failure["consequence"] and failure["step"] > saved

    process = launch.start(f"train.steps={saved + 3}")
    told = launch.end(process, 240)
    assert process.returncode == 0, told
    assert find_checkpoint(launch.run).step == launch.steps() == saved + 3
    assert [row["step"] for row in read_metrics(launch.run) if "loss" in row] == list(range(1, saved + 4))
    assert read_failures(launch.run) == [] and (launch.run / "failures-before" / "1" / "rank-00000.json").exists()


def test_a_stage_that_is_lost_is_named(launch: Launch, full: bool) -> None:
    """Of four stages the second, in the midst of a step: at three starts it fails, is stopped, and is killed. Neither
    those that wait for it nor the last one, which waits for one of those, is taken for the cause."""
    only_on(launch, "torch_npu", full)
    layers = ("parallel.vision_layers=[1,1,0,0]", "parallel.language_layers=[0,0,1,1]")
    process = launch.start(
        "parallel.pp=4", "parallel.dp=1", *layers, ranks=4, options=("--restarts=2",), FAULT="raise,stop,kill",
        DUETVL_PEER_TIMEOUT=str(SLOW_START),
    )  # fmt: skip
    told = launch.end(process, 400)
    assert process.returncode == 1, told
    failed, stopped, killed = re.split(r"launch: starting again .*", told)
    assert re.search(r"launch: rank 1 \(.*\) failed at step \d: ZeroDivisionError: an accident in this", failed), told
    assert re.search(r"launch: rank 1 \(process \d+\) did not answer", stopped), told
    assert re.search(r"launch: rank 1 \(process \d+\) was killed", killed), told
    before = launch.run / "failures-before"
    causes = [
        [one["rank"] for file in place.glob("*.json") if not (one := json.loads(file.read_text()))["consequence"]]
        for place in (before / "1", before / "2", launch.run / "failures")
    ]
    assert causes == [[1], [], []], causes


def test_a_stage_that_is_killed_is_named(launch: Launch, full: bool) -> None:
    """What the other one says names it too."""
    only_on(launch, "mindspore", full)
    process = launch.start("parallel.pp=2", "parallel.dp=1")
    launch.wait_for(lambda: launch.steps() >= 2, process)
    launch.send(signal.SIGKILL, 1)
    told = launch.end(process)
    assert process.returncode == 1, told
    assert re.search(r"launch: .*rank 1 \(process \d+\) w(as|ere) killed", told), told
    (failure,) = read_failures(launch.run)
    assert failure["rank"] == 0 and failure["consequence"]
    assert "rank 1" in failure["message"], failure


def test_a_rank_that_is_stopped_is_given_up(launch: Launch, full: bool) -> None:
    """Without --full it is a stage's turn, above."""
    only_on(launch, "", full)
    process = launch.start()
    launch.wait_for(lambda: launch.steps() >= 2, process)
    launch.send(signal.SIGSTOP, 1)
    told = launch.end(process, PEER_TIMEOUT + ENDED)
    assert process.returncode == 1, told
    assert "launch: rank 1 (process" in told and "did not answer" in told, told


def test_an_error_of_one_rank_is_told_once_and_the_run_starts_again(launch: Launch, full: bool) -> None:
    """Nothing was saved: the second start, which fails in the same way, begins at step 0."""
    only_on(launch, "mindspore", full)
    process = launch.start(options=("--restarts=1",), FAULT="step")
    told = launch.end(process, 240)
    assert process.returncode == 1, told
    assert told.count("failed at step 4: ZeroDivisionError: an accident on this rank") == 2, told
    assert told.count('raise ZeroDivisionError("an accident on this rank")') == 2, told
    assert told.count("launch: starting again (1 of 1)") == 1
    cause = read_failures(launch.run)[0]
    assert (cause["rank"], cause["step"], cause["error"]) == (1, 4, "ZeroDivisionError")

    process = launch.start(FAULT="data")  # while all wait for the first step's data
    told = launch.end(process, 240)
    assert process.returncode == 1 and "failed: ZeroDivisionError: an accident in the data thread" in told, told
    assert read_failures(launch.run)[0]["rank"] == 1


def test_a_rank_that_is_killed_while_it_starts_or_saves(launch: Launch, full: bool) -> None:
    only_on(launch, "torch_npu", full)
    process = launch.start("checkpoint.every=1")
    launch.wait_for(lambda: launch.pid(1), process)
    launch.send(signal.SIGKILL, 1)
    told = launch.end(process)
    assert process.returncode == 1, told
    assert not has_checkpoint(launch.run)

    process = launch.start("checkpoint.every=1")
    launch.wait_for(lambda: launch.steps() >= 2 and list(launch.run.glob("checkpoints/.step-*.saving")), process)
    launch.send(signal.SIGKILL, 0)
    told = launch.end(process)
    assert process.returncode == 1, told
    saved = find_checkpoint(launch.run).step
    process = launch.start(f"train.steps={saved + 1}")
    told = launch.end(process, 240)
    assert process.returncode == 0, told
    assert f"resuming {launch.run}/checkpoints/step-{saved:07}" in told
    assert find_checkpoint(launch.run).step == saved + 1


def test_what_a_user_gets_wrong_is_one_line_and_no_restart(launch: Launch, full: bool) -> None:
    only_on(launch, "torch_npu", full)
    process = launch.start("parallel.tp=3", "parallel.dp=1")
    told = launch.end(process, starts=False)
    assert process.returncode == 2
    assert told.startswith("error: parallel: pp 1 x dp 1 x cp 1 x tp 3 needs 3 processes, and 2 were started; start 3")
    assert len(told.splitlines()) == 1
    process = launch.start(f"data.train={launch.place / 'none.jsonl'}", options=("--restarts=2",))
    told = launch.end(process, 120)
    assert process.returncode == 2
    assert [line for line in told.splitlines() if not line.startswith("launch: 2 ranks")] == [
        f"error: {launch.place / 'none.jsonl'}: no such file"
    ]

    records = (launch.place / "data.jsonl").read_text().splitlines(keepends=True)
    bad = launch.place / "bad.jsonl"
    bad.write_text("".join(records[:10]) + records[10].replace("green10.png", "gone.png"))  # of the third step
    given = (f"data.train={bad}", "data.val=null", "data.shuffle=false", "train.steps=5")
    process = launch.start(*given, options=("--restarts=2",))
    told = launch.end(process, 120)
    assert process.returncode == 2 and "starting again" not in told, told
    assert [line for line in told.splitlines() if "bad.jsonl" in line and "error" in line] == told.splitlines()[-1:]
    assert find_checkpoint(launch.run).step == 2, "what was done is saved"
