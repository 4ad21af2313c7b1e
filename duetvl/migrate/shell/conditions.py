"""What tests say: `[ ... ]`, `test` and `[[ ... ]]`; None where it is not known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from duetvl.migrate.shell.syntax import Template, plain
from duetvl.migrate.shell.values import missing
from duetvl.migrate.shell.variables import Variables

_DECIMAL: Final = re.compile(r"-?(?:0|[1-9]\d{0,17})", re.ASCII)
_COMPARED: Final[dict[str, Callable[[int, int], bool]]] = {
    "-eq": lambda a, b: a == b, "-ne": lambda a, b: a != b, "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b, "-gt": lambda a, b: a > b, "-ge": lambda a, b: a >= b,
}  # fmt: skip


def single_bracket(variables: Variables, templates: Sequence[Template]) -> bool | None:
    """`[ words ]`, without the brackets."""
    return _with_absent(variables, lambda: _plain_test(variables.words(templates)))


def _with_absent(variables: Variables, test: Callable[[], tuple[bool | None, bool]]) -> bool | None:
    """A test in which variables that the script does not set are empty.

    Where it only asks whether they are set, the answer is taken, and noted; any other answer may be another one where
    the script is started, so it is not known.
    """
    outer, variables.asked = variables.asked, []
    try:
        answer, asks_for_values = test()
        absent = variables.asked
    finally:
        variables.asked = outer
    if absent and asks_for_values:
        return None
    for name in absent if answer is not None else ():
        variables.assumed[name] = "not set, as the script's tests find it"
    return answer


def _plain_test(words: list[str]) -> tuple[bool | None, bool]:
    """The answer, and whether it depends on more than what is empty."""
    if words and words[0] == "!":
        answer, asks = _plain_test(words[1:])
        return (None if answer is None else not answer), asks
    if any(map(missing, words)) and len(words) != 1:
        return None, True
    if len(words) < 2:
        return (None if words and missing(words[0]) else bool(words and words[0])), False
    if len(words) == 2 and words[0] in ("-z", "-n"):
        return bool(words[1]) == (words[0] == "-n"), False
    if len(words) != 3:
        return None, True
    left, sign, right = words
    if sign in ("=", "==", "!="):
        return (left == right) != (sign == "!="), True
    return _numbers(left, sign, right), True


def _numbers(left: str, sign: str, right: str) -> bool | None:
    if sign not in _COMPARED or not _DECIMAL.fullmatch(left) or not _DECIMAL.fullmatch(right):
        return None
    return _COMPARED[sign](int(left), int(right))


def double_bracket(variables: Variables, tokens: Sequence[Template | str]) -> bool | None:
    """`[[ tokens ]]`: words are not split, `==` compares with a pattern, and `&&`, `||` and brackets join tests."""
    rest = list(tokens)
    answer = _either(variables, rest)
    return None if rest else answer


def _either(variables: Variables, rest: list[Template | str]) -> bool | None:
    answer = _both(variables, rest)
    while rest and rest[0] == "||":
        rest.pop(0)
        other = _both(variables, rest)
        answer = True if answer is True or other is True else None if answer is None or other is None else False
    return answer


def _both(variables: Variables, rest: list[Template | str]) -> bool | None:
    answer = _one(variables, rest)
    while rest and rest[0] == "&&":
        rest.pop(0)
        other = _one(variables, rest)
        answer = False if answer is False or other is False else None if answer is None or other is None else True
    return answer


def _one(variables: Variables, rest: list[Template | str]) -> bool | None:
    if not rest:
        return None
    if not isinstance(rest[0], str) and plain(rest[0]) == "!":
        rest.pop(0)
        answer = _one(variables, rest)
        return None if answer is None else not answer
    if rest[0] == "(":
        rest.pop(0)
        answer = _either(variables, rest)
        if rest and rest[0] == ")":
            rest.pop(0)
            return answer
        return None
    words: list[Template] = []
    while rest and (not isinstance(rest[0], str) or rest[0] in ("<", ">")):
        token = rest.pop(0)
        if isinstance(token, str):
            return None  # an order of texts, which depends on the language of the system
        words.append(token)
    return _with_absent(variables, lambda: _comparison(variables, words))


def _comparison(variables: Variables, words: list[Template]) -> tuple[bool | None, bool]:
    """The answer, and whether it depends on more than what is empty."""
    if len(words) == 3 and plain(words[1]) in ("=", "==", "!="):
        left, pattern = variables.text(words[0]), variables.pattern(words[2])
        if pattern is None or missing(left) or missing(pattern):
            return None, True
        return fnmatchcase(left, pattern) != (plain(words[1]) == "!="), True
    if len(words) > 2 and plain(words[1]) not in _COMPARED:
        return None, True
    return _plain_test([variables.text(word) for word in words])
