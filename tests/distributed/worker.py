"""One rank of the world of four: runs the named cases and leaves one file per case and rank. Started by world.py."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from pathlib import Path

CASE_SECONDS = 60.0


def leave(place: Path, name: str, text: str) -> None:
    """A file that is either whole or not there."""
    draft = place / f".{name}.{os.getpid()}"
    draft.write_text(text)
    draft.rename(place / name)


def attempt(place: Path, name: str, rank: int) -> str:
    """The traceback of a case, or nothing. One that hangs leaves the stack of its threads and ends the process."""
    from cases import CASES

    stack = (place / f"{name}.{rank}.stack").open("w")
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True, file=stack)
    try:
        CASES[name](backend)
    except Exception:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""


def all_passed(place: Path, name: str, size: int) -> bool:
    """Wait for every rank's outcome; a failure may leave ranks out of step, so that nothing more can run."""
    files = [place / f"{name}.{rank}" for rank in range(size)]
    deadline = time.monotonic() + CASE_SECONDS
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.002)
    return all(file.exists() and not file.read_text() for file in files)


if __name__ == "__main__":
    directory, backend_name, *names = sys.argv[1:]
    here = Path(directory)
    leave(here, f"pid.{os.getpid()}", "")
    try:
        from duetvl.core.backend import load_backend

        backend = load_backend(backend_name, device="cpu")
        backend.collectives.start()
    except Exception:
        leave(here, f"start.{os.getpid()}", traceback.format_exc())
        raise
    me = backend.collectives
    for each in names:
        leave(here, f"{each}.{me.rank}", attempt(here, each, me.rank))
        if not all_passed(here, each, me.size):
            sys.exit(1)
    rank = me.rank
    me.stop()
    leave(here, f"finished.{rank}", "")
