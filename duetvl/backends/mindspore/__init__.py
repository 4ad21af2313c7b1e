"""The MindSpore backend: cpu or ascend."""

from __future__ import annotations

from duetvl.backends.mindspore.backend import create

__all__ = ["create"]
