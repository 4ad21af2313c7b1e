"""Steps made ahead of their use, in threads.

One plans steps, the other finishes them. Of many ranks each thread talks to the same one of the others, on a channel of
its own and in the order of the steps: so no rank waits for another in a circle, however far each has come. They run
numpy, Pillow and the tokenizer, never a framework: MindSpore's engine must be touched by one thread only.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from typing import Final

from duetvl.core.errors import DataError
from duetvl.data.loading.loader import BatchMaker, Planned, Step
from duetvl.data.loading.order import Cursor
from duetvl.data.loading.peers import Channel

_LOOK: Final = 0.5  # seconds between looks at whether the threads wait too long for other ranks


class StepLoader:
    """The steps of a run from the cursor on, made ahead."""

    def __init__(
        self, maker: BatchMaker, cursor: Cursor, global_batch: int, *, steps: int | None = None, prefetch: int = 1
    ):
        """Start making steps: `steps` of them, by default without end; at most `prefetch` lie ready or in work."""
        self._maker, self._cursor, self._global_batch, self._steps = maker, cursor, global_batch, steps
        self._planned: queue.SimpleQueue[Planned | BaseException | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Step | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(prefetch)
        self._closed = False
        self._first: Step | None = None
        work = {"plans": self._plan, "pixels": self._finish}
        self._threads = [threading.Thread(target=fn, name=f"duetvl-data-{n}", daemon=True) for n, fn in work.items()]
        for thread in self._threads:
            thread.start()

    def next_step(self) -> Step:
        """The next step. What is wrong with its records is raised here."""
        self.wait()
        step, self._first = self._first, None
        assert step is not None
        self._room.release()
        return step

    def wait(self) -> None:
        """Wait until the next step is made; what is wrong with its records is raised here.

        Raises BackendError where it cannot be made as another rank has gone, or has said nothing for
        DUETVL_PEER_TIMEOUT seconds of this waiting.
        """
        if self._first is None:
            made = self._next()
            if isinstance(made, BaseException):
                self._ready.put(made)  # to be raised again by the next call
                raise made
            self._first = made

    def close(self) -> None:
        """Stop the threads once they have finished what they are doing; other ranks are not waited for."""
        self._closed = True
        self._room.release()
        self._maker.peers.abandon()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Step | BaseException:
        begun = time.monotonic()
        while True:
            try:
                return self._ready.get(timeout=_LOOK)
            except queue.Empty:
                self._maker.peers.check_waiting(begun)

    def _plan(self) -> None:
        """Begin steps as there is room for them; the last thing handed on is None, or an error."""
        try:
            for _ in itertools.repeat(None) if self._steps is None else range(self._steps):
                self._room.acquire()
                if self._closed:
                    break
                self._planned.put(self._maker.begin(self._cursor, self._global_batch))
            self._planned.put(None)
        except BaseException as error:  # raised where the step is asked for, after the steps before it
            self._planned.put(_passed_on(error, self._maker.peers.plans))

    def _finish(self) -> None:
        try:
            while isinstance(planned := self._planned.get(), Planned) and not self._closed:
                self._ready.put(planned.finish())
            if isinstance(planned, BaseException):
                self._ready.put(planned)
        except BaseException as error:
            self._ready.put(_passed_on(error, self._maker.peers.pixels))


def _passed_on(error: BaseException, channel: Channel) -> BaseException:
    """The error. Where the other ranks do not have it as well, the same thread of each notices that this one has ended.

    The other channel stays: the steps before this one are still made, and what is wrong with them comes first.
    """
    if not isinstance(error, DataError):
        channel.abandon()
    return error
