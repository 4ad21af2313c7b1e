"""Deltas from the engine's thread to a reader on an event loop, who may be slower than the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

from duetvl.inference.request import Completion, Delta
from duetvl.inference.sampling import TokenLogprob


@dataclass
class _Waiting:
    """What has come of one choice since the reader last took something."""

    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    has_text: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    completion: Completion | None = None

    def add(self, delta: Delta) -> None:
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.text is not None:
            self.texts.append(delta.text)
            self.has_text = True
        self.completion = delta.completion

    def delta(self, id: str, choice: int) -> Delta:
        text = "".join(self.texts) if self.has_text else None
        return Delta(id, choice, self.token_ids, text, self.logprobs, self.completion)


class Delivery:
    """A mailbox of deltas: one thread puts them in, one event loop takes them out.

    At most one delta waits for each choice: what follows is joined to it, so that a reader who falls behind gets more
    at a time and no mailbox grows beyond the answers themselves. Nothing is lost, and their order within a choice is
    kept.
    """

    def __init__(self) -> None:
        """Made on the loop that reads."""
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._lock = threading.Lock()
        self._waiting: dict[tuple[str, int], _Waiting] = {}

    def put(self, delta: Delta) -> None:
        """Take a delta, on any thread."""
        with self._lock:
            first = not self._waiting
            self._waiting.setdefault((delta.id, delta.choice), _Waiting()).add(delta)
        if first:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._came.set)

    async def read(self, choices: int) -> AsyncIterator[Delta]:
        """The deltas as they come, until this number of choices has its completion."""
        left = choices
        while left:
            await self._came.wait()
            self._came.clear()
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            for (id, choice), one in waiting.items():
                left -= one.completion is not None
                yield one.delta(id, choice)
