"""Puts the MindSpore backend together for one device."""

from __future__ import annotations

import os
from dataclasses import replace

from duetvl.core.backend import Backend, Capabilities
from duetvl.core.composed import ComposedKVCache
from duetvl.core.errors import BackendError

DEVICES = ("cpu", "ascend")
_TARGETS = {"cpu": "CPU", "ascend": "Ascend", "npu": "Ascend"}


def create(device: str = "auto") -> Backend:
    """The backend on `device`: cpu, ascend (npu), or auto for ascend where it is there."""
    os.environ.setdefault("GLOG_v", "3")  # the framework's C++ log: errors only, before it is imported
    try:
        import mindspore
    except ImportError as error:
        raise BackendError(f"backend mindspore needs MindSpore: pip install 'duetvl[mindspore]' ({error})") from None

    target = _start(device)
    on_its_own = device == "auto" and target == "CPU"
    passed_over = f"no NPU (MindSpore {mindspore.__version__} sees no Ascend device)" if on_its_own else ""
    return replace(assemble(target, target), passed_over=passed_over)


def assemble(kind: str, target: str) -> Backend:
    """The backend as it is for devices of a `kind`, CPU or Ascend, with the process's device `target`.

    They are the same, but for tests, which run what is there for Ascend on CPU tensors (tests/npu).
    """
    import mindspore as ms

    from duetvl.backends.mindspore.autograd import RECOMPUTATION, MindSporeAutograd
    from duetvl.backends.mindspore.checkpoint_io import MindSporeCheckpointIO
    from duetvl.backends.mindspore.collectives import MindSporeCollectives, MindSporeCpuCollectives
    from duetvl.backends.mindspore.device import MindSporeDevice
    from duetvl.backends.mindspore.ops import MindSporeOps
    from duetvl.backends.mindspore.optimizer import MindSporeOptimizer

    autograd = MindSporeAutograd()
    on_cpu = kind == "CPU"
    ops: MindSporeOps
    optimizer: MindSporeOptimizer
    kv_cache: ComposedKVCache
    if on_cpu:
        from duetvl.backends.mindspore.kernels_cpu import CpuKVCache, CpuOps, CpuOptimizer

        ops = cpu_ops = CpuOps(autograd)
        kv_cache, optimizer = CpuKVCache(cpu_ops), CpuOptimizer(ops)
    else:
        from duetvl.backends.mindspore.kernels_ascend import AscendKVCache, AscendOps

        ops = ascend_ops = AscendOps(autograd)
        kv_cache, optimizer = AscendKVCache(ascend_ops), MindSporeOptimizer(ops)
    return Backend(
        name="mindspore",
        ops=ops,
        autograd=autograd,
        collectives=MindSporeCpuCollectives(ops) if on_cpu else MindSporeCollectives(ops),
        kv_cache=kv_cache,
        optimizer=optimizer,
        checkpoint_io=MindSporeCheckpointIO(),
        device=MindSporeDevice(target),
        capabilities=Capabilities(
            framework=f"mindspore {ms.__version__}",
            storage_only=frozenset({"bfloat16"}) if on_cpu else frozenset(),
            bitwise_repeatable=False,  # on CPU, exp changes its last bits from one call to the next
            recomputation=RECOMPUTATION,
        ),
    )


def _start(device: str) -> str:
    """Choose the device for the whole process, as MindSpore has it, and return the framework's name for it."""
    import mindspore as ms
    import numpy as np

    if device not in (*_TARGETS, "auto"):
        raise BackendError(f"backend mindspore has no device {device!r}; it has {', '.join(DEVICES)} and auto")
    target = _best() if device == "auto" else _TARGETS[device]
    if target == "CPU" and int(np.__version__.split(".")[0]) >= 2:
        raise BackendError(f"mindspore on CPU needs numpy 1.26, found {np.__version__}: pip install 'numpy<2'")
    try:
        ms.set_device(target)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        raise BackendError(f"mindspore {ms.__version__} cannot use device {target}: {reason}") from None
    if target == "CPU":
        # Asynchronous dispatch stalls on few cores (5 to 90 times slower backward) and blames errors on later calls.
        ms.runtime.launch_blocking()
    return target


def _best() -> str:
    import mindspore as ms

    return "Ascend" if ms.hal.is_available("Ascend") else "CPU"
