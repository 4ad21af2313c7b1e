"""What `duetvl check` draws of a pipeline: every pass at its time, in text of 80 columns and as a picture."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from duetvl.parallel.schedule import Compute, one_f_one_b
from duetvl.training.drawn_schedule import cells, draw, schedule_lines


def test_a_pipeline_in_text():
    assert list(schedule_lines(3, 1, 3)) == [
        "schedule: 3 ranks, 3 micro-batches: bubble 66.7 %, formula 66.7 %",
        "  rank 0  F0 F1 F2 .  .  .  .  B0--- .  B1--- .  B2---",
        "  rank 1  .  F0 F1 .  .  B0--- F2 B1--- .  B2--- .  .",
        "  rank 2  .  .  F0 B0--- F1 B1--- F2 B2--- .  .  .  .",
    ]


def test_virtual_stages_have_letters():
    heading, *ranks = schedule_lines(2, 2, 2)
    assert heading == "schedule: 2 ranks x 2 virtual stages, 2 micro-batches: bubble 25.0 %, formula 25.0 %"
    assert ranks[1].startswith("  rank 1  .   F0a F1a F0b B0b---- F1b B1b---- B0a")


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 16), (4, 3, 12), (11, 2, 5), (2, 30, 2)], ids=str)
def test_the_text_says_what_the_schedule_says(shape):
    """Read back: each pass begins in the column of its time, and the cut line is the beginning of the whole."""
    ranks, virtual, _ = shape
    schedule = one_f_one_b(*shape)
    whole = list(cells(schedule, virtual, columns=10**6))
    width = 1 + max(len(name) for line in whole for name in re.findall(r"[FB]\d+[a-z]*", line))
    for rank, line in enumerate(whole):
        first = line.index("rank") + len(f"rank {ranks - 1}  ")
        found = []
        for cell in re.finditer(r"([FB])(\d+)([a-z]*)", line):
            assert (cell.start() - first) % width == 0
            chunk = 0
            for letter in cell[3]:
                chunk = 26 * chunk + ord(letter) - ord("a") + 1
            stage = max(0, chunk - 1) * ranks + rank
            direction = "forward" if cell[1] == "F" else "backward"
            found.append((Compute(direction, stage, int(cell[2])), (cell.start() - first) // width))
        assert found == [(one.compute, one.start) for one in schedule.timed(rank)]
    for line, cut in zip(whole, cells(schedule, virtual), strict=True):
        assert len(cut) <= 80
        assert cut == line or (cut.endswith(" ...") and line.startswith(cut.removesuffix(" ...")))


def test_passes_of_a_rank_do_not_overlap_and_fill_the_step():
    schedule = one_f_one_b(4, 2, 8)
    timed = [schedule.timed(rank) for rank in range(4)]
    assert all(a.stop <= b.start for passes in timed for a, b in pairwise(passes))
    assert max(passes[-1].stop for passes in timed) == schedule.length


def test_the_picture_has_a_bar_for_each_rank(tmp_path):
    """Forward passes are blue, backward passes orange, and rank 2 of 3 begins later than rank 0."""
    draw(3, 2, 6, tmp_path / "schedule.png")
    pixels = np.asarray(Image.open(tmp_path / "schedule.png").convert("RGB")).astype(int)
    blue = (pixels[:, :, 2] - pixels[:, :, 0]) > 60
    orange = (pixels[:, :, 0] - pixels[:, :, 2]) > 60
    rows = np.flatnonzero(blue.any(1) & orange.any(1))
    bars = np.split(rows, np.flatnonzero(np.diff(rows) > 5) + 1)
    assert len(bars) == 3
    begins = [np.flatnonzero(blue[bar].any(0))[0] for bar in bars]
    assert begins[0] < begins[1] < begins[2]
