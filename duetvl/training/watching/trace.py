"""The trace of a few steps that `log.profile` asks for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from duetvl.core.device import Device
from duetvl.training.watching.callbacks import told


class Trace:
    """Records from the first step to the last, which a run may end in the middle of; nothing without `steps`."""

    def __init__(self, steps: tuple[int, int] | None, device: Device, directory: Path, say: Callable[[str], None]):
        """Nothing is recorded yet."""
        self.steps, self.device, self.directory, self.say = steps, device, directory, say
        self._open = ExitStack()

    def before(self, step: int) -> None:
        """The step of this number comes next."""
        if self.steps is not None and step == self.steps[0]:
            self._open.enter_context(self.device.profile(self.directory))

    def after(self, step: int) -> None:
        """The step of this number is done."""
        if self.steps is not None and step == self.steps[1]:
            self._open.close()
            self.say(f"the trace of steps {list(self.steps)} is in {self.directory}")

    def __enter__(self) -> Trace:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what there is."""
        with told(error, "the trace", self.say):
            self._open.close()
