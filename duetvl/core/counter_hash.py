"""The random bits of dropout: a hash of what they are for, in integers alone, so the same wherever it is computed.

All words have 32 bits and wrap around. `mix` is Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/):

    mix(x):  x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

The key is folded into two words, lane 1 and lane 2, 64 bits of each integer at a time:

    fold(lane):  s = 0;  for n in (lane, *key):  for word in (low half of n, high half of n):
                     s = mix((s + 0x9e3779b9) ^ word)

A row of the tensor has two words `a = mix(fold(1) ^ row)` and `b = mix(fold(2) ^ row)`, and an element of it the bits

    x = column ^ a;  x ^= x >> 16;  x = x * 0x7feb352d + b;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

It is kept where x, read as a signed integer, is at least round(p * 2**32) - 2**31. Row and column are those of the
whole tensor, of which a process may hold a part.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

Tensor = Any

FIRST: Final = 0x7FEB352D
SECOND: Final = 0x846CA68B - (1 << 32)  # as a signed number
GOLDEN: Final = 0x9E3779B9
WORD: Final = (1 << 32) - 1


def kept(
    shape: Sequence[int],
    p: float,
    key: Sequence[int],
    origin: tuple[int, int],
    place: Callable[[np.ndarray], Tensor] = lambda array: array,
    shift: Callable[[Tensor, int], Tensor] = operator.rshift,
) -> Tensor:
    """Which elements of a tensor of this shape, (..., D), dropout keeps: bools of that shape.

    `origin` is the row and column of its first element; its leading axes count as one. `place` makes a tensor of an
    int32 array, where the element's part is then computed with the tensor's own `^ & * +`, which must wrap around, and
    `shift(x, n)`, which copies the sign.
    """

    def stir(x: Tensor, bits: int) -> Tensor:
        high = shift(x, bits)
        high &= (1 << 32 - bits) - 1  # zeros come in
        x ^= high
        return x

    # In place where tensors can, which makes it four times as fast; where they cannot, the names get new tensors.
    rows, columns = math.prod(shape[:-1]), shape[-1]
    row = np.arange(origin[0], origin[0] + rows).astype(np.uint32)
    a, b = (place(_mixed(np.uint32(fold(lane, key)) ^ row).view(np.int32).reshape(-1, 1)) for lane in (1, 2))
    x = place(np.arange(origin[1], origin[1] + columns).astype(np.uint32).view(np.int32).reshape(1, -1)) ^ a
    x = stir(x, 16)
    x *= FIRST
    x += b
    x = stir(x, 15)
    x *= SECOND
    x = stir(x, 16)
    least = min(round(p * 2**32), WORD) - 2**31
    return (x >= least).reshape(tuple(shape))


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
