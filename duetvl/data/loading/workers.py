"""Who makes drafts and samples: this process, or several beside it. The results are the same."""

from __future__ import annotations

import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Outcome, OutOfMemory
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.transfer import receive, send
from duetvl.data.loading.worker import START
from duetvl.data.sources.records import Ref

_CHUNK = 16  # records of one request: enough that sending them costs little


class Pool(Protocol):
    """Makes drafts and samples."""

    def drafts(self, refs: Sequence[Ref]) -> list[Outcome]:
        """Drafts of records, in their order."""
        ...

    def load(self, draft: Draft) -> Future[Sample | Pair | DataError]:
        """A sample, begun now or when it is asked for."""
        ...

    def close(self) -> None:
        """End whatever runs."""
        ...


def make_pool(maker: SampleMaker, workers: int) -> Pool:
    """So many worker processes, or none."""
    return WorkerPool(maker, workers) if workers else InlinePool(maker)


class InlinePool:
    """Makes everything in the thread that asks."""

    def __init__(self, maker: SampleMaker):
        self._maker = maker

    def drafts(self, refs: Sequence[Ref]) -> list[Outcome]:
        """See `Pool`."""
        return self._maker.drafts(refs)

    def load(self, draft: Draft) -> Future[Sample | Pair | DataError]:
        """See `Pool`; made when its result is asked for."""
        return _Late(self._maker, draft)

    def close(self) -> None:
        """Nothing runs."""


class _Late(Future[Sample | Pair | DataError]):
    """A sample that is made when it is asked for, so that only one lies in memory before it is packed."""

    def __init__(self, maker: SampleMaker, draft: Draft):
        super().__init__()
        self._maker, self._draft = maker, draft

    def result(self, timeout: float | None = None) -> Sample | Pair | DataError:
        """Make it."""
        return self._maker.load(self._draft)


class WorkerPool:
    """Processes that are started when they are first needed. A thread of this process waits for each."""

    def __init__(self, maker: SampleMaker, workers: int):
        self._maker = maker
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(maker) for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._one_alone = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="duetvl-worker")

    def drafts(self, refs: Sequence[Ref]) -> list[Outcome]:
        """See `Pool`. Neighbours in a file go to one worker, which may keep what it has read of it."""
        order = sorted(range(len(refs)), key=lambda i: refs[i])
        size = min(_CHUNK, -(-len(refs) // len(self._workers)) or 1)
        chunks = [order[at : at + size] for at in range(0, len(order), size)]
        waiting = [self._threads.submit(self._drafts, [refs[i] for i in chunk]) for chunk in chunks]
        found: list[Any] = [None] * len(refs)
        for chunk, future in zip(chunks, waiting, strict=True):
            for i, draft in zip(chunk, future.result(), strict=True):
                found[i] = draft
        return found

    def load(self, draft: Draft) -> Future[Sample | Pair | DataError]:
        """See `Pool`; begun as soon as a worker is free."""
        return self._threads.submit(self._load, draft)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _drafts(self, refs: list[Ref]) -> list[Outcome]:
        try:
            found: list[Outcome] = self._ask("drafts", refs)
        except WorkerDied:
            if len(refs) > 1:  # which of them was it?
                return [draft for ref in refs for draft in self._drafts([ref])]
            return [self._alone("drafts", refs, self._maker.where(refs[0]))]
        for at, outcome in enumerate(found):
            if isinstance(outcome, OutOfMemory):
                found[at] = self._alone("drafts", [refs[at]], self._maker.where(refs[at]))
        return found

    def _load(self, draft: Draft) -> Sample | Pair | DataError:
        try:
            made = self._ask("load", draft)
        except WorkerDied:
            return self._alone("load", draft, draft.where)
        return self._alone("load", draft, draft.where) if isinstance(made, OutOfMemory) else made

    def _alone(self, method: str, argument: Any, where: str) -> Any:
        """Ask for one thing once more while no other worker holds any memory: it may have been theirs that lacked."""
        with self._one_alone:
            workers = [self._idle.get() for _ in self._workers]
            try:
                for worker in workers[1:]:
                    worker.end()
                made = workers[0].ask(method, argument)
                return made[0] if isinstance(made, list) else made
            except WorkerDied as died:
                if not died.killed:
                    return DataError(f"{where}: {died}")
                more = "also when it was tried once more, alone; take the record out or give the machine more memory"
                return OutOfMemory(f"{where}: {died}, {more}")
            finally:
                for worker in workers:
                    self._idle.put(worker)

    def _ask(self, method: str, argument: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(method, argument)
        finally:
            self._idle.put(worker)


class WorkerDied(Exception):
    """A worker process has ended while it was at work; `killed` as the system kills where memory runs out."""

    def __init__(self, code: int):
        self.killed = code == -signal.SIGKILL
        how = f"exit status {code}; its last words are above" if code >= 0 else f"killed by signal {-code}"
        memory = ", as the system does when memory runs out" if self.killed else ""
        super().__init__(f"the data worker at work on it has died ({how}{memory})")


class _Worker:
    """One process, started again after it has died."""

    def __init__(self, maker: SampleMaker):
        self._maker = maker
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._closed = False

    def ask(self, method: str, argument: Any) -> Any:
        """Call a method of the maker there. Raises WorkerDied."""
        try:
            connection = self._connection or self._start()
            send(connection, (method, (argument,)))
            return receive(connection)
        except (EOFError, OSError):
            raise WorkerDied(self._ended()) from None

    def close(self) -> None:
        """End the process for good."""
        self._closed = True
        self.end()

    def end(self) -> None:
        """End the process; another is started when something is asked."""
        if self._process is not None:
            self._process.kill()
            self._ended()

    def _start(self) -> socket.socket:
        if self._closed:
            raise EOFError
        ours, theirs = socket.socketpair()
        with theirs:
            # One thread each, as there are several processes; a tokenizer would start as many as there are cores.
            place = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-c", START, json.dumps(sys.path), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=place, close_fds=True
            )
        self._connection = ours
        if self._closed:  # meanwhile
            self._process.kill()
            raise EOFError
        problem = self._hand_over(ours)
        if problem is not None:
            raise DataError(
                f"a data worker cannot be given the encoder: {problem}; define its class in a module (not in the "
                f"script that is run), or set data.workers to 0"
            )
        return ours

    def _hand_over(self, connection: socket.socket) -> str | None:
        """Send the maker; returns what prevented it."""
        try:
            send(connection, self._maker)
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # what pickle raises, by kind of object
            return str(error)
        return receive(connection)

    def _ended(self) -> int:
        """Wait for the end of the process; its exit status."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        return process.wait() if process is not None else 0
