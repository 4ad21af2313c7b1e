"""Four processes per backend, started once by torchrun or msrun, that run many cases."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SIZE = 4
STARTS = 3  # a failed case ends its processes; the cases after it get fresh ones, this often
GRACE = 5.0  # seconds that the other ranks have to report after one has failed
LIMIT = 600.0  # of one start with all its cases, each of which has a limit of its own in worker.py
WORKER = Path(__file__).with_name("worker.py")


class World:
    """Runs the cases when made; `problem` then tells about each."""

    def __init__(self, backend: str, names: Sequence[str], place: Path):
        self.backend = backend
        self.found: dict[str, str] = {}
        left = list(names)
        for number in range(STARTS):
            if left:
                directory = place / f"start{number}"
                directory.mkdir()
                left = self._run(left, directory)
        for name in left:
            self.found[name] = f"not run: {STARTS} starts were used up by cases that failed"

    def problem(self, name: str) -> str:
        """Nothing where the case passed on every rank."""
        return self.found[name]

    def _run(self, names: list[str], place: Path) -> list[str]:
        """One start; returns the cases that did not come to run."""
        with (place / "output").open("w") as output:
            launcher = subprocess.Popen(
                [*self._command(place), str(WORKER), str(place), self.backend, *names],
                stdout=output, stderr=subprocess.STDOUT, env=_environment(), cwd=place,
            )  # fmt: skip
            try:
                self._watch(launcher, names, place)
            finally:
                _end(launcher, place)
        for number, name in enumerate(names):
            self.found[name] = self._read(name, place)
            if self.found[name]:
                return names[number + 1 :]
        if len(_outcomes("finished", place)) < SIZE:
            self.found[names[-1]] = f"the ranks did not leave the run\n{_tail(place / 'output')}"
        return []

    def _command(self, place: Path) -> list[str]:
        tools, port = Path(sys.executable).parent, _free_port()
        if self.backend == "mindspore":
            count = [f"--worker_num={SIZE}", f"--local_worker_num={SIZE}", f"--master_port={port}"]
            return [str(tools / "msrun"), *count, "--join=True", f"--log_dir={place / 'log'}"]
        return [str(tools / "torchrun"), f"--nproc-per-node={SIZE}", f"--master-port={port}"]

    def _watch(self, launcher: subprocess.Popen[bytes], names: list[str], place: Path) -> None:
        """Until all have left the run, the launcher has ended, or a rank has failed and the others could report."""
        deadline = time.monotonic() + LIMIT
        while launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if len(_outcomes("finished", place)) == SIZE:
                return
            if any(text for name in names for text in _outcomes(name, place).values()):
                deadline = min(deadline, time.monotonic() + GRACE)

    def _read(self, name: str, place: Path) -> str:
        outcomes = _outcomes(name, place)
        told = [f"--- rank {rank}\n{text}" for rank, text in outcomes.items() if text]
        silent = [rank for rank in range(SIZE) if rank not in outcomes]
        if silent:
            told.append(f"--- no word from ranks {silent} of {self.backend}")
            stacks = [place / f"{name}.{rank}.stack" for rank in silent]
            starts = [*place.glob("start.*")]
            others = [] if any(outcomes.values()) or starts else [place / "output", *place.glob("log/*.log")]
            told += [_tail(file) for file in (*stacks, *starts, *others) if file.exists() and file.stat().st_size]
        return "\n".join(told)


def _outcomes(name: str, place: Path) -> dict[int, str]:
    files = {rank: place / f"{name}.{rank}" for rank in range(SIZE)}
    return {rank: file.read_text() for rank, file in files.items() if file.exists()}


def _tail(file: Path) -> str:
    return f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}"


def _environment() -> dict[str, str]:
    tools = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",  # msrun starts whatever `python` is first
        "OMP_NUM_THREADS": "1",
        "DUETVL_START_TIMEOUT": "120",
        "DUETVL_PEER_TIMEOUT": "50",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(launcher: subprocess.Popen[bytes], place: Path) -> None:
    """The launcher ends its workers; those that stay are ended by their number, which they left themselves."""
    if launcher.poll() is None:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(3)
    for file in place.glob("pid.*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.suffix[1:]), signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(3)
    launcher.kill()
    launcher.wait()
