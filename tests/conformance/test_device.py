"""The device under a backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from frameworks import need

from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import BackendError


def test_device_answers(be: Backend) -> None:
    device = be.device
    assert device.name == "cpu"
    assert 0 < device.peak_memory() < device.total_memory()
    assert 0 < device.free_memory() < device.total_memory()
    device.synchronize()
    assert all(device.supports(dtype) for dtype in ("float32", "bfloat16", "float16"))
    assert not device.supports("float64")


def test_profile_writes_a_trace(be: Backend, tmp_path: Path) -> None:
    with be.device.profile(tmp_path):
        be.ops.exp(be.ops.zeros((4,)))
    assert any(path.stat().st_size for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["torch_npu", "mindspore"])
def test_unknown_device_is_refused_with_the_known_ones(name: str) -> None:
    need(name)
    with pytest.raises(BackendError, match=r"no device 'tpu'; it has cpu, .* and auto"):
        load_backend(name, device="tpu")
