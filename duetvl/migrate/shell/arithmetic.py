"""Whole numbers as the shell calculates with them, in `$((...))`, `((...))` and `[ -gt ]`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from duetvl.migrate.shell.values import short

_TOKEN: Final = re.compile(
    r"\s*(\d+\w*|0[xX][0-9a-fA-F]+|[A-Za-z_]\w*|\*\*|<<|>>|[<>=!]=|&&|\|\||[-+*/%()<>!~&|^])", re.ASCII
)
_ASSIGNS: Final = re.compile(r"\+\+|--|(?<![=!<>])=(?!=)|(?:<<|>>)=")
_LEVELS: Final = (("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<=", ">=", "<", ">"), ("<<", ">>"),
                  ("+", "-"), ("*", "/", "%"))  # fmt: skip
_LIMIT: Final = 2**63


class Unknown(Exception):
    """A sum cannot be worked out; says why."""


def calculate(text: str, look_up: Callable[[str], int]) -> int:
    """The value of an expression. Raises Unknown for what is not read or not known."""
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if not found:
            raise Unknown(f"$(({short(text)})) is not read")
        tokens.append(found[1])
        at = found.end()
    return _Calculator(tokens, look_up).result()


def assigned(text: str) -> list[str]:
    """The names in an expression that changes variables; none for one that only reads them."""
    return re.findall(r"[A-Za-z_]\w*", text, re.ASCII) if _ASSIGNS.search(text) else []


def number(text: str) -> int | None:
    """The value of a number as the shell writes them: octal after a zero, hexadecimal after 0x; None for no number."""
    found = re.fullmatch(r"\s*([-+]?)(?:(0[xX][0-9a-fA-F]+)|(0[0-7]*)|([1-9]\d*))\s*", text, re.ASCII)
    if not found or len(text) > 60:
        return None
    value = int(found[2], 16) if found[2] else int(found[3], 8) if found[3] else int(found[4])
    return -value if found[1] == "-" else value


class _Calculator:
    def __init__(self, tokens: list[str], look_up: Callable[[str], int]) -> None:
        self.tokens, self.look_up = tokens, look_up

    def result(self) -> int:
        if not self.tokens:
            return 0
        value = self._level(0)
        if self.tokens:
            raise Unknown(f"a sum has {self.tokens[0]!r} too much")
        return value

    def _level(self, level: int) -> int:
        if level == len(_LEVELS):
            return self._power()
        value = self._level(level + 1)
        while self.tokens and self.tokens[0] in _LEVELS[level]:
            value = _apply(self.tokens.pop(0), value, self._level(level + 1))
        return value

    def _power(self) -> int:
        base = self._atom()
        if self.tokens and self.tokens[0] == "**":
            self.tokens.pop(0)
            return _apply("**", base, self._power())
        return base

    def _atom(self) -> int:
        token = self.tokens.pop(0) if self.tokens else ""
        if token in ("+", "-", "!", "~"):
            value = self._atom()
            return {"+": value, "-": -value, "!": int(not value), "~": ~value}[token]
        if token == "(":
            value = self._level(0)
            if not self.tokens or self.tokens.pop(0) != ")":
                raise Unknown("a sum lacks a bracket")
            return value
        if token[:1].isdigit():
            value_of = number(token)
            if value_of is None:
                raise Unknown(f"{short(token)!r} is no number that the shell calculates with")
            return value_of
        if not (token[:1].isalpha() or token[:1] == "_"):
            raise Unknown("a sum lacks a number")
        return self.look_up(token)


def _apply(sign: str, a: int, b: int) -> int:
    if sign in "/%" and b == 0:
        raise Unknown("a sum divides by zero")
    if sign in ("**", "<<", ">>") and not 0 <= b < 64:
        raise Unknown("a sum has a power or shift beyond the shell's")
    if sign in "/%":
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # towards zero
        value = quotient if sign == "/" else a - b * quotient
    else:
        value = int(_SIGNS[sign](a, b))
    if not -_LIMIT <= value < _LIMIT:
        raise Unknown("a sum has numbers beyond the shell's")
    return value


_SIGNS: Final[dict[str, Callable[[int, int], int]]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "**": lambda a, b: a**b,
    "<<": lambda a, b: a << b, ">>": lambda a, b: a >> b, "&": lambda a, b: a & b, "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b, "&&": lambda a, b: bool(a) and bool(b), "||": lambda a, b: bool(a) or bool(b),
    "==": lambda a, b: a == b, "!=": lambda a, b: a != b, "<": lambda a, b: a < b, ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b,
}  # fmt: skip
