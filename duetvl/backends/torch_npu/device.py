"""The device under a torch backend."""

from __future__ import annotations

import os
import resource
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from duetvl.core.host_memory import free_host_memory


class TorchDevice:
    """See core/device.py."""

    def __init__(self, place: torch.device):
        self.place = place
        self.name = str(place)
        self.product = "" if place.type == "cpu" else str(self._module.get_device_name(place))

    @property
    def _module(self) -> Any:
        """torch.cuda or torch.npu."""
        return torch.get_device_module(self.place)

    def synchronize(self) -> None:
        if self.place.type != "cpu":
            self._module.synchronize(self.place)

    def peak_memory(self) -> int:
        if self.place.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(self._module.max_memory_allocated(self.place))

    def total_memory(self) -> int:
        if self.place.type == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(self._module.get_device_properties(self.place).total_memory)

    def free_memory(self) -> int:
        if self.place.type == "cpu":
            return free_host_memory()
        module = self._module
        unused = module.memory_reserved(self.place) - module.memory_allocated(self.place)  # by the allocator
        return int(module.mem_get_info(self.place)[0] + unused)

    def count(self) -> int:
        return 1 if self.place.type == "cpu" else int(self._module.device_count())

    def supports(self, dtype: str) -> bool:
        if dtype == "bfloat16" and self.place.type == "npu":  # an Atlas 300I DUO has none
            return bool(self._module.is_bf16_supported())
        return dtype in ("float32", "bfloat16", "float16")

    def profile(self, directory: Path) -> AbstractContextManager[Any]:
        return torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(str(directory)))
