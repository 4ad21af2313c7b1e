"""The device under a MindSpore backend."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import mindspore as ms

from duetvl.core.host_memory import free_host_memory

# An Atlas 300I DUO (310P), and the first generation of 910; those of the second have a digit behind the letter.
_NO_BFLOAT16: Final = re.compile(r"Ascend(310P\d*|910(A|B|Pro[AB]|PremiumA))")


class MindSporeDevice:
    """See core/device.py."""

    def __init__(self, target: str):
        self.on_cpu = target == "CPU"
        self.name = target.lower()
        self.product = "" if self.on_cpu else str(ms.hal.get_device_name(0))

    def synchronize(self) -> None:
        if not self.on_cpu:
            ms.runtime.synchronize()

    def peak_memory(self) -> int:
        if self.on_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(ms.runtime.max_memory_allocated())

    def total_memory(self) -> int:
        if self.on_cpu:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(ms.hal.get_device_properties(0).total_memory)

    def free_memory(self) -> int:
        if self.on_cpu:
            return free_host_memory()
        return self.total_memory() - int(ms.runtime.memory_allocated())

    def count(self) -> int:
        return 1 if self.on_cpu else int(ms.hal.device_count())

    def supports(self, dtype: str) -> bool:
        if dtype == "bfloat16":
            return not _NO_BFLOAT16.fullmatch(self.product)
        return dtype in ("float32", "float16")

    def profile(self, directory: Path) -> AbstractContextManager[None]:
        return _profile(directory)


@contextmanager
def _profile(directory: Path) -> Iterator[None]:
    profiler = ms.profiler.profile(on_trace_ready=ms.profiler.tensorboard_trace_handler(str(directory)))
    profiler.start()
    try:
        yield
    finally:
        profiler.stop()
