"""What the benchmarks share: clocks, contenders in processes of their own, the machine's limits, rows of one table.

A benchmark of the common table (`all.py`) has a function `rows(quick, limits)`, which yields `Row`s: what a unit of
work took here, what it took the fastest of the others that are installed, and what the machine needs at the least. All
three are seconds for the same work, so that a ratio means the same in every row.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Clock = Literal["cpu", "wall"]
Side = Literal["torch", "mindspore", "host"]  # host: no framework takes part
SIDES: Mapping[Side, str] = {"torch": "torch_npu", "mindspore": "mindspore"}  # and their backends


@dataclass(frozen=True)
class Seconds:
    """Of the processors, all threads of all processes together, and of the clock on the wall."""

    cpu: float
    wall: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)

    def __truediv__(self, count: float) -> Seconds:
        return Seconds(self.cpu / count, self.wall / count)

    def by(self, clock: Clock) -> float:
        """What one of the clocks says."""
        return self.cpu if clock == "cpu" else self.wall


def timed(call: Callable[[], object]) -> Seconds:
    """What one call takes this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def seconds_of_children() -> float:
    """Of the processors, what all processes took that this one started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def least(every: Iterable[Seconds]) -> Seconds:
    """The smallest figure of each clock: what disturbs a run only adds to it."""
    runs = list(every)
    return Seconds(min(run.cpu for run in runs), min(run.wall for run in runs))


def repeated(call: Callable[[], object], repeats: int, warm: int = 1) -> Seconds:
    """The least of some calls, after `warm` that are not counted."""
    for _ in range(warm):
        call()
    return least(timed(call) for _ in range(repeats))


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """The least that the work can take on this machine, in seconds of the row's clock, and what binds it."""

    kind: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One piece of work on one side: `ours`, beside the fastest of the `others`, and the limit.

    `work` says what is done in these seconds; rows of different work are never compared. `clock`: which one the ratios
    are of; work that waits for a disk is measured on the wall.
    """

    name: str
    side: Side
    work: str
    ours: Seconds
    theirs: Seconds | None
    other: str
    limit: Limit | None
    command: str
    clock: Clock = "cpu"

    @property
    def ratios(self) -> dict[str, float]:
        """Our seconds in units of each of the other two; less is better."""
        own, found = self.ours.by(self.clock), {}
        if self.theirs is not None:
            found["the other side"] = own / self.theirs.by(self.clock)
        if self.limit is not None:
            found["the limit"] = own / self.limit.seconds
        return found

    def to_json(self) -> dict[str, Any]:
        """As a line of results/all.json; of a figure six digits are kept."""
        return asdict(self, dict_factory=_rounded)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Row:
        """Read what `to_json` wrote."""
        theirs, limit = line["theirs"], line["limit"]
        parts = {
            "ours": Seconds(**line["ours"]),
            "theirs": None if theirs is None else Seconds(**theirs),
            "limit": None if limit is None else Limit(**limit),
        }
        return cls(**{**line, **parts})


def _rounded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in pairs}


def fastest(others: Mapping[str, Seconds], clock: Clock = "cpu") -> tuple[Seconds | None, str]:
    """The fastest of the others with its name; None where none is installed."""
    if not others:
        return None, ""
    name = min(others, key=lambda each: others[each].by(clock))
    return others[name], name


def installed(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(find_spec(package) is not None for package in packages)


def sides() -> list[Side]:
    """Those whose framework is installed."""
    return [side for side in SIDES if installed(side)]


# -- the machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one core of this machine does in a second, measured: float32 operations, and bytes read from memory."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls) -> Limits:
        """Large products and scalar products of numpy, on as many threads as the environment allows it."""
        side, numbers = 1024, 2**25
        a, b = (np.full((side, side), value, np.float32) for value in (1.0, 0.5))
        flops = 2 * side**3 / repeated(lambda: a @ b, 10).cpu
        x, y = (np.full(numbers, value, np.float32) for value in (1.0, 0.5))
        return cls(flops, 8 * numbers / repeated(lambda: np.dot(x, y), 6).cpu)

    def of(self, *, flops: float = 0.0, read: float = 0.0) -> Limit:
        """The limit of work that has to compute and to read that much, whichever takes longer."""
        compute, memory = flops / self.flops, read / self.bandwidth
        return Limit("matmul", compute) if compute >= memory else Limit("memory bandwidth", memory)


def seconds_of_writing(directory: Path, size: int, repeats: int = 2) -> Seconds:
    """The fastest time to write this number of bytes to a new file and wait until they are on the disk."""
    block, path = np.random.default_rng(0).bytes(2**24), directory / "written"

    def write() -> None:
        with open(path, "wb") as handle:
            for start in range(0, size, len(block)):
                handle.write(block[: size - start])
            handle.flush()
            os.fsync(handle.fileno())

    taken = []
    for _ in range(repeats):
        taken.append(timed(write))
        path.unlink()
    return least(taken)


def processor_name() -> str:
    """What /proc/cpuinfo calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions(*packages: str) -> str:
    """What is installed of these."""
    return ", ".join(f"{name} {_version(name)}" for name in packages)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# -- processes --------------------------------------------------------------------------------------------------------


def apart(file: str, *arguments: object, threads: int = 1) -> Any:
    """What a fresh process of a benchmark prints last, as JSON; `threads` is its number of threads."""
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GLOG_v": "4"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, file, *map(str, arguments)]
    environment = {**os.environ, **limits, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def say(text: str) -> None:
    """To the standard output, at once."""
    print(text, flush=True)  # noqa: T201


def write_page(file: str, report: str) -> None:
    """Put a report into results/NAME.md, NAME being that of the benchmark's file."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{Path(file).stem}.md").write_text(report, encoding="utf-8")


def command_of(file: str, arguments: Sequence[str] = ()) -> str:
    """How a benchmark is run."""
    return " ".join(["python", f"benchmarks/{Path(file).name}", *arguments])
