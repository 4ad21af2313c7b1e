"""A command in several processes on this machine, each with devices of its own; none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from duetvl.core.errors import DuetvlError

_PERIOD: Final = 0.5
_PATIENCE: Final = 20.0  # seconds that a process has to end by itself, and the ranks that it has started
VISIBLE: Final = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


class ProcessFailed(DuetvlError):
    """One of several processes has ended with an error."""


def run_processes(words: Sequence[str], count: int, logs: Path, look: Callable[[], None], devices: int = 1) -> None:
    """Run `duetvl WORDS --process 0`, 1, ... up to `count`; what they print goes to files in `logs`.

    Each has as many `devices` of the machine, for ranks that it starts where these are several. `look` is called twice
    a second meanwhile. Where one fails the others are ended, and ProcessFailed names it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = [logs / f"process_{number}.log" for number in range(count)]
        started = [
            stack.enter_context(
                _Process([*words, "--process", str(number)], environment_of(number, count, devices), file)
            )
            for number, file in enumerate(files)
        ]
        while any(process.status is None for process in started):
            time.sleep(_PERIOD)
            look()
            for number, process in enumerate(started):
                if process.status:
                    raise ProcessFailed(
                        f"process {number} of {count} ended with status {process.status}: {_cause(files[number])} "
                        f"(log: {files[number]}); the answers so far are kept; start again to resume"
                    )


class _Process:
    """A process; leaving the context ends it."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path):
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "duetvl", *words],
                stdin=subprocess.PIPE,  # its end tells the process that we are gone, however we ended
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def status(self) -> int | None:
        """What it ended with, None while it runs."""
        return self._process.poll()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


def environment_of(number: int, count: int, devices: int) -> dict[str, str]:
    """Of one of `count` processes that have as many devices each, in their order."""
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (count * devices))))
    if devices == 1:  # both frameworks' ways to say which device of the machine is meant
        return {**environment, "LOCAL_RANK": str(number), "DEVICE_ID": str(number)}
    own = slice(number * devices, (number + 1) * devices)
    for name in VISIBLE:  # torchrun and msrun count the devices that a process sees
        seen = environment[name].split(",") if name in environment else [str(n) for n in range(count * devices)]
        environment[name] = ",".join(seen[own])
    return environment


def end_with_parent() -> None:
    """End this process, one of `run_processes`, and the ranks that it has started, when the parent has gone."""

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock must be free when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _cause(log: Path) -> str:
    """The last line that names an error or a rank, else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    named = [line for line in lines if line.startswith(("error: ", "launch: rank"))]
    last = (named or lines or ["it printed nothing"])[-1]
    return last.removeprefix("error: ").removeprefix("launch: ").rstrip(":")
