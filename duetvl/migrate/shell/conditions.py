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
    """`[[ tokens ]]`: words are not split, `==` compares with a pattern, `&&` and `||` join tests.

    Brackets are not read, nor the order of texts, which depends on the language of the system.
    """
    if not tokens or any(isinstance(token, str) and token not in ("&&", "||") for token in tokens):
        return None
    return _any([_all([_one(variables, test) for test in _parts(both, "&&")]) for both in _parts(tokens, "||")])


def _parts(tokens: Sequence[Template | str], sign: str) -> list[list[Template | str]]:
    """What is between the signs."""
    found: list[list[Template | str]] = [[]]
    for token in tokens:
        if token == sign:
            found.append([])
        else:
            found[-1].append(token)
    return found


def _any(answers: list[bool | None]) -> bool | None:
    return True if True in answers else None if None in answers else False


def _all(answers: list[bool | None]) -> bool | None:
    return False if False in answers else None if None in answers else True


def _one(variables: Variables, test: list[Template | str]) -> bool | None:
    words = [word for word in test if not isinstance(word, str)]
    if words and plain(words[0]) == "!":
        answer = _one(variables, test[1:])
        return None if answer is None else not answer
    return _with_absent(variables, lambda: _comparison(variables, words)) if words else None


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
