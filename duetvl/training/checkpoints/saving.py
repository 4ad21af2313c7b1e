"""When and how a run saves: at once, or in a thread while it trains on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Protocol

import numpy as np

from duetvl.core.errors import CheckpointError
from duetvl.training.checkpoints.checkpoint import HostPiece, Snapshot, write_snapshot
from duetvl.training.watching.callbacks import told


class TakeSnapshot(Protocol):
    """Makes a snapshot of the run as it is now; with `copy` one that later steps do not change."""

    def __call__(self, *, copy: bool) -> Snapshot:  # noqa: D102
        ...


class SaveGivenUp(Exception):
    """The program is ending at once: a checkpoint under way in the background is not finished."""


class Saver:
    """Writes a run's checkpoints.

    In the background, tensors are copied to host memory between two steps, by the calling thread; the thread that
    writes them touches numpy and files alone, never a framework. One checkpoint is under way at most: saving again
    and leaving wait for it. So the peak of host memory grows by one checkpoint's size, which is given back tensor by
    tensor while it is written. `on_saved` and `warn` are called by the thread that calls `save` and `poll`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        on_saved: Callable[[Path, int], None],
        warn: Callable[[str], None],
        background: bool = False,
        keep_last: int | None = None,
    ):
        """Nothing is written yet."""
        self.run_dir, self.keep_last = run_dir, keep_last
        self.on_saved, self.warn = on_saved, warn
        self._given_up = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duetvl-save") if background else None
        self._pending: tuple[int, Future[Path]] | None = None

    def save(self, take: TakeSnapshot) -> None:
        """A periodic checkpoint: where it cannot be written, there is a warning and training continues."""
        self.wait()
        taken = self._copy(take) if self._thread else None
        if self._thread is None or taken is None:
            now = take(copy=False)
            self._tell(now.step, partial(self._write, now))
            return
        pieces = tuple(self._stoppable(piece) for piece in taken.pieces)
        self._pending = taken.step, self._thread.submit(self._write, replace(taken, pieces=pieces))

    def save_last(self, take: TakeSnapshot, *, rotate: bool = True) -> None:
        """The checkpoint at the end, which is waited for; CheckpointError where it cannot be written.

        Without `rotate` no older one is removed.
        """
        self.wait()
        taken = take(copy=False)
        self.on_saved(write_snapshot(self.run_dir, taken, self.keep_last if rotate else None), taken.step)

    def poll(self) -> None:
        """Tell what has become of the checkpoint in the background, once it has ended."""
        if self._pending is not None and self._pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint in the background, and tell what has become of it."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        self._tell(step, future.result)

    def __enter__(self) -> Saver:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the checkpoint in the background; where the program ends at once, give it up and remove it.

        What goes wrong with it does not hide the error that the run ends with.
        """
        if self._thread is None:
            return
        if kind is not None and not issubclass(kind, Exception):
            self._given_up.set()
        try:
            if not self._given_up.is_set():
                with told(error, "the last checkpoint in the background", self.warn):
                    self.wait()
        finally:
            self._thread.shutdown(wait=True)

    def _copy(self, take: TakeSnapshot) -> Snapshot | None:
        try:
            return take(copy=True)
        except MemoryError:
            self.warn("warning: there is no memory for a copy of the checkpoint: training waits until it is written")
            return None

    def _tell(self, step: int, written: Callable[[], Path]) -> None:
        try:
            path = written()
        except CheckpointError as error:
            self.warn(f"warning: {error}")
        except MemoryError:
            self.warn(f"warning: the checkpoint of step {step} could not be written: there is no memory for it")
        else:
            self.on_saved(path, step)

    def _write(self, taken: Snapshot) -> Path:
        return write_snapshot(self.run_dir, taken, self.keep_last)

    def _stoppable(self, piece: HostPiece) -> HostPiece:
        def fetch() -> np.ndarray:
            if self._given_up.is_set():
                raise SaveGivenUp
            return piece.fetch()

        return replace(piece, fetch=fetch)
