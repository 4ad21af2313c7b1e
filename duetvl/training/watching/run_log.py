"""`train.log`: what a run has said, start after start, beside the steps in metrics.jsonl."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from duetvl.version import __version__

LOG: Final = "train.log"


class RunLog:
    """Lines at the end of a file, each on disk at once. What cannot be written ends no run: the first time is said."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        """A new start of the run: a line names time, machine, process and version. `say` gets the warning."""
        self.path, self._say = run_dir / LOG, say
        self._failed = False
        moment = time.strftime("%Y-%m-%d %H:%M:%S %z")
        self.write(f"-- {moment}, {socket.gethostname()}, process {os.getpid()}, duetvl {__version__}")

    def write(self, text: str) -> None:
        """Append a line."""
        if self._failed:
            return
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
        except OSError as error:
            self._failed = True
            self._say(f"warning: {self.path} cannot be written: {error.strerror or error}")
