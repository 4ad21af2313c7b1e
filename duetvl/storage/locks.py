"""Keeping two processes from writing one place, and leaving nothing behind when a process is ended."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType


@contextmanager
def file_lock(path: Path) -> Iterator[bool]:
    """Hold a lock by a file that exists meanwhile; it goes with the process, however that ends.

    Gives False where the file system has no locks: then nobody is kept out. BlockingIOError where another process or
    thread holds it, another OSError where the file cannot be made.
    """
    descriptor, works = _acquire(path)
    try:
        yield works
    finally:
        with suppress(OSError):  # removed while it is held: who has opened it before will see that it is another's
            if not os.fstat(descriptor).st_size:  # nothing that somebody else has written under this name
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> tuple[int, bool]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # as on some network file systems
            return descriptor, False
        if _is_still(descriptor, path):
            return descriptor, True
        os.close(descriptor)  # its holder has just removed it


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """Make a directory and those above it; at the end, those that were made and are empty are removed again."""
    made = []
    for one in (directory, *directory.parents):
        if one.exists():
            break
        made.append(one)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty, as it should be
            for one in made:
                one.rmdir()


@contextmanager
def tidy_when_ended() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP end the program by SystemExit, so that it tidies up, unless they are handled."""

    def end(number: int, frame: FrameType | None) -> None:
        for each in taken:
            signal.signal(each, signal.SIG_IGN)  # once more must not end the tidying up
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if here and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
