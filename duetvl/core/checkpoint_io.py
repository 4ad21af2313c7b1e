"""Protocol of moving tensors between the device and raw bytes; the file format itself is above the seam."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Tensor = Any


class CheckpointIO(Protocol):
    """Raw arrays have the dtypes that safetensors stores; bfloat16, which numpy lacks, travels as uint16 bits."""

    def load(self, raw: np.ndarray, stored: str, dtype: str) -> Tensor:
        """A new tensor on the device with the values of `raw`, whose dtype is named `stored`, cast to `dtype`.

        `raw` may be a mapped, read-only, strided slice of a file. Beyond the result, at most a few megabytes of
        host memory are used. The cast rounds to nearest even.
        """
        ...

    def save(self, x: Tensor) -> tuple[np.ndarray, str]:
        """The tensor's bits on the host as a contiguous array, and the name of their dtype. May share memory."""
        ...
