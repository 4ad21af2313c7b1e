"""Stopping a run politely."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first SIGINT or SIGTERM only sets `caught`; a second one acts as it did before.

    Signals reach the main thread alone: elsewhere this does nothing.
    """

    def __init__(self, announce: Callable[[str], None]):
        """`announce` is told the name of the signal."""
        self.caught: signal.Signals | None = None
        self._announce = announce
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._restore()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number)
        self._restore()
        self._announce(self.caught.name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
