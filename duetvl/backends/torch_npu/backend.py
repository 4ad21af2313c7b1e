"""Puts the PyTorch backend together for one device."""

from __future__ import annotations

import importlib.util
import os

from duetvl.core.backend import Backend, Capabilities
from duetvl.core.errors import BackendError

DEVICES = ("cpu", "cuda", "npu")


def create(device: str = "auto") -> Backend:
    """The backend on `device`: cpu, cuda, npu, or auto for the first of npu, cuda, cpu that is there."""
    try:
        import torch
    except ImportError as error:
        raise BackendError(f"backend torch_npu needs PyTorch: pip install 'duetvl[torch]' ({error})") from None
    from duetvl.backends.torch_npu.autograd import TorchAutograd
    from duetvl.backends.torch_npu.checkpoint_io import TorchCheckpointIO
    from duetvl.backends.torch_npu.collectives import TorchCollectives
    from duetvl.backends.torch_npu.device import TorchDevice
    from duetvl.backends.torch_npu.kv_cache import TorchKVCache
    from duetvl.backends.torch_npu.ops import TorchOps
    from duetvl.backends.torch_npu.optimizer import TorchOptimizer

    kind = _choose(device)
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind != "cpu" else torch.device("cpu")
    ops_class = TorchOps
    if kind == "npu":
        from duetvl.backends.torch_npu.kernels_npu import NpuOps

        ops_class = NpuOps
    autograd = TorchAutograd()
    ops = ops_class(autograd, place)
    return Backend(
        name="torch_npu",
        ops=ops,
        autograd=autograd,
        collectives=TorchCollectives(ops, place),
        kv_cache=TorchKVCache(ops),
        optimizer=TorchOptimizer(),
        checkpoint_io=TorchCheckpointIO(place),
        device=TorchDevice(place),
        capabilities=Capabilities(framework=f"torch {torch.__version__}", bitwise_repeatable=kind == "cpu"),
    )


def _choose(device: str) -> str:
    import torch

    available = {
        "npu": lambda: importlib.util.find_spec("torch_npu") is not None and torch.npu.is_available(),
        "cuda": torch.cuda.is_available,
        "cpu": lambda: True,
    }
    if device == "auto":
        return next(kind for kind, there in available.items() if there())
    if device not in available:
        raise BackendError(f"backend torch_npu has no device {device!r}; it has {', '.join(DEVICES)} and auto")
    if not available[device]():
        raise BackendError(f"device {device!r} is not available to torch {torch.__version__} here; see `duetvl doctor`")
    return device
