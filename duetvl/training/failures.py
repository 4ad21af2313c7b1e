"""How one rank of many ends when it fails alone: with a record on disk, a line on the terminal, and at once.

The others may be waiting for this one inside a step, where nothing can be sent to them; they notice its end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NoReturn

from duetvl.core.errors import BackendError, DuetvlError, RankFailed, first_line, one_line
from duetvl.core.ranks import Ranks
from duetvl.storage.files import read_object, write_text

FAILED: Final = 1  # exit status
HEARD: Final = 1.0  # seconds for the rank with the cause to write it down: launchers kill it once another one has ended


@contextmanager
def ending_alone(ranks: Ranks, run_dir: Path, step: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """An error that all ranks raise together passes, and rank 0 shows it; any other ends this process at once.

    It leaves `failures/rank-NNNNN.json` in the run directory, with the number that `step` gives. On one process it is
    raised.
    """
    try:
        yield
    except DuetvlError as error:
        error.silent = error.agreed and not ranks.writes
        if error.agreed or ranks.count == 1:
            raise
        _fail(ranks, run_dir, step(), error)
    except Exception as error:
        if ranks.count == 1:
            raise
        _fail(ranks, run_dir, step(), error)
    except (KeyboardInterrupt, SystemExit) as error:
        if ranks.count == 1:
            raise
        _leave(130 if isinstance(error, KeyboardInterrupt) else error.code if isinstance(error.code, int) else FAILED)


@contextmanager
def leaving_together(ranks: Ranks) -> Iterator[None]:
    """With an error that all ranks raise, none ends before all have it: launchers kill the others when one ends."""
    try:
        yield
    except DuetvlError as error:
        if error.agreed:
            with suppress(BackendError):  # a rank may have ended before this
                ranks.each(None)
        raise


def failures_dir(run_dir: Path) -> Path:
    """Where ranks that fail alone leave their records."""
    return run_dir / "failures"


def read_failures(run_dir: Path) -> list[dict[str, Any]]:
    """These records, causes before consequences, and earlier ones first. What cannot be read is left out."""
    found = []
    for file in failures_dir(run_dir).glob("rank-*.json"):
        with suppress(DuetvlError):
            found.append({**read_object(file, DuetvlError), "file": str(file)})
    return sorted(found, key=lambda record: (record.get("consequence", False), record.get("time", "")))


def set_failures_aside(run_dir: Path) -> None:
    """Those of an earlier start, to `failures-before/N`."""
    if (found := failures_dir(run_dir)).is_dir():
        before = run_dir / "failures-before"
        before.mkdir(exist_ok=True)
        os.rename(found, before / str(1 + len(list(before.iterdir()))))


def _fail(ranks: Ranks, run_dir: Path, step: int | None, error: Exception) -> NoReturn:
    consequence = isinstance(error, BackendError | RankFailed)  # of another rank's end, as far as is known here
    words = str(error) if isinstance(error, DuetvlError) else f"{type(error).__name__}: {first_line(error)}"
    record = {
        "rank": ranks.index, "host": socket.gethostname(), "pid": os.getpid(),
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "step": step,
        "error": type(error).__name__, "message": one_line(words), "consequence": consequence,
        "traceback": "".join(traceback.format_exception(error)),
    }  # fmt: skip
    file = failures_dir(run_dir) / f"rank-{ranks.index:05}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # rank 0 removes an empty run directory as it leaves
        write_text(file, json.dumps(record, indent=1) + "\n")
        where = f"; see {file}"
    except OSError as unwritten:
        where = f"; {file}: cannot be written: {unwritten.strerror or unwritten}"
    what = "ends too: " if consequence else "error: "
    at = "" if step is None else f", step {step}"
    with suppress(OSError):
        sys.stderr.write(f"{what}rank {ranks.index} ({record['host']}){at}: {record['message']}{where}\n")
    if consequence:
        time.sleep(HEARD)
    _leave(FAILED)


def _leave(status: int) -> NoReturn:
    """Without destructors, threads and atexit functions, of which some wait for other ranks."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
