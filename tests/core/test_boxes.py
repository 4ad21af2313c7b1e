"""Parts of tensors: rows of slices that are stacked from several boxes."""

from __future__ import annotations

import numpy as np
import pytest

from duetvl.core.boxes import Box, LocalPart, Slices


def taken(array: np.ndarray, part: LocalPart) -> np.ndarray:
    return np.concatenate([array[box.slices] for box in part.slices.boxes], part.slices.axis)


WHOLE = np.arange(60).reshape(12, 5)
PARTS = {
    "all": LocalPart.all_of((12, 5)),
    "stacked": LocalPart((12, 5), Slices((Box((1, 0), (3, 5)), Box((5, 0), (0, 5)), Box((7, 0), (4, 5))))),
    "columns": LocalPart((12, 5), Slices((Box((0, 1), (12, 2)),), 1)),
}


@pytest.mark.parametrize("name", list(PARTS))
def test_rows_of_a_part_are_the_rows_of_what_is_held(name: str) -> None:
    part = PARTS[name]
    held = taken(WHOLE, part)
    assert part.shape == held.shape
    for start in range(len(held) + 1):
        for stop in range(start, len(held) + 1):
            rows = part.rows(start, stop)
            assert rows.whole == (12, 5)
            assert rows.shape == held[start:stop].shape
            np.testing.assert_array_equal(taken(WHOLE, rows), held[start:stop])
