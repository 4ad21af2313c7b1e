"""Backends for Ascend with their tensors on the CPU, and references as kernels: registered as `entry_point` says.

Whatever takes the name of a backend then runs them: recipes, commands, processes of torchrun.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from duetvl.core.backend import ENTRY_POINTS, Backend, load_backend

TESTS = Path(__file__).parents[1]


def torch_backend(device: str = "auto") -> Backend:
    """What `load_backend("torch_npu", "npu")` gives on a machine with a card, but for the place of tensors."""
    import torch

    from duetvl.backends.torch_npu.backend import assemble

    from .references import registered
    from .schemas import TORCH_NPU

    registered(TORCH_NPU)
    return assemble("npu", torch.device("cpu"))


@contextmanager
def optimizer_of_torch_npu() -> Iterator[None]:
    """Let torch's fused AdamW take `grad_scale` and `found_inf` and use neither, as torch_npu's kernel for it does."""
    import torch

    plain = torch._fused_adamw_

    def fused(*lists: Any, grad_scale: Any, found_inf: Any, **options: Any) -> None:
        plain(*lists, **options)

    torch._fused_adamw_ = fused
    try:
        yield
    finally:
        torch._fused_adamw_ = plain


def mindspore_backend(device: str = "auto") -> Backend:
    """The same of MindSpore; `mindspore_references.stand_in` puts references in the kernels' places."""
    from duetvl.backends.mindspore.backend import assemble

    load_backend("mindspore", "cpu")  # the process's device
    return assemble("Ascend", "CPU")


def mindspore_inherited(device: str = "auto") -> Backend:
    """MindSpore without a kernel of ours on CPU: the framework's own functions, which Ascend inherits too."""
    from duetvl.backends.mindspore.ops import MindSporeOps
    from duetvl.backends.mindspore.optimizer import MindSporeOptimizer
    from duetvl.core.composed import ComposedKVCache

    backend = mindspore_backend()
    ops = MindSporeOps(backend.autograd)
    return replace(backend, ops=ops, kv_cache=ComposedKVCache(ops), optimizer=MindSporeOptimizer(ops))


def entry_point(directory: Path, factories: Mapping[str, str]) -> Path:
    """A directory for the path of Python with an installed package that registers `factories` of this module."""
    info = directory / "ascend_on_cpu-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ascend-on-cpu\nVersion: 0\n")
    lines = "".join(f"{name} = npu.on_cpu:{factory}\n" for name, factory in factories.items())
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}")
    return directory
