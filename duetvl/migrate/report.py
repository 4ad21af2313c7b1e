"""What is taken from another tool's files and what is not, key by key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from textwrap import wrap
from typing import Any, Literal

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.values import short
from duetvl.migrate.tables import Table
from duetvl.training.recipe.text import show

Kind = Literal["used", "changed", "added", "assumed", "not needed", "contradiction", "unknown"]
TITLES: dict[Kind, str] = {
    "used": "used",
    "changed": "used, with another meaning",
    "added": "added, and in none of the files",
    "assumed": "not given, and taken as the script has it then",
    "contradiction": "does not fit together",
    "unknown": "not known, and left out",
    "not needed": "not needed",
}


@dataclass(frozen=True)
class Note:
    """One line of the report: a key as it stood there, and what became of it."""

    kind: Kind
    key: str
    text: str


@dataclass
class Report:
    """The notes of an import, in the order in which they were made. `allow_unknown`: what is lacking is noted."""

    allow_unknown: bool = False
    notes: list[Note] = field(default_factory=list)

    def add(self, kind: Kind, key: str, text: str) -> None:
        """Note one thing."""
        self.notes.append(Note(kind, short(key, 300), short(text, 600)))

    def lacks(self, title: str, key: str, reason: str) -> None:
        """Note what is asked for and not there. Raises ConfigError, unless the user goes on without it."""
        if not self.allow_unknown:
            raise ConfigError(f"{title}: {short(key)}{reason}; --allow-unknown ignores it")
        self.add("unknown", key, reason.lstrip(": ;"))

    def mentions(self, key: str) -> bool:
        """Whether a note is about a key, which may be named by its last part."""
        names = {name for note in self.notes for name in note.key.split(", ")}
        return key in names or key.rpartition(".")[2] in names

    def lines(self) -> Iterator[str]:
        """The report, kind by kind."""
        for kind, title in TITLES.items():
            chosen = [note for note in self.notes if note.kind == kind]
            if not chosen:
                continue
            yield f"{title}:"
            if kind == "not needed":
                yield from _by_reason(chosen)
            else:
                width = min(44, max(len(note.key) for note in chosen))
                yield from (f"  {note.key:<{width}}  {note.text}" for note in chosen)


def _by_reason(notes: list[Note]) -> Iterator[str]:
    """Keys that are not needed for one reason, together."""
    keys: dict[str, list[str]] = {}
    for note in notes:
        keys.setdefault(note.text, []).append(note.key)
    for reason, names in keys.items():
        yield f"  {reason}:"
        yield from wrap(", ".join(names), 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


class Values:
    """The values of one input by key, and which of them have been asked for."""

    def __init__(self, table: Table, values: Mapping[str, Any], report: Report) -> None:
        self.table, self._values, self.report = table, values, report
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """A value, `default` where it is not given; it counts as read."""
        assert key in self.table.used, f"{key} is not in the table of {self.table.title}"
        self._asked.add(key)
        return self._values.get(key, default)

    def peek(self, key: str) -> Any:
        """A value that the recipe does not take, to compare it with another."""
        return self._values.get(key)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, or None. Raises ConfigError for anything else."""
        value = self.get(key, default)
        try:
            number = value if value is None or isinstance(value, int) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or (number is not None and not math.isfinite(number)):
            raise ConfigError(f"{self.table.title}: {key} is {show(value)}, expected a number")
        return number

    def whole(self, key: str, default: int | None = None) -> Any:
        """A whole number, or None. Raises ConfigError for anything else."""
        number = self.number(key, default)
        if number is None or number == int(number):
            return None if number is None else int(number)
        raise ConfigError(f"{self.table.title}: {key} is {number}, expected a whole number")

    def switch(self, key: str, default: bool = False) -> bool:
        """True or false; what is null is `default`. Raises ConfigError for anything else."""
        value = self.get(key, default)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"{self.table.title}: {key} is {show(value)}, expected true or false")
        return value

    def text(self, key: str) -> str | None:
        """A text, or None. Raises ConfigError for anything else."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self.table.title}: {key} is {show(value)}, expected a text")
        return value

    def account(self) -> None:
        """Note what is not needed. Raises ConfigError for what is not known, unless it is allowed and noted."""
        for key, value in self._values.items():
            reason, cannot = _look_up(self.table.not_needed, key), _look_up(self.table.cannot, key)
            if value is None:
                self.report.add("not needed", key, "is null, nothing is asked for")
            elif key in self.table.used:
                if self.report.mentions(key):
                    continue
                if key not in self._asked:
                    self.report.add("not needed", key, f"nothing else asks for it ({self.table.used[key]})")
                elif not value:
                    self.report.add("not needed", key, "is 0, empty or off, nothing is asked for")
            elif reason is not None:
                self.report.add("not needed", key, reason)
            elif _off(value):
                meant = "" if cannot else nearest(key, self.table.used)
                kind: Kind = "contradiction" if meant else "not needed"
                self.report.add(kind, key, f"is not known{meant}" if meant else "is off, nothing is asked for")
            else:
                known = f" is not known{nearest(key, self.table.known())}" if cannot is None else f": {cannot}"
                self.report.lacks(self.table.title, key, known)


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that may have been meant: one of a like name beside it, or the same name at another place."""
    names = sorted(name for name in known if "*" not in name)
    parent, dot, last = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == parent}
    near = get_close_matches(last, beside, n=1, cutoff=0.75)
    elsewhere = [name for name in names if dot and name.rpartition(".")[2] == last]
    found = beside[near[0]] if near else elsewhere[0] if elsewhere else ""
    return f"; did you mean {found!r}?" if found else ""


def _look_up(table: Mapping[str, str], key: str) -> str | None:
    return table.get(key) or next((text for pattern, text in table.items() if fnmatchcase(key, pattern)), None)


def _off(value: Any) -> bool:
    """Whether a key says that something is not there."""
    return value is None or value is False or value in ("", "null", [])
