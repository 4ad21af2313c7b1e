"""The backends that come with the package, and the framework that each needs."""

from __future__ import annotations

FRAMEWORKS = {"torch_npu": "torch", "mindspore": "mindspore"}
