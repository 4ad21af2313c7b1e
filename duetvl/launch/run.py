"""A start of a run, watched: signals are passed on, and what has become of each rank is reported once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from duetvl.launch.plan import LaunchPlan
from duetvl.training.failures import read_failures

USER_ERROR: Final = 2
AFTER_FAILURE: Final = 10.0  # seconds that the other ranks of this node have to end by themselves
AFTER_END: Final = 30.0  # that torchrun or msrun has to end after its last rank
_PERIOD: Final = 0.05
_TAIL: Final = 20  # lines of a log


def launch(plan: LaunchPlan, run_dir: Path, logs: Path) -> int:
    """Start the run, up to `plan.restarts` times again where it fails; the exit status.

    0, 2 for an error that the user can act on, 128 + n after signal n, 1 for a failure. A restart resumes from the last
    checkpoint, as every start does. Where nodes may come and go, torchrun starts again by itself.
    """
    plan.check_port()
    restarts = 0 if plan.elastic else plan.restarts
    tell(f"launch: {plan.nproc} rank{'s' * (plan.nproc > 1)} by {plan.engine}; logs: {logs}")
    with _Signals() as signals, _written_on():
        for attempt in range(1 + restarts):
            place = logs if attempt == 0 else logs / f"restart-{attempt}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "words.json").write_text(json.dumps(plan.words))
            start = _Start(plan, place, run_dir, signals)
            status = start.run()
            if not start.failed or attempt == restarts:
                return status
            tell(f"launch: starting again ({attempt + 1} of {restarts})")
    raise AssertionError("the last attempt returns")


class _Signals:
    """While entered, signals are noted, to be passed to the ranks."""

    _TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.caught: list[int] = []

    def __enter__(self) -> _Signals:
        usual = (signal.SIG_DFL, signal.default_int_handler)
        self._before = {n: signal.signal(n, self._note) for n in self._TAKEN if signal.getsignal(n) in usual}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught.append(number)


@dataclass
class _Rank:
    """A process of this node, `rank-00003` or `scheduler`."""

    name: str
    pid: int
    signalled: int = 0  # how many signals have been passed to it
    status: int | None = None
    ended: bool = False
    returned: bool = False  # its status is the command's own
    lost: bool = False  # it was seen to have ended without a status, before any other was
    stuck: bool = False  # it did not end by itself

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("rank-"))


@dataclass
class _Start:
    plan: LaunchPlan
    place: Path
    run_dir: Path
    signals: _Signals
    ranks: dict[str, _Rank] = field(default_factory=dict)
    failed: bool = False

    def run(self) -> int:
        """Watch it to its end, and say what went wrong; the exit status."""
        self._began = time.time()
        with open(self.place / "launcher.log", "wb") as log:
            self._engine = subprocess.Popen(
                self.plan.command(self.place), env=self.plan.environment(self.place), stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        with self._nothing_left():
            self._watch()
        self._look()
        return self._outcome()

    def _watch(self) -> None:
        """Until torchrun or msrun has ended, or takes too long over it."""
        since: float | None = None
        while self._engine.poll() is None:
            self._look()
            self._pass_on()
            patience = self._patience()
            since = None if patience is None else since or time.monotonic()
            late = patience is not None and since is not None and time.monotonic() - since > patience
            if late or self._ending(len(self.signals.caught)) > 2:
                return
            time.sleep(_PERIOD)

    def _patience(self) -> float | None:
        """Seconds that what still runs has to end by itself; None while it need not."""
        over = [rank for rank in self.ranks.values() if rank.ended]
        if any(rank.status is None or 0 < rank.status <= 128 for rank in over):
            if self.plan.elastic:
                return None  # torchrun starts them again
            left = [rank for rank in self._workers() if not rank.ended]
            # A stopped process ends by nothing but SIGKILL.
            return 0.0 if left and all(self._state(rank) == "T" for rank in left) else AFTER_FAILURE
        # One that was stopped by a signal has ended well, and rank 0 may have more to write than the others.
        return AFTER_END if len(over) >= self.plan.nproc else None

    @contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """However this ends, no process of this start is left."""
        try:
            yield
        finally:
            self._kill_ranks()
            if self._engine.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    self._engine.wait(3.0)
                with suppress(ProcessLookupError):
                    os.killpg(self._engine.pid, signal.SIGKILL)
            self._engine.wait()
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        self._look()
        for rank in self.ranks.values():
            if not rank.ended:
                rank.stuck = True
                self._send(rank, signal.SIGKILL)

    def _look(self) -> None:
        """Which processes there are, and which have ended."""
        for file in self.place.glob("*.pid"):
            pid = int(file.read_text())
            if file.stem not in self.ranks or self.ranks[file.stem].pid != pid:
                self.ranks[file.stem] = _Rank(file.stem, pid)
        first = not any(rank.ended for rank in self.ranks.values())
        for rank in self.ranks.values():
            if not rank.ended and not self._alive(rank):
                rank.ended = True
                with suppress(FileNotFoundError):
                    status, _, how = (self.place / f"{rank.name}.status").read_text().partition(" ")
                    rank.status, rank.returned = int(status), bool(how)
                rank.lost = first and rank.status is None

    def _alive(self, rank: _Rank) -> bool:
        """Whether it is there and no zombie."""
        return self._state(rank) not in ("", "Z")

    def _state(self, rank: _Rank) -> str:
        """Its letter of proc(5), T being stopped; nothing where it is gone or its number is another process's now."""
        with suppress(OSError):
            state = Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if str(self.place).encode() in Path(f"/proc/{rank.pid}/cmdline").read_bytes():
                return state
        return ""

    def _pass_on(self) -> None:
        """Each signal once to every rank; they have the time to save that the run grants them."""
        for rank in self.ranks.values():
            if not rank.ended and rank.name != "scheduler":
                for place, number in enumerate(self.signals.caught[rank.signalled :], rank.signalled):
                    if number in self.plan.survives or self._ending(place) < 2:
                        self._send(rank, number)
                    rank.signalled = place + 1
        if self.signals.caught and not self.ranks:
            self._engine.terminate()

    def _ending(self, place: int) -> int:
        """How many of the first signals are to end the run."""
        return sum(number not in self.plan.survives for number in self.signals.caught[:place])

    def _send(self, rank: _Rank, number: int) -> None:
        if self._alive(rank):
            with suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _outcome(self) -> int:
        workers = self._workers()
        statuses = [rank.status for rank in workers]
        if len(workers) == self.plan.nproc and all(status == 0 for status in statuses):
            return 0
        if ends := [number for number in self.signals.caught if number not in self.plan.survives or not workers]:
            return 128 + ends[0]
        if USER_ERROR in statuses:
            self._tell_user_error(workers)
            return USER_ERROR
        if stopped := [status for status in statuses if status is not None and status > 128]:
            return stopped[0]
        if len(workers) == self.plan.nproc and all(rank.status == 0 or rank.returned for rank in workers):
            return 1  # what the command has to say, such as that an answer failed
        self.failed = True
        self._tell_failure()
        return 1

    def _workers(self) -> list[_Rank]:
        return [rank for rank in self.ranks.values() if rank.name != "scheduler"]

    def _tell_user_error(self, workers: list[_Rank]) -> None:
        """Rank 0 has shown it, if it was its error too."""
        wrong = [rank for rank in workers if rank.status == USER_ERROR]
        if all(rank.number for rank in wrong):
            self._show_log(f"rank {wrong[0].number} ended", wrong[0])

    def _tell_failure(self) -> None:
        pids = {rank.pid for rank in self.ranks.values()}
        records = [one for one in read_failures(self.run_dir) if self._is_of_this_start(one, pids)]
        causes = [one for one in records if not one["consequence"]]
        recorded = {one["pid"] for one in records}
        silent = [rank for rank in self._workers() if rank.pid not in recorded]
        lost = [rank for rank in silent if rank.lost] or [rank for rank in silent if rank.status is None]
        if causes:
            self._show_record(causes[0])
        elif stuck := [rank for rank in silent if rank.stuck]:
            self._show_log(f"{_names(stuck)} did not answer, and had to be killed", stuck[0])
        elif lost:
            self._show_log(f"{_names(lost)} {'was' if len(lost) == 1 else 'were'} killed", lost[0])
        elif records:
            self._show_record(records[0])
        elif bad := [rank for rank in self.ranks.values() if rank.status]:
            self._show_log(f"{bad[0].name} ended with status {bad[0].status}", bad[0])
        else:
            self._show_tail(f"{self.plan.engine} failed", self.place / "launcher.log")

    def _is_of_this_start(self, record: dict[str, Any], pids: set[int]) -> bool:
        """Of one of these processes, or of another node's."""
        return record["pid"] in pids or Path(record["file"]).stat().st_mtime >= self._began

    def _show_record(self, record: dict[str, Any]) -> None:
        step = "" if record["step"] is None else f" at step {record['step']}"
        tell(f"launch: rank {record['rank']} ({record['host']}) failed{step}: {record['message']}")
        for line in record["traceback"].splitlines()[-_TAIL:]:
            tell(f"  {line}")
        tell(f"  all of it: {record['file']}; logs: {self.place}")

    def _show_log(self, what: str, rank: _Rank) -> None:
        log = self.place / f"{rank.name}.log"
        if log.exists() and log.stat().st_size:
            self._show_tail(what, log)
        else:
            tell(f"launch: {what}; logs: {self.place}")

    def _show_tail(self, what: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
        tell(f"launch: {what}; the end of {log}:")
        for line in lines:
            tell(f"  {line}")


def _names(ranks: list[_Rank]) -> str:
    return " and ".join(f"rank {rank.number} (process {rank.pid})" for rank in ranks[:3])


def tell(text: str) -> None:
    """A line on standard error."""
    _go_to_end()
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _go_to_end() -> None:
    """In a file, to the end of what rank 0 has appended: this process has a position of its own in it."""
    for number in (1, 2):
        with suppress(OSError):  # a terminal or a pipe
            os.lseek(number, 0, os.SEEK_END)


@contextmanager
def _written_on() -> Iterator[None]:
    """What is written after this process, by the next command of a script, does not overwrite rank 0's output."""
    try:
        yield
    finally:
        _go_to_end()
