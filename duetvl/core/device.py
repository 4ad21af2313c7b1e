"""Protocol of the device a backend runs on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Device(Protocol):
    """One device of one process."""

    name: str  # "cpu", "cuda:0", "npu:0"
    product: str  # what its maker calls it, "NVIDIA H100 80GB HBM3"; empty for a CPU

    def synchronize(self) -> None:
        """Wait until everything that was started on the device has ended."""
        ...

    def peak_memory(self) -> int:
        """Most bytes that the device's allocator has held; on a CPU the peak resident set."""
        ...

    def total_memory(self) -> int:
        """Bytes of memory of the device (of the machine on a CPU)."""
        ...

    def free_memory(self) -> int:
        """Bytes of the device's memory that can still be had (of the machine's or the container's on a CPU)."""
        ...

    def count(self) -> int:
        """Devices of this kind that this process sees; 1 on a CPU."""
        ...

    def supports(self, dtype: str) -> bool:
        """Whether weights may be stored in this dtype."""
        ...

    def profile(self, directory: Path) -> AbstractContextManager[None]:
        """Write a trace of what runs inside, in the framework's own format, to `directory`."""
        ...
