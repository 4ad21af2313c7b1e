"""Moving MindSpore tensors to and from raw bytes."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.common.np_dtype import bfloat16

from duetvl.backends.mindspore.ops import DTYPES
from duetvl.core.half import widened


class MindSporeCheckpointIO:
    """See core/checkpoint_io.py. Casts are made by numpy, as MindSpore's memory pool never shrinks."""

    def load(self, raw: np.ndarray, stored: str, dtype: str) -> ms.Tensor:
        if (stored, dtype) == ("bfloat16", "float32"):  # by bits: thirty times as fast as numpy's conversion
            return ms.Tensor.from_numpy(widened(raw, stored))
        values = raw.view(bfloat16) if stored == "bfloat16" else raw
        wanted = bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        with np.errstate(over="ignore"):  # beyond float16's range is infinity
            return ms.Tensor.from_numpy(np.array(values, dtype=wanted, order="C", copy=True))

    def save(self, x: ms.Tensor) -> tuple[np.ndarray, str]:
        names = {value: name for name, value in DTYPES.items()}
        raw = np.ascontiguousarray(ops.stop_gradient(x).asnumpy()).reshape(x.shape)
        return (raw.view(np.uint16) if x.dtype == ms.bfloat16 else raw), names[x.dtype]
