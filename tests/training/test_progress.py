"""A run on the terminal: lines, or a bar that fits it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from contextlib import suppress
from functools import partial

import pytest
from test_metrics import row

from duetvl.training.watching.progress import Progress, bar_line


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    progress = Progress(10, every=5, stream=out)
    for step in range(1, 11):
        progress.step(row(step, loss=1 / step))
    progress.say("saved")
    progress.close()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 5/10  loss 0.2000  grad_norm 2  lr 0.1  1234 tokens/s  left 0:00:0")
    assert lines[1].startswith("step 10/10  loss 0.1000")
    assert lines[2] == "saved"


def test_lines_of_what_is_counted_by_more_than_one():
    out = io.StringIO()
    progress = Progress(20, every=10, unit="reference: pair", stream=out)
    for step in (7, 14, 19, 20):
        progress.step({"step": step})
    lines = out.getvalue().splitlines()
    assert [line.partition("  left ")[0] for line in lines] == ["reference: pair 14/20", "reference: pair 20/20"]


class Terminal:
    """A pseudo-terminal of so many columns, and what a screen of that size shows of what is written to it."""

    def __init__(self, columns: int):
        self.columns = columns
        self.reader, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115  # closed by `screen`

    def screen(self) -> list[str]:
        """The lines, once nothing more is written: one that is longer than the terminal is broken, as there."""
        self.stream.close()
        written = b""
        with suppress(OSError):  # the other end is closed
            while part := os.read(self.reader, 1 << 16):
                written += part
        os.close(self.reader)
        lines, at = [""], 0
        for sign in written.decode().replace("\x1b[K", "\0"):
            if sign == "\r":
                at = 0
            elif sign == "\n":
                lines, at = [*lines, ""], 0
            elif sign == "\0":
                lines[-1] = lines[-1][:at]
            else:
                if at == self.columns:
                    lines, at = [*lines, ""], 0
                lines[-1] = lines[-1][:at] + sign + lines[-1][at + 1 :]
                at += 1
        return lines


@pytest.mark.parametrize("columns", [80, 40, 20])
def test_a_bar_fits_its_terminal(columns):
    terminal = Terminal(columns)
    progress = Progress(4000, done=100, stream=terminal.stream)
    for step in (101, 102, 103):
        progress.step(row(step, loss=1.5) | {"step_s": 12.3, "data_wait": 0.5, "peak_memory": 2**36, "mfu": 0.4})
    progress.say("saved")
    progress.step(row(4000, loss=1.25) | {"step_s": 12.3, "data_wait": 0.5})
    progress.close()
    said, bar, rest = terminal.screen()
    assert (said, rest) == ("saved", "") and bar.startswith("step 4000/4000") and len(bar) < columns
    if columns >= 40:
        assert "loss 1.2500" in bar and bar.endswith("0:00:00")
    if columns >= 80:
        assert "[==========" in bar or "grad_norm" in bar


def test_what_a_line_has_room_for():
    numbers = ["loss 1.2345", "grad_norm 0.5", "lr 1e-05"]
    line = partial(bar_line, count="step 120/4000", share=0.5, numbers=numbers, left="0:12:33")
    assert line(39) == "step 120/4000  loss 1.2345  0:12:33"
    assert line(40) == "step 120/4000  loss 1.2345  left 0:12:33"
    assert line(79) == "step 120/4000  [=====     ]  loss 1.2345  grad_norm 0.5  lr 1e-05  left 0:12:33"
    assert line(20) == "step 120/4000" and line(5) == "step "
    assert all(len(line(width)) <= width for width in range(1, 120))


def test_a_line_that_the_terminal_cannot_encode_is_shown_all_the_same():
    raw = io.BytesIO()
    progress = Progress(1, stream=io.TextIOWrapper(raw, encoding="ascii"))
    progress.say("saved 运行")
    assert raw.getvalue() == b"saved \\u8fd0\\u884c\n"
