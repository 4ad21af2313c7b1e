"""Moving torch tensors to and from raw bytes."""

from __future__ import annotations

import numpy as np
import torch

from duetvl.backends.torch_npu.ops import DTYPES


class TorchCheckpointIO:
    """See core/checkpoint_io.py."""

    def __init__(self, place: torch.device):
        self.place = place

    def load(self, raw: np.ndarray, stored: str, dtype: str) -> torch.Tensor:
        if not raw.flags.writeable:
            raw = raw.copy()  # torch warns about tensors over read-only memory
        if stored == "bfloat16":
            raw = raw.view(np.int16)  # same bits; torch's uint16 lacks most functions
        host = torch.from_numpy(raw)
        host = host.view(torch.bfloat16) if stored == "bfloat16" else host
        return host.to(self.place, DTYPES[dtype], copy=True, memory_format=torch.contiguous_format)

    def save(self, x: torch.Tensor) -> tuple[np.ndarray, str]:
        host = x.detach().cpu().contiguous()
        if host.dtype == torch.bfloat16:
            return host.view(torch.int16).numpy().view(np.uint16), "bfloat16"
        return host.numpy(), str(host.dtype).removeprefix("torch.")
