"""bfloat16 as uint16 bits, to and from float32."""

from __future__ import annotations

import numpy as np
import pytest

from duetvl.core.half import narrowed, widened

# float32 -> bits of bfloat16, rounded to the nearest; the two ties to the even one.
VALUES = {1.0: 0x3F80, -0.0: 0x8000, 1.00390625: 0x3F80, 1.01171875: 0x3F82, 3.4e38: 0x7F80, np.inf: 0x7F80}


@pytest.mark.parametrize(("value", "bits"), VALUES.items())
def test_rounding(value: float, bits: int) -> None:
    assert narrowed(np.array([value], np.float32), "bfloat16").tolist() == [bits]


def test_every_number_of_16_bits_comes_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    numbers = widened(bits, "bfloat16")
    back = narrowed(numbers, "bfloat16")
    assert np.array_equal(back, np.where(np.isnan(numbers), np.uint16(0x7FC0), bits))


def test_an_array_without_axes_stays_one_and_a_transposed_one_is_laid_out_in_rows() -> None:
    number = widened(np.array(0x3F80, np.uint16), "bfloat16")
    assert isinstance(number, np.ndarray)
    assert (number.shape, float(number)) == ((), 1.0)
    turned = widened(np.arange(6, dtype=np.uint16).reshape(2, 3).T, "bfloat16")
    assert turned.shape == (3, 2)
    assert turned.flags.c_contiguous
