"""Moving torch tensors to and from raw bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from duetvl.backends.torch_npu.ops import DTYPES

PIECE_BYTES = 1 << 22


class TorchCheckpointIO:
    """See core/checkpoint_io.py."""

    def __init__(self, place: torch.device):
        self.place = place

    def load(self, raw: np.ndarray, stored: str, dtype: str) -> torch.Tensor:
        if stored == "bfloat16":
            raw = raw.view(np.int16)  # same bits; torch's uint16 lacks most functions
        result = torch.empty(raw.shape, dtype=DTYPES[dtype], device=self.place)
        for rows in _pieces(raw):
            host = torch.from_numpy(raw[rows].copy())  # torch has no tensors over read-only memory
            result[rows].copy_(host.view(torch.bfloat16) if stored == "bfloat16" else host)
        return result

    def save(self, x: torch.Tensor) -> tuple[np.ndarray, str]:
        host = x.detach().cpu().contiguous()
        if host.dtype == torch.bfloat16:
            return host.view(torch.int16).numpy().view(np.uint16), "bfloat16"
        return host.numpy(), str(host.dtype).removeprefix("torch.")


def _pieces(raw: np.ndarray) -> Iterator[Any]:
    """Indices that cut an array into stretches of rows of a few megabytes."""
    if raw.ndim == 0:
        yield ...
        return
    rows = max(1, PIECE_BYTES // max(1, raw.nbytes // max(1, len(raw))))
    for start in range(0, len(raw), rows):
        yield slice(start, start + rows)
