"""The full examination of one device: its operations, figures, a tiny model against the CPU, the cards of the node."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from duetvl.core.backend import choose_backend
from duetvl.core.errors import BackendError, ConfigError
from duetvl.doctor import PACKAGES, installed
from duetvl.doctor.check import Check
from duetvl.doctor.processes import examine_cards, examine_in_process
from duetvl.doctor.tiny import compare_tiny
from duetvl.storage.files import write_text

PARTS = ("operations", "speed", "tiny")


def examine_fully(backend: str, device: str, *, ranks: int | None = None, output: Path | None = None) -> Iterator[str]:
    """Lines to show as they come; the last says that all passed.

    `ranks`: of the trial of the collectives, None for as many as the node has cards. `output`: where the report goes
    as JSON. Raises BackendError where the framework or the device is not there, or, at the end, where something failed.
    """
    if ranks is not None and ranks < 1:
        raise ConfigError(f"--nproc {ranks}: ranks are counted from 1")
    examination = Examination(choose_backend(backend, device), device)
    yield from examination.run(ranks)
    rows = examination.rows
    if output is not None:
        write_text(output, json.dumps(examination.report(), indent=1) + "\n")
        yield f"written to {output}"
    failed = [row.name for row in rows if not row.passed]
    if failed:
        names = ", ".join(failed[:3]) + (" and others" if len(failed) > 3 else "")
        raise BackendError(f"{len(failed)} of {len(rows)} checks failed on {examination.place}: {names}")
    yield f"all {len(rows)} checks passed on {examination.place}"


class Examination:
    """Of one backend on one device, each part in a process of its own."""

    def __init__(self, backend: str, device: str):
        self.backend, self.device = backend, device
        self.about: dict[str, Any] = {}  # the device, as the backend describes it
        self.rows: list[Check] = []

    @property
    def place(self) -> str:
        """The backend and the device, in words."""
        return f"{self.backend} {self.about.get('name', self.device)}"

    def run(self, ranks: int | None) -> Iterator[str]:
        """Lines to show."""
        runs = []
        for kind, value in examine_in_process(self.backend, self.device, PARTS):
            if kind == "row":
                yield self._line(value)
            elif kind == "run":
                runs.append(value)
            elif not self.about:
                self.about = value
                name = f"{self.place} {value['product']}".rstrip()
                yield f"{name}, {value['memory'] / 2**30:.0f} GiB, {value['framework']}"
        for row in self._against_cpu(runs):
            yield self._line(row)
        count = ranks or self.about["count"]
        for row in examine_cards(self.backend, self.device, count) if count > 1 else ():
            yield self._line(row)

    def _line(self, row: Check) -> str:
        self.rows.append(row)
        return row.line()

    def _against_cpu(self, runs: list[dict[str, Any]]) -> Iterator[Check]:
        """The device's runs of tiny models beside those of composed operations on the CPU."""
        expected = {}
        dtypes = list(dict.fromkeys(run["dtype"] for run in runs))
        parts = ["tiny"] if runs else []
        for kind, value in examine_in_process(self.backend, "cpu", parts, composed=True, dtypes=dtypes):
            if kind == "row":
                yield Check("tiny", "the reference on the CPU", value.passed, detail=value.detail)
            elif kind == "run":
                expected[value["family"], value["dtype"]] = value
        for run in runs:
            if (reference := expected.get((run["family"], run["dtype"]))) is not None:
                yield from compare_tiny(run, reference)

    def report(self) -> dict[str, Any]:
        """All of it, to be sent."""
        return {
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "packages": {name: installed(package) for name, package in PACKAGES},
            "backend": self.backend,
            "device": {"asked": self.device, **self.about},
            "passed": all(row.passed for row in self.rows),
            "checks": [row.to_json() for row in self.rows],
        }
