"""Parts of an examination in a process of its own: what it says as it says it, and what became of it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duetvl.core.errors import BackendError
from duetvl.doctor import cause_of_death
from duetvl.doctor.check import Check
from duetvl.doctor.worker import MARK
from duetvl.launch.plan import LaunchPlan
from duetvl.launch.run import launch

LIMIT_S = 300.0  # of a part: the first run on a card compiles its kernels


def examine_in_process(
    backend: str, device: str, parts: Sequence[str], *, composed: bool = False, dtypes: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """("device", description), ("row", Check) and ("run", of a tiny model) as they come.

    A part that crashes or hangs is a row that failed, and those behind it run in a new process. Raises BackendError
    where the framework or the device is not there.
    """
    left = list(parts)
    while left:
        asked = {"backend": backend, "device": device, "parts": left, "composed": composed, "dtypes": list(dtypes)}
        for kind, value in _spoken(asked):
            if kind == "refused":
                raise BackendError(f"{backend} on {device}: {value}")
            if kind == "done":
                left = left[1:]
            elif kind == "end":
                end = value
            else:
                yield kind, Check.from_json(value) if kind == "row" else value
        if left:
            yield "row", Check(left[0], "as a whole", False, detail=end)
            left = left[1:]


def _spoken(asked: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a new process says, and at last ("end", why it ended)."""
    command = [sys.executable, "-m", "duetvl.doctor.worker", json.dumps(asked)]
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, errors="replace")
        assert process.stdout is not None
        late = threading.Event()
        timer = _timer(process, late)
        for line in process.stdout:
            if line.startswith(MARK):
                kind, value = json.loads(line.removeprefix(MARK))
                if kind == "done":
                    timer.cancel()
                    timer = _timer(process, late)
                yield kind, value
        status = process.wait()
        timer.cancel()
        noise.seek(0)
        done = subprocess.CompletedProcess(command, status, "", noise.read())
    yield "end", f"no answer within {LIMIT_S:g} s" if late.is_set() else cause_of_death(done)


def _timer(process: subprocess.Popen[str], late: threading.Event) -> threading.Timer:
    """Ends the process when a part takes too long."""

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(LIMIT_S, end)
    timer.daemon = True
    timer.start()
    return timer


def examine_cards(backend: str, device: str, count: int) -> list[Check]:
    """What as many ranks on this node find of the collectives between them."""
    with tempfile.TemporaryDirectory(prefix="duetvl-doctor-") as directory:
        target, logs = Path(directory, "rows.json"), Path(directory, "logs")
        words = ("doctor", "--full", "--backend", backend, "--device", device, "--between", str(target))
        status = launch(LaunchPlan(backend, words, count), logs, logs)
        if status or not target.exists():
            return [Check("cards", f"{count} ranks", False, detail=f"the ranks ended with status {status}")]
        return [Check.from_json(entry) for entry in json.loads(target.read_text(encoding="utf-8"))]
