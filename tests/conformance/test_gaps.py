"""What is declared missing does raise, and docs/backends.md says the same.

Renew the document's table with `DUETVL_WRITE_DOCS=1 pytest tests/conformance/test_gaps.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import BackendError
from duetvl.core.unsupported import declared_gaps, gaps_table, unsupported

from .test_signatures import PROTOCOLS

DOCUMENT = Path(__file__).parents[2] / "docs" / "backends.md"
BEGIN, END = "<!-- gaps: written by tests/conformance/test_gaps.py -->\n", "\n<!-- end -->"


class Lacking:
    attention = unsupported("waits for a kernel")

    def silu(self) -> int:
        return 1


def test_a_declared_gap_raises_with_its_reason() -> None:
    assert declared_gaps(Lacking) == {"attention": "waits for a kernel"}
    with pytest.raises(BackendError, match="Lacking has no attention: waits for a kernel"):
        Lacking().attention(1, 2, spans=3)
    assert Lacking().silu() == 1


@pytest.mark.parametrize("part", PROTOCOLS)
def test_every_gap_of_a_backend_raises(be: Backend, part: str) -> None:
    """A gap that has begun to work is no gap: the declaration must go."""
    implementation = getattr(be, part)
    for name in declared_gaps(type(implementation)):
        assert name in vars(PROTOCOLS[part]), f"{name} is no operation of {part}"
        with pytest.raises(BackendError):
            getattr(implementation, name)()


def test_storage_only_dtypes_are_stored(be: Backend) -> None:
    for dtype in be.capabilities.storage_only:
        assert be.device.supports(dtype)
        x = be.ops.from_numpy(np.array([1.0, 2.5], np.float32), dtype)
        assert be.to_numpy(x).tolist() == [1.0, 2.5]


def current_table() -> str:
    from duetvl.backends.mindspore.kernels_ascend import AscendKVCache, AscendOps
    from duetvl.backends.torch_npu.kernels_cuda import CudaKVCache, CudaOps
    from duetvl.backends.torch_npu.kernels_npu import NpuKVCache, NpuOps, NpuOptimizer

    torch_cpu, mindspore_cpu = (load_backend(name, device="cpu") for name in ("torch_npu", "mindspore"))
    parts = {be.name: [type(getattr(be, part)) for part in PROTOCOLS] for be in (torch_cpu, mindspore_cpu)}
    return gaps_table(
        {
            ("torch_npu", "cpu"): (torch_cpu.capabilities.storage_only, parts["torch_npu"]),
            ("torch_npu", "cuda"): ((), [CudaOps, CudaKVCache]),
            ("torch_npu", "npu"): ((), [NpuOps, NpuKVCache, NpuOptimizer]),
            ("mindspore", "cpu"): (mindspore_cpu.capabilities.storage_only, parts["mindspore"]),
            ("mindspore", "ascend"): ((), [AscendOps, AscendKVCache]),
        }
    )


def test_document_has_the_current_table() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mindspore")
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    written, _, tail = rest.partition(END)
    if os.environ.get("DUETVL_WRITE_DOCS"):
        DOCUMENT.write_text(head + BEGIN + current_table() + END + tail)
    else:
        assert written == current_table(), f"{DOCUMENT.name} is behind the code; see the top of this file"
