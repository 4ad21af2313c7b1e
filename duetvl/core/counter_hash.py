"""Random bits of dropout and rounding: a hash of what they are for, in integers alone, so the same wherever computed.

All words have 32 bits and wrap around. `mix` is Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/):

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

The key is folded into two words, lane 1 and lane 2, 64 bits of each integer at a time:

    fold(lane):  s = 0;  for n in (lane, *key):  for word in (low half of n, high half of n):
                     s = mix((s + 0x9e3779b9) ^ word)

A row of the tensor has two words `a = mix(fold(1) ^ row)` and `b = mix(fold(2) ^ row)`, and an element of it the bits

    x = column ^ a;  x ^= x >> 16;  x = x * 0x7feb352d + b;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

Dropout keeps it where x, read as a signed integer, is at least round(p * 2**32) - 2**31. Rounding to bfloat16 adds the
low 16 bits of x to those of the number, and cuts these off. Row and column are those of the whole tensor, of which a
process may hold a part. All axes but the last count as one; for rounding, a vector is a column.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import LocalPart

Tensor = Any

FIRST: Final = 0x7FEB352D
SECOND: Final = 0x846CA68B - (1 << 32)  # as a signed number
GOLDEN: Final = 0x9E3779B9
WORD: Final = (1 << 32) - 1


def kept(
    shape: Sequence[int],
    p: float,
    key: Sequence[int],
    rows: np.ndarray,
    column: int = 0,
    place: Callable[[np.ndarray], Tensor] = lambda array: array,
    shift: Callable[[Tensor, int], Tensor] = operator.rshift,
) -> Tensor:
    """Which elements of a tensor of this shape, (..., D), dropout keeps: bools of that shape. See `bits`."""
    least = min(round(p * 2**32), WORD) - 2**31
    return (bits(shape[-1], key, rows, column, place, shift) >= least).reshape(tuple(shape))


def rounding_bits(shape: Sequence[int], path: str, step: int, part: LocalPart | None = None, **device: Any) -> Tensor:
    """What rounding adds to the numbers of a parameter in its `step`: int32 of this shape, 0 to 2**16 - 1.

    `part` says what the parameter is of the whole tensor, stacked on its first axis; None: all of it.
    `device` are the last two arguments of `bits`.
    """
    columns = shape[-1] if len(shape) > 1 else 1
    rows, column = places(shape, part)
    noise = bits(columns, (zlib.crc32(path.encode()), step), rows, column, **device)
    noise &= (1 << 16) - 1
    return noise.reshape(tuple(shape))


def places(shape: Sequence[int], part: LocalPart | None) -> tuple[np.ndarray, int]:
    """The row in the whole tensor of each row of a part of it, and the column of the part's first."""
    flat = len(shape) < 2
    if part is None:
        return np.arange(math.prod(shape if flat else shape[:-1])), 0
    inner = math.prod(shape[1:-1])  # rows for each index of the first axis
    boxes = part.slices.boxes
    starts = [(box.offset[0] * inner, box.shape[0] * inner) for box in boxes]
    column = 0 if flat else boxes[0].offset[-1]
    return np.concatenate([np.arange(first, first + count) for first, count in starts]), column


def bits(
    columns: int,
    key: Sequence[int],
    rows: np.ndarray,
    column: int = 0,
    place: Callable[[np.ndarray], Tensor] = lambda array: array,
    shift: Callable[[Tensor, int], Tensor] = operator.rshift,
) -> Tensor:
    """The bits x of `columns` columns, from `column` on, of the rows (N,) of a tensor: (N, columns) signed words.

    `place` makes a tensor of an int32 array, where the element's part is then computed with the tensor's own
    `^ & * +`, which must wrap around, and `shift(x, n)`, which copies the sign.
    """

    def stir(x: Tensor, by: int) -> Tensor:
        high = shift(x, by)
        high &= (1 << 32 - by) - 1  # zeros come in
        x ^= high
        return x

    # In place where tensors can, which makes it four times as fast; where they cannot, the names get new tensors.
    row = np.asarray(rows).astype(np.uint32)
    a, b = (place(_mixed(np.uint32(fold(lane, key)) ^ row).view(np.int32).reshape(-1, 1)) for lane in (1, 2))
    x = place(np.arange(column, column + columns).astype(np.uint32).view(np.int32).reshape(1, -1)) ^ a
    x = stir(x, 16)
    x *= FIRST
    x += b
    x = stir(x, 15)
    x *= SECOND
    return stir(x, 16)


def fold(lane: int, key: Sequence[int]) -> int:
    """One word for a whole key."""
    state = 0
    for number in (lane, *key):
        for word in (number & WORD, number >> 32 & WORD):
            state = mix((state + GOLDEN & WORD) ^ word)
    return state


def mix(x: int) -> int:
    """One word of another, in Python's integers: numpy takes ten times as long for a single number."""
    x = (x ^ x >> 16) * FIRST & WORD
    x = (x ^ x >> 15) * SECOND & WORD
    return x ^ x >> 16


def _mixed(x: np.ndarray) -> np.ndarray:
    """`mix` of many."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(FIRST)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(SECOND & WORD)
    return x ^ (x >> np.uint32(16))
