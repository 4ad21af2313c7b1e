"""Backends for Ascend with their tensors on the CPU, and references as kernels: registered as `entry_point` says.

Whatever takes the name of a backend then runs them: recipes, commands, processes of torchrun.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from duetvl.core.backend import ENTRY_POINTS, Backend

TESTS = Path(__file__).parents[1]


def torch_backend(device: str = "auto") -> Backend:
    """What `load_backend("torch_npu", "npu")` gives on a machine with a card, but for the place of tensors."""
    import torch

    from duetvl.backends.torch_npu.backend import assemble

    from .references import registered
    from .schemas import TORCH_NPU

    registered(TORCH_NPU)
    return assemble("npu", torch.device("cpu"))


def entry_point(directory: Path, factories: Mapping[str, str]) -> Path:
    """A directory for the path of Python with an installed package that registers `factories` of this module."""
    info = directory / "ascend_on_cpu-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ascend-on-cpu\nVersion: 0\n")
    lines = "".join(f"{name} = npu.on_cpu:{factory}\n" for name, factory in factories.items())
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}")
    return directory
