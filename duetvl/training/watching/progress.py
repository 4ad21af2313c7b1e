"""A run on the terminal: a bar that fits it, or lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import IO, Any, Final

_CLEAR: Final = "\r\x1b[K"  # to the start of the line, and what is on it away
_BETWEEN: Final = 0.1  # seconds between two drawings of the bar
_NARROWEST, _WIDEST = 10, 32  # columns of the bar itself


class Progress:
    """Shows a run: a bar with the time left on a terminal, a plain line every `every` steps elsewhere."""

    def __init__(self, total: int, *, done: int = 0, every: int = 1, unit: str = "step", stream: IO[str] | None = None):
        """`done` steps of `total` are behind. `unit` is what is counted where it is not steps."""
        self.stream = stream or sys.stdout
        self.total, self.every, self.started_at, self.unit = total, every, done, unit
        self._told = done
        self.started = time.monotonic()
        self.lost = 0  # lines that could not be shown
        self._has_bar = _has_room(self.stream)
        self._step, self._numbers = done, list[str]()
        self._drawn = 0.0
        self._draw()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show one step."""
        self._step, self._numbers = row["step"], _in_words(row)
        if self._has_bar:
            if self._step >= self.total or time.monotonic() - self._drawn >= _BETWEEN:
                self._draw()
        elif self._step // self.every > self._told // self.every or self._step == self.total:
            self.say("  ".join((self._count(), *self._numbers, f"left {self._left()}")))
            self._told = self._step

    def say(self, text: str) -> None:
        """Show a line without disturbing the bar. A run does not end because nobody reads it any more."""
        if self._has_bar:
            self._write(f"{_CLEAR}{text}\n")
            self._draw()
        else:
            self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._has_bar:
            self._draw()
            self._write("\n")
            self._has_bar = False

    def _draw(self) -> None:
        if not self._has_bar:
            return
        self._drawn = time.monotonic()
        share = min(1.0, self._step / self.total) if self.total else 1.0
        width = _columns(self.stream) - 1  # terminals break a line that has as many columns as they do
        self._write(_CLEAR + bar_line(width, self._count(), share, self._numbers, self._left()))

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except UnicodeEncodeError:
            self._write(text.encode("ascii", "backslashreplace").decode())
        except BrokenPipeError:  # `duetvl train ... | head`
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the rest of the process
        except OSError:  # `duetvl train ... > file` on a full disk
            self.lost += 1

    def _count(self) -> str:
        return f"{self.unit} {self._step}/{self.total}"

    def _left(self) -> str:
        """The time that the rest takes at the pace so far; nothing before the first step."""
        if self._step <= self.started_at:
            return ""
        per_step = (time.monotonic() - self.started) / (self._step - self.started_at)
        seconds = round(per_step * (self.total - self._step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def bar_line(width: int, count: str, share: float, numbers: Sequence[str], left: str) -> str:
    """A line of at most `width` columns: the count, and as much of the rest as has room.

    First the first of the numbers, then the time left, a bar that is full to a `share`, and the other numbers in their
    order; the bar grows into what remains. It is drawn in ASCII: signs for boxes are one column wide or two, as the
    terminal's language has it.
    """

    def fits(*words: str) -> bool:
        return len("  ".join(words)) <= width

    words = [count, *(text for text in numbers[:1] if fits(count, text))]
    end = next(([text] for text in (f"left {left}", left) if left and fits(*words, text)), [])
    bar = [f"[{' ' * _NARROWEST}]"] if fits(*words, *end, " " * (_NARROWEST + 2)) else []
    more = takewhile(lambda count: fits(*words, *bar, *numbers[1 : 1 + count], *end), range(1, len(numbers)))
    words += numbers[1 : 1 + max(more, default=0)]
    if bar:
        columns = min(width - len("  ".join([*words, *end])) - 4, _WIDEST)  # brackets, and blanks before them
        words.insert(1, f"[{'=' * int(share * columns):{columns}}]")
    return "  ".join([*words, *end])[:width]


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 80


def _has_room(stream: IO[str]) -> bool:
    """Whether a bar would be seen: pseudo-terminals of build machines often have no size."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return True


# What a line shows, in this order: loss with places enough for a small improvement, the rest short.
_FORMS: Final[Mapping[str, Callable[[Any], str]]] = {
    "loss": "loss {:.4f}".format,
    "score": "score {:.1f}%".format,
    "grad_norm": "grad_norm {:.3g}".format,
    "lr": "lr {:.3g}".format,
    "rewards/accuracies": "accuracy {:.0%}".format,
    "rewards/margins": "margin {:.3g}".format,
    "tokens_per_s": "{:.0f} tokens/s".format,
    "mfu": "mfu {:.1%}".format,
    "step_s": "{:.3g} s".format,
    "data_wait": "data wait {:.0%}".format,
    "peak_memory": lambda count: f"{count / 2**30:.2f} GiB",
}


def _in_words(row: Mapping[str, Any]) -> list[str]:
    return [form(row[key]) for key, form in _FORMS.items() if row.get(key) is not None]
