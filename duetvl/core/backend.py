"""A backend is a value: the implementations of core's protocols for one framework on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from duetvl.core.autograd import Autograd
from duetvl.core.checkpoint_io import CheckpointIO
from duetvl.core.collectives import Collectives
from duetvl.core.device import Device
from duetvl.core.errors import BackendError, did_you_mean
from duetvl.core.kv_cache import KVCache
from duetvl.core.ops import Ops
from duetvl.core.optimizer import Optimizer

ENTRY_POINTS = "duetvl.backends"
_BUILT_IN = {
    "torch_npu": "duetvl.backends.torch_npu:create",
    "mindspore": "duetvl.backends.mindspore:create",
}
_ALIASES = {"torch": "torch_npu", "pytorch": "torch_npu", "ms": "mindspore"}


@dataclass(frozen=True)
class Capabilities:
    """What may be asked of a backend; nobody asks for its name."""

    framework: str  # name and version of the framework, for logs
    storage_only: frozenset[str] = frozenset()  # dtypes that are stored, but computed in float32
    bitwise_repeatable: bool = True  # the same program on the same input gives the same bits


@dataclass(frozen=True)
class Backend:
    """Hand it to whatever computes. Two may live side by side in one process."""

    name: str
    ops: Ops
    autograd: Autograd
    collectives: Collectives
    kv_cache: KVCache
    optimizer: Optimizer
    checkpoint_io: CheckpointIO
    device: Device
    capabilities: Capabilities

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """The tensor's values on the host; bfloat16 comes as float32."""
        return self.ops.to_numpy(tensor)


def known_backends() -> Mapping[str, str]:
    """Name -> "module:factory" of the built-in backends and those that installed packages register."""
    return _BUILT_IN | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def load_backend(name: str = "torch_npu", device: str = "auto") -> Backend:
    """Import a framework and make its backend for one device.

    `name` is torch_npu (or torch), mindspore, or one registered under the entry-point group `duetvl.backends`.
    `device` is cpu, cuda, npu (ascend on mindspore; npu is understood too), or auto for the best that is there.
    Raises BackendError.
    """
    known = known_backends()
    chosen = _ALIASES.get(name, name)
    if chosen not in known:
        raise BackendError(f"no backend {name!r}{did_you_mean(name, set(known) | set(_ALIASES))}")
    module, _, factory = known[chosen].partition(":")
    return getattr(import_module(module), factory)(device)
