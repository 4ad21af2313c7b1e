"""Puts the PyTorch backend together for one device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from duetvl.core.backend import Backend, Capabilities
from duetvl.core.errors import BackendError

if TYPE_CHECKING:
    import torch

    from duetvl.backends.torch_npu.ops import TorchOps

DEVICES = ("cpu", "cuda", "npu")


def create(device: str = "auto") -> Backend:
    """The backend on `device`: cpu, cuda, npu, or auto for the first of npu, cuda, cpu that is there."""
    try:
        import torch
    except ImportError as error:
        raise BackendError(f"backend torch_npu needs PyTorch: pip install 'duetvl[torch]' ({error})") from None

    kind, passed_over = _choose(device)
    place = torch.device("cpu") if kind == "cpu" else torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
    return replace(assemble(kind, place), passed_over=passed_over)


def assemble(kind: str, place: torch.device) -> Backend:
    """The backend as it is for devices of a `kind`, with its tensors at `place`.

    The place has that kind, but for tests, which run what is there for Ascend on CPU tensors (tests/npu).
    """
    import torch

    from duetvl.backends.torch_npu.autograd import TorchAutograd
    from duetvl.backends.torch_npu.checkpoint_io import TorchCheckpointIO
    from duetvl.backends.torch_npu.collectives import TorchCollectives
    from duetvl.backends.torch_npu.device import TorchDevice
    from duetvl.backends.torch_npu.kv_cache import TorchKVCache
    from duetvl.backends.torch_npu.optimizer import TorchOptimizer

    autograd = TorchAutograd()
    cache_class: type[TorchKVCache] = TorchKVCache
    optimizer_class: type[TorchOptimizer] = TorchOptimizer
    ops: TorchOps
    if kind == "npu":
        from duetvl.backends.torch_npu.kernels_npu import NpuKVCache, NpuOps, NpuOptimizer

        ops, cache_class, optimizer_class = NpuOps(autograd, place), NpuKVCache, NpuOptimizer
    elif kind == "cuda":
        from duetvl.backends.torch_npu.kernels_cuda import CudaKVCache, CudaOps

        ops, cache_class = CudaOps(autograd, place), CudaKVCache
    else:
        from duetvl.backends.torch_npu.kernels_cpu import CpuOps
        from duetvl.backends.torch_npu.kv_cache_cpu import CpuKVCache

        ops, cache_class = CpuOps(autograd, place), CpuKVCache
    return Backend(
        name="torch_npu",
        ops=ops,
        autograd=autograd,
        collectives=TorchCollectives(ops, place),
        kv_cache=cache_class(ops),
        optimizer=optimizer_class(),
        checkpoint_io=TorchCheckpointIO(place),
        device=TorchDevice(place),
        capabilities=Capabilities(
            framework=f"torch {torch.__version__}", bitwise_repeatable=kind == "cpu", steady_rows=kind == "cpu"
        ),
    )


def _choose(device: str) -> tuple[str, str]:
    """The kind of device; and where `auto` takes the CPU, why not another."""
    import torch

    from duetvl.backends.torch_npu import kernels_npu

    missing: dict[str, Callable[[], str | None]] = {
        "npu": kernels_npu.why_missing,
        "cuda": lambda: None if torch.cuda.is_available() else "torch sees no CUDA device",
        "cpu": lambda: None,
    }
    if device == "auto":
        reasons: list[str] = []
        for kind, why_missing in missing.items():
            if (reason := why_missing()) is None:
                return kind, "; ".join(reasons) if kind == "cpu" else ""
            reasons.append(f"no {'NPU' if kind == 'npu' else 'GPU'} ({reason})")
    if device not in missing:
        raise BackendError(f"backend torch_npu has no device {device!r}; it has {', '.join(DEVICES)} and auto")
    if reason := missing[device]():
        raise BackendError(f"device {device!r} is not available: {reason}; see `duetvl doctor`")
    return device, ""
