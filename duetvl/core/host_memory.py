"""Memory of the machine that a process may still take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_GROUPS: Final = (  # limit and use of a container, in both versions of its interface
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be had without swapping, of the machine or of the container where that has less."""
    free = [_available(meminfo)]
    for limit, use in _GROUPS:
        try:
            free.append(int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):  # there is none, or its limit is "max"
            continue
    return max(min(free), 0)


def _available(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
