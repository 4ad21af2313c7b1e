"""Whole numbers as the shell calculates with them: + - * / %, brackets and one comparison; nothing else is read."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Final

from duetvl.migrate.shell.values import short

_NUMBER: Final = r"(?:0|[1-9]\d{0,17})"  # another zero at the beginning would make it octal
_READ: Final = re.compile(
    rf"(?:\s|[A-Za-z_]\w*|(?<!\w){_NUMBER}(?!\w)|[-+%()]|\*(?!\*)|/(?!/)|[<>]=?|[=!]=)+", re.ASCII
)
_ASSIGNS: Final = re.compile(r"\+\+|--|(?<![=!<>])=(?!=)|(?:<<|>>)=")
_LIMIT: Final = 2**63


class Unknown(Exception):
    """A sum cannot be worked out; says why."""


def calculate(text: str, look_up: Callable[[str], int]) -> int:
    """The value of an expression. Raises Unknown for what is not read or not known."""
    if not text.strip():
        return 0
    try:
        if not _READ.fullmatch(text):
            raise SyntaxError
        return _value(ast.parse(" ".join(text.split()), mode="eval").body, look_up)
    except SyntaxError:
        raise Unknown(f"$(({short(text)})) is not read") from None


def assigned(text: str) -> list[str]:
    """The names in an expression that changes variables; none for one that only reads them."""
    return re.findall(r"[A-Za-z_]\w*", text, re.ASCII) if _ASSIGNS.search(text) else []


def number(text: str) -> int | None:
    """The value of a whole number; None for all else, octal and hexadecimal ones too."""
    return int(text) if re.fullmatch(rf"\s*-?{_NUMBER}\s*", text, re.ASCII) else None


def _value(node: ast.expr, look_up: Callable[[str], int]) -> int:
    match node:
        case ast.Name(id=name):
            return look_up(name)
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _value(operand, look_up)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]) if (
            type(op) in _SIGNS
        ):
            return _apply(type(op), _value(left, look_up), _value(right, look_up))
    raise SyntaxError


def _apply(sign: type, a: int, b: int) -> int:
    if sign in (ast.Div, ast.Mod) and b == 0:
        raise Unknown("a sum divides by zero")
    value = int(_SIGNS[sign](a, b))
    if not -_LIMIT <= value < _LIMIT:
        raise Unknown("a sum has numbers beyond the shell's")
    return value


def _divided(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)  # towards zero


_SIGNS: Final[dict[type, Callable[[int, int], int]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divided,
    ast.Mod: lambda a, b: a - b * _divided(a, b), ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
