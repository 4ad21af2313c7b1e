"""The variables of a script at one point of it, and what words become with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.arithmetic import Unknown, assigned, calculate, number
from duetvl.migrate.shell.syntax import Template, WordPart
from duetvl.migrate.shell.values import END, QUOTED, mark, missing, short, unset

LONGEST: Final = 1_000_000  # of a value; a script that doubles one again and again is not meant to be read
_CHANGING: Final = {"RANDOM", "SECONDS", "LINENO", "BASHPID", "SRANDOM", "EPOCHSECONDS", "EPOCHREALTIME"}
_FILES: Final = re.compile(r"[*?]|\[.+\]")
_BRACES: Final = re.compile(r"\{[^{}]*(?:,|\.\.)[^{}]*\}")


@dataclass
class Variables:
    """Values by name, each a list of words. `given` ones keep their values whatever the script says.

    `assumed`: what is taken because the script says what holds where a variable is not set. `unsure`: why the command
    that is followed may not be run; what it assigns is not known then.
    """

    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    arguments: tuple[str, ...] = ()
    readonly: set[str] = field(default_factory=set)
    declared: dict[str, str] = field(default_factory=dict)  # with flags that change what an assignment means
    assumed: dict[str, str] = field(default_factory=dict)
    unsure: str = ""
    asked: list[str] | None = None  # of a test: the variables that it found not set, which count as empty
    line: int = 0  # of the command that is followed

    # -- assigning ------------------------------------------------------------------------------------------------

    def assign(self, name: str, value: tuple[str, ...]) -> None:
        """Give a variable its value. Raises ConfigError for one that may not be changed, or is far too long."""
        if name in self.given:
            return
        if name in self.readonly:
            raise self.error(f"{name} is readonly and cannot be assigned")
        if name == "IFS":
            raise self.error("a changed IFS is not followed; write what it does into a copy of the script")
        if sum(map(len, value)) > LONGEST:
            raise self.error(f"the value of {name} is longer than {LONGEST} characters")
        if name in self.declared:
            value = (mark(f"{name} is declared with {self.declared[name]}"),)
        elif self.unsure and value != self.values.get(name):
            value = (mark(f"{name} depends on a condition that is not known ({self.unsure})"),)
        self.values[name] = value

    def forget(self, names: Iterable[str], how: str) -> None:
        """These variables have values that are not known; `how` says after the name why."""
        for name in dict.fromkeys(names):
            if name not in self.readonly and name != "IFS":
                self.assign(name, (mark(f"{name} {how} (line {self.line})"),))

    def remove(self, name: str) -> None:
        """`unset`."""
        if self.unsure and name in self.values:
            self.forget([name], "is unset under a condition")
        elif name not in self.given:
            self.values.pop(name, None)

    def error(self, what: str) -> ConfigError:
        """An error of the command that is followed."""
        return ConfigError(f"line {self.line}: {what}")

    @contextmanager
    def apart(self) -> Iterator[None]:
        """As in a shell of its own: what is changed is as before afterwards."""
        before = dict(self.values), self.arguments, set(self.readonly)
        try:
            yield
        finally:
            self.values, self.arguments, self.readonly = before

    @contextmanager
    def maybe(self) -> Iterator[None]:
        """While commands are followed of which it is not known whether they run."""
        before = self.unsure
        self.unsure = before or f"line {self.line}"
        try:
            yield
        finally:
            self.unsure = before

    # -- words ----------------------------------------------------------------------------------------------------

    def words(self, templates: Sequence[Template]) -> list[str]:
        """The words that words become: variables without quotes are split at blanks."""
        return [word for template in templates for word in self._split(template)]

    def text(self, template: Template) -> str:
        """A word where nothing is split, as on the right of an assignment."""
        return "".join(self._value_of(part, split=False) for part in self._home(template))

    def pattern(self, template: Template) -> str | None:
        """A pattern for `fnmatchcase`, None for one that it reads in another way than the shell."""
        found = ""
        for part in template:
            value = self._value_of(part, split=False)
            found += re.sub(r"([*?\[])", r"[\1]", value) if part.quoted else value
            if not part.quoted and re.search(r"[\[\\(]", value):
                return None
        return found

    def _split(self, template: Template) -> list[str]:
        skeleton = "".join(part.text if part.kind == "text" and not part.quoted else "." for part in template)
        if _BRACES.search(skeleton):
            return [mark(f"{short(skeleton)} is not read: braces are not written out")]
        whole = "".join(self._value_of(part, split=True) for part in self._home(template))
        return [word.replace(QUOTED, "") for word in whole.split(END) if word]

    def _home(self, template: Template) -> Template:
        """`~` at the beginning is `$HOME`; another user's is not read."""
        first = template[0] if template else None
        if first is None or first.kind != "text" or first.quoted or not first.text.startswith("~"):
            return template
        name, slash, rest = first.text[1:].partition("/")
        if name or (not slash and len(template) > 1):
            return (WordPart("unread", first.text), *template[1:])
        return (WordPart("variable", "HOME", quoted=True), WordPart("text", slash + rest, quoted=True), *template[1:])

    def _value_of(self, part: WordPart, split: bool) -> str:
        """What a part becomes; with `split` with the signs for words and quotes."""
        if part.kind == "variable":
            return self._variable(part, split)
        values = {
            "text": lambda: part.text, "sum": lambda: self._sum(part),
            "command": lambda: mark(f"the output of {short(part.text)} is not known"),
            "unread": lambda: mark(f"{short(part.text)} is not read"),
        }  # fmt: skip
        value = values[part.kind]()
        return value if not split else QUOTED + value if part.quoted else _marked_files(value)

    def _sum(self, part: WordPart) -> str:
        text = self.text(part.operand)
        if reason := missing(text):
            return mark(reason)
        if names := assigned(text):
            self.forget(names, "is changed within a sum")
            return mark(f"$(({short(part.text)})) is not read")
        return self.calculate(text)

    def calculate(self, text: str) -> str:
        """The value of an expression, or a mark."""
        try:
            return str(calculate(text, self._number))
        except Unknown as error:
            return mark(str(error))

    def _number(self, name: str) -> int:
        value = self.values.get(name, (unset(name),))[:1]
        text = "".join(value)
        if missing(text):
            raise Unknown(missing(text))
        found = number(text)
        if found is None:
            raise Unknown(f"{name} is {short(text)!r}, no whole number")
        return found

    # -- variables ------------------------------------------------------------------------------------------------

    def _variable(self, part: WordPart, split: bool) -> str:
        value, listed = self._value(part), part.text in ("@", "*") or part.index in ("@", "*")
        rule = part.operator.lstrip(":")
        absent = not value or (part.operator.startswith(":") and not any(value))
        if rule and rule in "-=?" and absent:
            return self._default(part, rule, split)
        if rule == "+" and not missing("".join(value or ())):
            return self._alternative(part, absent, split)
        if value is None:
            value = self._absent(part.text)
        if part.operator == "length":
            value = (str(len(value) if listed else len("".join(value))),) if not missing("".join(value)) else value
        elif rule in ("%", "%%", "#", "##"):
            value = (self._cut(part, "".join(value)),)
        if split and part.quoted and listed and "@" in (part.text, part.index) and part.operator != "length":
            return END.join(QUOTED + word for word in value)
        return _signed(" ".join(value), part.quoted) if split else " ".join(value)

    def _value(self, part: WordPart) -> tuple[str, ...] | None:
        """The value of a variable; None where it is not set. An array without an index stands for its first word."""
        name = part.text
        if name in ("@", "*"):
            return self.arguments
        if name == "#":
            return (str(len(self.arguments)),)
        if name.isdigit() and name != "0":
            return self.arguments[int(name) - 1 : int(name)] or None
        if not (name[0].isalpha() or name[0] == "_") or name in _CHANGING:
            return (mark(f"${name} is not known"),)
        value = self.values.get(name)
        if value is None or part.index in ("@", "*"):
            return value
        place = int(part.index or 0)
        return value[place : place + 1] or None

    def _absent(self, name: str) -> tuple[str, ...]:
        if self.asked is not None:
            self.asked.append(name)
            return ()
        return (mark(f"argument {name} of the script is not known"),) if name.isdigit() else (unset(name),)

    def _default(self, part: WordPart, rule: str, split: bool) -> str:
        if rule == "?":
            return _signed(" ".join(self._absent(part.text)), part.quoted) if split else self._absent(part.text)[0]
        if part.text not in ("@", "*"):
            value = self._operand(part, split=False)
            if part.text not in self.values and not missing(value):
                self.assumed[part.text] = f"{short(value) or 'empty'}, which the script takes where it is not set"
            if rule == "=":
                self.assign(part.text, (value,))
        return self._operand(part, split)

    def _alternative(self, part: WordPart, absent: bool, split: bool) -> str:
        """`${name:+operand}`."""
        if not absent:
            return self._operand(part, split)
        if part.text not in self.values and part.text not in ("@", "*"):
            self.assumed[part.text] = "not set, as the script does not set it"
        return QUOTED if split and part.quoted else ""

    def _operand(self, part: WordPart, split: bool) -> str:
        """What `${name:-operand}` becomes, whose texts are split where it stands without quotes."""
        found = QUOTED if split and part.quoted else ""
        for inner in part.operand:
            value = self._value_of(inner, split)
            found += _signed(value, inner.quoted) if split and inner.kind == "text" and not part.quoted else value
        return found

    def _cut(self, part: WordPart, value: str) -> str:
        """`${name%pattern}` and its like: the shortest or longest end or beginning that fits is cut off."""
        pattern = self.pattern(part.operand)
        if missing(value):
            return value
        if pattern is None or missing(pattern):
            return mark(f"${{{part.text}{part.operator}...}} is not read")
        tail = part.operator[0] == "%"
        places = list(range(len(value) + 1))
        if tail != (len(part.operator) == 2):
            places.reverse()
        for at in places:
            if fnmatchcase(value[at:] if tail else value[:at], pattern):
                return value[:at] if tail else value[at:]
        return value


def _signed(value: str, quoted: bool) -> str:
    """A value with the signs for words and quotes."""
    return QUOTED + value if quoted else re.sub(r"[ \t\n]+", END, _marked_files(value))


def _marked_files(value: str) -> str:
    """Words that name files by a pattern are marked: which ones there are is not known."""

    def marked(found: re.Match[str]) -> str:
        word = found[0]
        known = "\0" in word or not _FILES.search(word)
        return word if known else word + mark(f"which files {short(word)} names is not known")

    return re.sub(r"[^ \t\n]+", marked, value)
