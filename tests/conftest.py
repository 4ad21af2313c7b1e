"""What all tests share."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from duetvl.core.backend import Backend, load_backend

FRAMEWORKS = {"torch_npu": "torch", "mindspore": "mindspore"}


@pytest.fixture(scope="session", params=list(FRAMEWORKS))
def be(request: pytest.FixtureRequest) -> Backend:
    """Each backend that is installed, on the CPU."""
    if find_spec(FRAMEWORKS[request.param]) is None:
        pytest.skip(f"{FRAMEWORKS[request.param]} is not installed")
    return load_backend(request.param, device="cpu")
