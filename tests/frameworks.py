"""The backends that come with the package, and the framework that each needs."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

FRAMEWORKS = {"torch_npu": "torch", "mindspore": "mindspore"}


def need(*backends: str) -> None:
    """Skip the test unless the frameworks of these backends are installed."""
    for name in backends:
        if find_spec(FRAMEWORKS[name]) is None:
            pytest.skip(f"{FRAMEWORKS[name]} is not installed")


def need_one() -> None:
    """Skip the test unless a framework is installed, whichever."""
    if not any(map(find_spec, FRAMEWORKS.values())):
        pytest.skip(f"none of {', '.join(FRAMEWORKS.values())} is installed")
