"""The PyTorch backend: cpu, cuda, or Ascend npu through torch_npu."""

from __future__ import annotations

from duetvl.backends.torch_npu.backend import create

__all__ = ["create"]
