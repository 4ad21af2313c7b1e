"""Stopping a run politely, within the time that a scheduler grants."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Would end the program too, unless they are ignored (as after nohup) or somebody handles them: a closed terminal, and
# what some schedulers send before they kill.
OTHERS = (signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """While entered, the first SIGINT, SIGTERM or one like them only sets `caught`; a second one ends the program.

    The second raises KeyboardInterrupt or SystemExit(128 + number) in the main thread, so that everything is tidied
    up on the way out; a third acts as it did before. Signals reach the main thread alone: elsewhere this does nothing.
    """

    def __init__(self, announce: Callable[[str], None], grace: float | None = None):
        """`announce` is called with the signal's name. `grace`: seconds from it until the process will be killed."""
        self.caught: signal.Signals | None = None
        self.grace = grace
        self._caught_at = 0.0
        self._announce = announce
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            taken = (*SIGNALS, *(number for number in OTHERS if signal.getsignal(number) is signal.SIG_DFL))
            self._before = {number: signal.signal(number, self._first) for number in taken}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
        self._restore()

    def pressing(self) -> bool:
        """Whether half of the grace has passed: what is left is needed for saving."""
        if self.caught is None or self.grace is None:
            return False
        return time.monotonic() - self._caught_at >= self.grace / 2

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.caught, self._caught_at = signal.Signals(number), time.monotonic()
        for each in self._before:
            signal.signal(each, self._second)
        try:
            self._announce(self.caught.name)
        except RuntimeError:  # it came in the middle of a line being printed, and a stream cannot be entered twice
            os.write(sys.stderr.fileno(), f"{self.caught.name}: stopping after this step\n".encode())

    def _second(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
