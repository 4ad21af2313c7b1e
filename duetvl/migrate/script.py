"""What a script's variables are at the end, and the command with which it starts training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell import Assignment, Command, Part, Template, commands, double_quoted, plain

LONGEST: Final = 1_000_000  # of a value; a script that doubles one again and again is not meant to be read
_BRACES: Final = re.compile(r"(?P<name>[A-Za-z_]\w*|[@*])(?P<all>\[[@*]\])?(?P<default>:?[-=](?P<text>.*))?", re.DOTALL)
_MARK: Final = re.compile("\0[^\0]*\0")
_TOKEN: Final = re.compile(r"\s*(\d+|\$?\{?[A-Za-z_]\w*\}?|[-+*/%()])")
_OPENING: Final = {"if", "for", "while", "until", "case", "select"}
_CLOSING: Final = {"fi", "done", "esac"}
_ASSIGNING: Final = {"export", "declare", "local", "readonly", "typeset"}
_LEADING: Final = {"then", "else", "do", "{", "}", "!"}


@dataclass(frozen=True)
class Text:
    """A word after expansion; `missing` says what of it cannot be known without running the script."""

    text: str
    missing: str = ""

    @classmethod
    def of(cls, value: str) -> Text:
        """From a value with marks in it."""
        return cls(_MARK.sub("", value), _missing(value))


@dataclass
class Script:
    """A script as far as it can be read. `exported`: names of variables for the programs that it starts.

    Values of variables are lists of words. What is not known in them is marked: `\\0`, the reason with `\\1` for its
    blanks, `\\0`; so a mark keeps its place when a value is put into another and split again.
    """

    variables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exported: list[str] = field(default_factory=list)
    launcher: list[Text] = field(default_factory=list)
    program: str = ""
    arguments: list[Text] = field(default_factory=list)

    def value(self, name: str) -> Text:
        """A variable, as one word."""
        return Text.of(" ".join(self.variables.get(name, (_mark(f"{name} is not set in the script"),))))


def _mark(reason: str) -> str:
    return "\0" + "\1".join(reason.split()) + "\0"


def _missing(value: str) -> str:
    found = _MARK.search(value)
    return found[0].strip("\0").replace("\1", " ") if found else ""


def read_script(text: str, given: Mapping[str, str]) -> Script:
    """Follow a script. `given` variables keep their values whatever it says. Raises ConfigError where it is broken."""
    script = Script({name: (value,) for name, value in given.items()})
    try:
        _follow(script, commands(text), frozenset(given))
    except RecursionError:
        raise ConfigError("expressions are nested too deeply to be read") from None
    return script


def _follow(script: Script, found: Iterable[Command], given: frozenset[str]) -> None:
    depth = 0
    for command in found:
        words = list(command.words)
        while words and plain(words[0]) in _LEADING:
            words.pop(0)
        first = plain(words[0]) if words else ""
        depth = max(0, depth + (first in _OPENING) - (first in _CLOSING))
        if not words or first in _ASSIGNING:
            for assignment in command.assignments:
                if assignment.name not in given:
                    _assign(script, assignment, command.line, conditional=depth > 0)
        if first == "export":
            names = [assignment.name for assignment in command.assignments]
            script.exported += [*names, *filter(None, map(plain, words[1:]))]
        elif not script.program and first not in _ASSIGNING:
            _look_for_a_start(script, words)


def _assign(script: Script, assignment: Assignment, line: int, conditional: bool) -> None:
    name = assignment.name
    if assignment.array:
        value = tuple(word for template in assignment.words for word in expand(script, template))
    elif [part.kind for part in assignment.words[0] if part.text] == ["command"]:
        value = (_mark(f"{name} is the output of a command (line {line})"),)
    else:
        value = ("".join(" ".join(_values(script, part)) for part in assignment.words[0]),)
    if assignment.append:
        old = script.variables.get(name, ())
        value = (*old, *value) if assignment.array else ("".join((*old, *value)),)
    if sum(map(len, value)) > LONGEST:
        raise ConfigError(f"line {line}: the value of {name} is longer than {LONGEST} characters")
    before = script.variables.get(name)
    if conditional and before is not None and before != value:
        value = (_mark(f"{name} has different values under conditions (line {line})"),)
    script.variables[name] = value


def _look_for_a_start(script: Script, words: list[Template]) -> None:
    """Keep the first command that gives a Python program options."""
    expanded = [Text.of(word) for template in words for word in expand(script, template) if word]
    for at, word in enumerate(expanded):
        if word.text.endswith(".py") and any(rest.text.startswith("--") for rest in expanded[at + 1 :]):
            script.launcher, script.program, script.arguments = expanded[:at], word.text, expanded[at + 1 :]
            return


# -- expansion -------------------------------------------------------------------------------------------------------


def expand(script: Script, template: Template) -> list[str]:
    """The words that a word becomes: variables without quotes are split at blanks."""
    words: list[str] = []
    joined = False  # whether the next piece goes on with the last word
    for part in template:
        values = _values(script, part)
        if part.quoted or part.kind == "text":
            pieces = list(values) if part.kind == "variable" and _is_list(part) else [" ".join(values)]
            starts = ends = False
        else:
            whole = " ".join(values)
            pieces = whole.split()
            starts, ends = whole[:1].isspace(), whole[-1:].isspace()
        if pieces and joined and words and not starts:
            words[-1] += pieces.pop(0)
            joined = True
        joined = not ends if pieces or values else joined
        words += pieces
    return words


def _is_list(part: Part) -> bool:
    return part.text in ("@", "*") or part.text.endswith(("[@]", "[*]"))


def _values(script: Script, part: Part) -> tuple[str, ...]:
    if part.kind == "text":
        return (part.text,)
    if part.kind == "command":
        return (_mark(f"the output of {_short(part.text)} is not known"),)
    if part.kind == "sum":
        return (_sum(script, part.text),)
    return _variable(script, part.text)


def _variable(script: Script, text: str) -> tuple[str, ...]:
    if text in ("@", "*") or text.isdigit():
        return ()  # the script's own arguments: it is read as if started without any
    found = _BRACES.fullmatch(text)
    if not found:
        return (_mark(f"${{{_short(text)}}} is not read"),)
    name = found["name"]
    value = script.variables.get(name)
    if found["default"] is not None and (value is None or (found["default"][0] == ":" and not any(value))):
        return (" ".join(expand(script, double_quoted(found["text"]))),)
    if value is None:
        return (_mark(f"{name} is not set in the script"),)
    return value if found["all"] else value[:1]


def _sum(script: Script, text: str) -> str:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            return _mark(f"$(({_short(text)})) is not read")
        tokens.append(found[1])
        at = found.end()
    try:
        return str(_Calculator(tokens, lambda name: _number(script, name)).result())
    except _Unknown as error:
        return _mark(str(error))


def _number(script: Script, name: str) -> int:
    value = " ".join(_variable(script, name))
    if missing := _missing(value):
        raise _Unknown(missing)
    try:
        return int(value)
    except ValueError:
        raise _Unknown(f"{name} is {_short(value)!r}, no whole number") from None


class _Unknown(Exception):
    """A sum cannot be worked out; says why."""


class _Calculator:
    """Whole numbers with + - * / % and brackets, in the shell's rules."""

    def __init__(self, tokens: list[str], look_up: Callable[[str], int]) -> None:
        self.tokens, self.look_up = tokens, look_up

    def result(self) -> int:
        value = self._chain("+-", lambda: self._chain("*/%", self._atom))
        if self.tokens:
            raise _Unknown(f"a sum has {self.tokens[0]!r} too much")
        return value

    def _chain(self, signs: str, operand: Callable[[], int]) -> int:
        value = operand()
        while self.tokens and self.tokens[0] in signs:
            value = _apply(self.tokens.pop(0), value, operand())
        return value

    def _atom(self) -> int:
        token = self.tokens.pop(0) if self.tokens else ""
        if token in ("+", "-"):
            return self._atom() * (-1 if token == "-" else 1)
        if token == "(":
            value = self._chain("+-", lambda: self._chain("*/%", self._atom))
            if not self.tokens or self.tokens.pop(0) != ")":
                raise _Unknown("a sum lacks a bracket")
            return value
        if token.isdigit():
            return int(token[:50])
        if not token or token in "*/%)":
            raise _Unknown("a sum lacks a number")
        return self.look_up(token.strip("${}"))


def _apply(sign: str, a: int, b: int) -> int:
    if sign in "/%" and b == 0:
        raise _Unknown("a sum divides by zero")
    if max(abs(a), abs(b)) > 2**63:
        raise _Unknown("a sum has numbers beyond the shell's")
    if sign in "/%":
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # towards zero
        return quotient if sign == "/" else a - b * quotient
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 40 else flat[:37] + "..."


def options(words: Iterable[Text]) -> Iterator[tuple[str, list[Text]]]:
    """`--name value value` and `--name=value` as (name, values); words before the first option have the name ""."""
    name, values = "", list[Text]()
    for word in words:
        if word.text.startswith("--"):
            if name or values:
                yield name, values
            name, equals, rest = word.text.partition("=")
            values = [Text(rest, word.missing)] if equals else []
        else:
            values.append(word)
    if name or values:
        yield name, values
