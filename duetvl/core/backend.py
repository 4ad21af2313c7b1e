"""A backend is a value: the implementations of core's protocols for one framework on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
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
_FRAMEWORKS = {  # module, name and extra of what each built-in backend needs, in the order that `auto` tries them
    "torch_npu": ("torch", "PyTorch", "torch"),
    "mindspore": ("mindspore", "MindSpore", "mindspore"),
}
AUTO = "auto"


@dataclass(frozen=True)
class Capabilities:
    """What may be asked of a backend; nobody asks for its name."""

    framework: str  # name and version of the framework, for logs
    storage_only: frozenset[str] = frozenset()  # dtypes that are stored, but computed in float32
    bitwise_repeatable: bool = True  # the same program on the same input gives the same bits
    recomputation: bool = True  # `Autograd.checkpoint` works
    # There are numbers of rows at which no row's result depends on the others, in any bit; the same for all operations.
    steady_rows: bool = False


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
    passed_over: str = ""  # where `auto` took the CPU: why, accelerator by accelerator

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """The tensor's values on the host; bfloat16 comes as float32."""
        return self.ops.to_numpy(tensor)


def known_backends() -> Mapping[str, str]:
    """Name -> "module:factory" of the built-in backends and those that installed packages register."""
    return _BUILT_IN | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def check_name(name: str) -> None:
    """Raise BackendError unless `name` is auto, or a backend or an alias of one, whether it is installed or not."""
    known = {AUTO, *known_backends(), *_ALIASES}
    if name not in known:
        raise BackendError(f"no backend {name!r}{did_you_mean(name, known)}")


def choose_backend(name: str = AUTO, device: str = "auto") -> str:
    """The backend that `load_backend` would load, found without importing a framework.

    Raises BackendError for a name or a device that is not known, and where the framework is not installed. Whether the
    machine has the device is not looked at.
    """
    check_name(name)
    chosen = _first_installed() if name == AUTO else _ALIASES.get(name, name)
    if not _is_installed(chosen):
        _, framework, extra = _FRAMEWORKS[chosen]
        raise BackendError(f"backend {chosen} needs {framework}, which is not installed: pip install 'duetvl[{extra}]'")
    devices = known_devices(chosen)
    if devices and device not in (*devices, "auto", "npu"):  # npu is understood by both built-in backends
        raise BackendError(f"backend {chosen} has no device {device!r}; it has {', '.join(devices)} and auto")
    return chosen


def _first_installed() -> str:
    registered = [name for name in known_backends() if name not in _FRAMEWORKS]
    for name in (*_FRAMEWORKS, *registered):
        if _is_installed(name):
            return name
    needs = " or ".join(f"{framework} (pip install 'duetvl[{extra}]')" for _, framework, extra in _FRAMEWORKS.values())
    raise BackendError(f"no framework is installed; a backend needs {needs}")


def _is_installed(backend: str) -> bool:
    """Whether its framework can be found; of a registered backend it is not known, and taken to be there."""
    if backend not in _FRAMEWORKS:
        return True
    spec = find_spec(_FRAMEWORKS[backend][0])
    return spec is not None and spec.origin is not None  # a directory of that name has no origin


def known_devices(backend: str) -> tuple[str, ...]:
    """The devices that a backend has code for: `DEVICES` of its module `backend`; () where it says nothing."""
    module = known_backends()[backend].partition(":")[0]
    try:
        return tuple(import_module(f"{module}.backend").DEVICES)
    except (ImportError, AttributeError):
        return ()


def load_backend(name: str = AUTO, device: str = "auto") -> Backend:
    """Import a framework and make its backend for one device.

    `name` is torch_npu (or torch), mindspore, one registered under the entry-point group `duetvl.backends`, or auto for
    the framework that is installed, PyTorch where both are. `device` is cpu, cuda, npu (ascend on mindspore; npu is
    understood too), or auto for the best that is there. Raises BackendError.
    """
    chosen = choose_backend(name, device)
    module, _, factory = known_backends()[chosen].partition(":")
    try:
        create = getattr(import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise BackendError(f"backend {chosen} cannot be loaded from {module}:{factory}: {error}") from None
    return create(device)
