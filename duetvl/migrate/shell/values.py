"""Values of which something may not be known.

What only running the script would tell is marked in the text: `\\0`, the reason with `\\1` for its blanks, `\\0`. So a
mark keeps its place when a value is put into another and split again. `END` stands between the words that a text
becomes, and `QUOTED` for quotes: there is a word, though it may be empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

END: Final = "\x1f"
QUOTED: Final = "\x02"
SIGNS: Final = "\0\1" + QUOTED + END  # no script has these

_MARK: Final = re.compile("\0[^\0]*\0")


@dataclass(frozen=True)
class Text:
    """A word after expansion; `missing` says what of it cannot be known without running the script."""

    text: str
    missing: str = ""

    @classmethod
    def of(cls, value: str) -> Text:
        """From a value with marks in it."""
        return cls(_MARK.sub("", value), missing(value))


def mark(reason: str) -> str:
    """What stands for a value that is not known."""
    return "\0" + "\1".join(reason.split()) + "\0"


def missing(value: str) -> str:
    """The first reason why a value is not known, or nothing."""
    found = _MARK.search(value)
    return found[0].strip("\0").replace("\1", " ") if found else ""


def unset(name: str) -> str:
    """The mark of a variable that the script does not set."""
    return mark(f"{name} is not set in the script")


def short(text: str, most: int = 90) -> str:
    """A text for a message: one line of bounded length."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
