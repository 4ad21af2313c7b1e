"""What a user meets whose run does not come together: one clear error, in bounded time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import BackendError

from .world import _free_port

RUN = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "MS_WORKER_NUM", "MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT")
TORCH = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
MINDSPORE = {"MS_WORKER_NUM": "2", "MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": "29512"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of a process that no launcher started."""
    for name in RUN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        environment.setenv(name, value)


def test_one_process_needs_no_launcher(be: Backend, environment: pytest.MonkeyPatch) -> None:
    be.collectives.start()
    assert (be.collectives.rank, be.collectives.size) == (0, 1)
    x = be.ops.zeros((2, 2))
    assert be.collectives.all_reduce(x) is x
    assert be.collectives.exchange([], []) == []
    be.collectives.stop()


def test_the_launcher_says_how_many_there_will_be(be: Backend, environment: pytest.MonkeyPatch) -> None:
    """Before they meet, so that a recipe for another number is refused at once."""
    assert be.collectives.launched() == 1
    set_all(environment, MINDSPORE if be.name == "mindspore" else TORCH)
    assert be.collectives.launched() == 2


def test_the_scheduler_beside_one_worker_ends(environment: pytest.MonkeyPatch) -> None:
    """msrun starts the same program twice: a worker, and a scheduler that must not train in the same directory."""
    pytest.importorskip("mindspore")
    set_all(environment, MINDSPORE | {"MS_WORKER_NUM": "1", "MS_ROLE": "MS_SCHED"})
    with pytest.raises(SystemExit) as ended:
        load_backend("mindspore", "cpu").collectives.launched()
    assert ended.value.code == 0


def test_an_incomplete_environment_is_told(be: Backend, environment: pytest.MonkeyPatch) -> None:
    own = MINDSPORE if be.name == "mindspore" else TORCH
    for missing in list(own)[1:]:  # without the first, there is but one rank
        set_all(environment, own)
        environment.delenv(missing)
        with pytest.raises(BackendError, match=f"is incomplete.*{missing}=None"):
            be.collectives.start()


def test_the_other_launcher_is_told(be: Backend, environment: pytest.MonkeyPatch) -> None:
    set_all(environment, TORCH if be.name == "mindspore" else MINDSPORE)
    with pytest.raises(BackendError, match=r"start with (torchrun|msrun), or choose"):
        be.collectives.start()


def test_a_wrong_limit_is_told(be: Backend, environment: pytest.MonkeyPatch) -> None:
    set_all(environment, (MINDSPORE if be.name == "mindspore" else TORCH) | {"DUETVL_START_TIMEOUT": "soon"})
    with pytest.raises(BackendError, match="DUETVL_START_TIMEOUT must be a number of seconds"):
        be.collectives.start()


ALONE = """
import sys
from duetvl.core.backend import load_backend
be = load_backend(sys.argv[1], device="cpu")
try:
    be.collectives.start()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_missing_ranks_are_told_within_the_limit(be: Backend) -> None:
    own = MINDSPORE if be.name == "mindspore" else TORCH
    port = {"MS_SCHED_PORT" if be.name == "mindspore" else "MASTER_PORT": str(_free_port())}
    environment = os.environ | own | port | {"DUETVL_START_TIMEOUT": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE, be.name]
    # A process of its own: a failed start is not undone in either framework.
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    name, message = found.stdout.split(maxsplit=1)
    assert name == "BackendError", found.stderr
    assert "check that" in message
    assert "DUETVL_START_TIMEOUT" in message


LEAVES = """
import sys
from duetvl.core.backend import load_backend
be = load_backend("torch_npu", device="cpu")
be.collectives.start()
be.collectives.barrier()
if be.collectives.rank == 1:
    sys.exit(0)
try:
    be.collectives.all_reduce(be.ops.zeros((4,)))
except Exception as error:
    # Flushed, as a thread of gloo that still runs may abort the process at its end.
    print(type(error).__name__, error, flush=True)
"""


def test_a_torch_rank_that_leaves_is_noticed() -> None:
    pytest.importorskip("torch")
    environment = os.environ | TORCH | {"MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen([sys.executable, "-c", LEAVES], env=environment | {"RANK": str(rank)}, stdout=-1, text=True)
        for rank in range(2)
    ]
    out = [run.communicate(timeout=60)[0] for run in runs]
    assert out[0].startswith("BackendError"), out
    assert "all_reduce failed on rank 0 of 2: another rank has " in out[0]
    assert out[0].isascii() and "/" not in out[0] and len(out[0].splitlines()) == 1, "in the engine's words"


def test_memory_that_ends_in_a_collective_is_no_other_ranks_fault() -> None:
    torch = pytest.importorskip("torch")
    collectives = load_backend("torch_npu", "cpu").collectives
    with pytest.raises(RuntimeError, match="allocate memory"), collectives._failing("all_reduce", (0, 1)):
        torch.empty(2**50, dtype=torch.uint8)
    ended = pytest.raises(BackendError, match=r"all_reduce failed .* another rank has ended; see the logs of rank 1")
    with ended, collectives._failing("all_reduce", (0, 1)):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:57551")
