"""float32 and the narrower dtypes of files, in numpy, which has no bfloat16: here that is uint16 bits."""

from __future__ import annotations

import numpy as np


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values of an array of this dtype's bits, as float32; of bfloat16 always a new array in C order."""
    if dtype == "bfloat16":
        wide = np.left_shift(bits, 16, dtype=np.uint32, order="C")
        return np.asarray(wide).view(np.float32)  # numpy makes a scalar of an array without axes
    return bits.astype(np.float32, copy=False)


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as bits of this dtype, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):  # beyond float16's range is infinity, as everywhere else
            return values.astype(dtype, copy=False)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)
