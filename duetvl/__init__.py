"""duetvl: fine-tune and run Qwen2-VL and Qwen2.5-VL on PyTorch and MindSpore from one code base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from duetvl.version import __version__ as __version__

if TYPE_CHECKING:
    from duetvl.api import (
        Batch,
        Callback,
        Completion,
        Delta,
        Engine,
        Generation,
        Model,
        Request,
        Sample,
        Sampling,
        TrainResult,
        load_backend,
        load_model,
        load_processor,
        train,
    )

__all__ = [
    "Batch",
    "Callback",
    "Completion",
    "Delta",
    "Engine",
    "Generation",
    "Model",
    "Request",
    "Sample",
    "Sampling",
    "TrainResult",
    "load_backend",
    "load_model",
    "load_processor",
    "train",
]


def __getattr__(name: str) -> Any:
    """Names of the API are imported on first use: `import duetvl` costs nothing."""
    if name in __all__:
        from duetvl import api

        return getattr(api, name)
    raise AttributeError(f"module 'duetvl' has no attribute {name!r}")
