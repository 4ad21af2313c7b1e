"""The npu operators for these tests, on CPU: under torch_npu's own schemas if DUETVL_REAL_TORCH_NPU is set."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="package")
def operators() -> Any:
    """torch.ops.npu."""
    from .references import registered
    from .schemas import TORCH_NPU

    return registered(TORCH_NPU)


@pytest.fixture(scope="package")
def ops(operators: Any) -> Any:
    """NpuOps on CPU tensors."""
    import torch

    from duetvl.backends.torch_npu.autograd import TorchAutograd
    from duetvl.backends.torch_npu.kernels_npu import NpuOps

    return NpuOps(TorchAutograd(), torch.device("cpu"))
