"""When and how a run saves: at once, or in a thread while it trains on; on many ranks together."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np

from duetvl.core.errors import CheckpointError
from duetvl.core.ranks import Ranks
from duetvl.training.checkpoints.pieces import HostPiece
from duetvl.training.checkpoints.writing import Snapshot, begin_save, write_first, write_other
from duetvl.training.watching.callbacks import told


class TakeSnapshot(Protocol):
    """Makes a snapshot of the run as it is now; with `copy` one that later steps do not change."""

    def __call__(self, *, copy: bool) -> Snapshot:  # noqa: D102
        ...


class SaveGivenUp(Exception):
    """The program is ending at once: a checkpoint under way in the background is not finished."""


Outcome = Path | CheckpointError | None


class _UnderWay(NamedTuple):
    """A checkpoint that is being written, or has been. On rank 0 the outcome is that of all, on others None."""

    step: int
    staging: Path
    outcome: Future[Outcome]


class Saver:
    """Writes a run's checkpoints. All ranks call the same functions at the same steps.

    In the background, tensors are copied to host memory between two steps, by the calling thread; the thread that
    writes them touches numpy and files alone, never a framework and no other rank but by files. One checkpoint is under
    way at most: saving again and leaving wait for it. So the peak of host memory grows by one checkpoint's size, which
    is given back tensor by tensor while it is written. `on_saved` and `warn` are called by the thread that calls `save`
    and `poll`, on all ranks at the same step and with the same words.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        ranks: Ranks,
        on_saved: Callable[[Path, int], None],
        warn: Callable[[str], None],
        background: bool = False,
        keep_last: int | None = None,
    ):
        """Nothing is written yet."""
        self.run_dir, self.keep_last, self.ranks = run_dir, keep_last, ranks
        self.on_saved, self.warn = on_saved, warn
        self._given_up = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="duetvl-save") if background else None
        self._pending: _UnderWay | None = None

    def save(self, take: TakeSnapshot) -> None:
        """A periodic checkpoint: where it cannot be written, there is a warning and training continues."""
        self.wait()
        copied = self._copy(take) if self._thread else None
        taken = copied or take(copy=False)
        try:
            staging = self._begun(taken, self.keep_last, waits=self._thread is not None and copied is None)
        except CheckpointError as error:
            self.warn(f"warning: {error}")
            return
        write = partial(self._outcome, staging, taken, self.keep_last)
        if self._thread is None or copied is None:
            self._pending = _UnderWay(taken.step, staging, _done(write()))
        else:
            self._pending = _UnderWay(taken.step, staging, self._thread.submit(write))
        if self._thread is None:
            self.wait()

    def save_last(self, take: TakeSnapshot, *, rotate: bool = True) -> None:
        """The checkpoint at the end, which is waited for; CheckpointError where it cannot be written.

        Without `rotate` no older one is removed.
        """
        self.wait()
        taken, keep_last = take(copy=False), self.keep_last if rotate else None
        staging = self._begun(taken, keep_last)
        written = _done(self._outcome(staging, taken, keep_last))
        self.on_saved(self._agreed(_UnderWay(taken.step, staging, written)), taken.step)

    def poll(self) -> None:
        """Report the outcome of the checkpoint in the background, once there is one."""
        if self._pending is not None and self.ranks.agree(self._pending.outcome.done()):
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint in the background, and report its outcome."""
        if self._pending is None:
            return
        under_way, self._pending = self._pending, None
        try:
            path = self._agreed(under_way)
        except CheckpointError as error:
            self.warn(f"warning: {error}")
        else:
            self.on_saved(path, under_way.step)

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
            return None

    # -- what ranks do together, between two steps ---------------------------------------------------------------------

    def _begun(self, taken: Snapshot, keep_last: int | None, *, waits: bool = False) -> Path:
        """The directory that rank 0 has made for the files of all; its CheckpointError on all ranks.

        `waits`: this rank has no memory for a copy.
        """
        sizes, waiting = zip(*self.ranks.each((taken.nbytes, waits)), strict=True)
        if any(waiting):
            where = f" on rank {waiting.index(True)}" if self.ranks.count > 1 else ""
            self.warn(
                f"warning: there is no memory for a copy of the checkpoint{where}: training waits until it is written"
            )
        return self.ranks.first(lambda: begin_save(self.run_dir, taken.step, sum(sizes), keep_last))

    def _agreed(self, under_way: _UnderWay) -> Path:
        """The checkpoint's directory as rank 0 knows it, or its CheckpointError, once every rank has ended its part."""
        own = under_way.outcome.result()
        try:
            return self.ranks.first(lambda: _path(own))
        except CheckpointError:
            if self.ranks.writes:  # others may have been writing there when it was removed
                shutil.rmtree(under_way.staging, ignore_errors=True)
            raise

    # -- what each does on its own, here or in the thread -------------------------------------------------------------

    def _outcome(self, staging: Path, taken: Snapshot, keep_last: int | None) -> Outcome:
        """Write this rank's part. Rank 0 waits for the others and has the outcome of all; the others have None."""
        pieces = tuple(self._stoppable(piece) for piece in taken.pieces)
        taken, index, count = replace(taken, pieces=pieces), self.ranks.index, self.ranks.count
        try:
            if index == 0:
                return write_first(staging, taken, ranks=count, keep_last=keep_last, look=self._look)
            write_other(staging, taken, index, count)
        except CheckpointError as error:
            return error
        return None

    def _stoppable(self, piece: HostPiece) -> HostPiece:
        def fetch() -> np.ndarray:
            self._look()
            return piece.fetch()

        return replace(piece, fetch=fetch)

    def _look(self) -> None:
        if self._given_up.is_set():
            raise SaveGivenUp


def _done(outcome: Outcome) -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_result(outcome)
    return future


def _path(outcome: Outcome) -> Path:
    if isinstance(outcome, CheckpointError):
        raise outcome
    assert outcome is not None, "rank 0 has the outcome"
    return outcome
