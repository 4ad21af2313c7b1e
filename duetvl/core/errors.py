"""The errors a user can meet. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

LONGEST: Final = 2000  # characters of a message: whatever is quoted in it, it can be read on a terminal

# What would break a line, move the cursor or turn the direction of a terminal; and halves of characters.
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str, most: int = LONGEST) -> str:
    """The text with its control characters escaped; where it is longer than `most`, without its middle."""
    ends = text if len(text) <= 2 * most else text[:most] + text[-most:]
    line = _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], ends)
    if len(line) <= most:
        return line
    gap, tail = f" ... ({len(text)} characters) ... ", most // 4
    return line[: most - tail - len(gap)] + gap + line[-tail:]


def shown(value: object, most: int = 80) -> str:
    """A user's value for a message: its `repr` on one line, at most some `most` characters of the value."""
    if not isinstance(value, str | bytes):
        return one_line(_Short.repr(value), 2 * most)
    more = f"... ({len(value)} in all)" if len(value) > most else ""
    return f"{value[:most]!r}{more}"


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, without a full stop; its class where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__


class _Shortened(reprlib.Repr):
    """Looks at the beginning alone of what is large or deep."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"<a number of {x.bit_length()} bits>"


_Short: Final = _Shortened()
_Short.maxlevel, _Short.maxlist, _Short.maxtuple, _Short.maxdict = 4, 8, 8, 8
_Short.maxstring = _Short.maxother = _Short.maxlong = 100


class DuetvlError(Exception):
    """Base of every error that the user can do something about; the command line prints its message alone.

    The message is one line of bounded length, whatever it quotes. `agreed`: all ranks of the run raise it together, so
    that none waits for another; `silent`: another rank shows it to the user.
    """

    agreed = False
    silent = False

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class BackendError(DuetvlError):
    """A backend or device is unknown, not installed, or cannot do what is asked."""


class ConfigError(DuetvlError):
    """A recipe, a model configuration or an argument does not make sense."""


class CheckpointError(DuetvlError):
    """Weights or a training checkpoint are missing, damaged, or belong to another model."""


class DataError(DuetvlError):
    """A record, an image or a sample cannot be used."""


class RankFailed(DuetvlError):
    """Another rank has ended with an error that no user can do anything about."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `"; did you mean 'lr'? (betas, lr, schedule)"`, or all names where none is near."""
    names = sorted(known)
    near = get_close_matches(name[:80], names, n=1, cutoff=0.5)
    listed = ", ".join(names)
    return f"; did you mean {near[0]!r}? ({listed})" if near else f"; there are {listed}"
