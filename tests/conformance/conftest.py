"""Shows the measured errors at the end of a run when DUETVL_SHOW_ERRORS is set."""

from __future__ import annotations

import os
from typing import Any

from .tolerances import MEASURED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if os.environ.get("DUETVL_SHOW_ERRORS"):
        for (op, dtype, backend), worst in sorted(MEASURED.items()):
            terminalreporter.write_line(f"{op:24}{dtype:10}{backend:12}{worst:.2e}")
