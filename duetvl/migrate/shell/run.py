"""Follows a script from the top to the bottom: its assignments, conditions and functions, and no program.

A command of which it is not known whether it runs is followed all the same, but what it assigns is then not known. So
it is with the body of a loop, unless it is known not to run. A construct that would be followed wrongly is refused with
its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.arithmetic import assigned
from duetvl.migrate.shell.conditions import double_bracket
from duetvl.migrate.shell.parser import parse
from duetvl.migrate.shell.simple import Exit, Script, SimpleCommands, Status
from duetvl.migrate.shell.syntax import (
    Case,
    Chain,
    Choice,
    Each,
    Function,
    Group,
    Loop,
    Node,
    Pipe,
    Simple,
    Sum,
    Template,
    Test,
)
from duetvl.migrate.shell.values import SIGNS, Text, missing
from duetvl.migrate.shell.variables import Variables
from duetvl.migrate.shell.words import double_quoted

_MOST: Final = 100_000  # commands that are followed


def read_script(text: str, given: Mapping[str, str]) -> Script:
    """Follow a script. `given` variables keep their values whatever it says.

    Raises ConfigError, which begins with the line, where it is broken or does what is not followed.
    """
    values: dict[str, tuple[str, ...]] = {name: (value,) for name, value in given.items()}
    script = Script(Variables(values, frozenset(given)))
    follower = _Follower(script)
    try:
        follower.run(parse(re.sub(f"\r(?=\n|\\Z)|[{SIGNS}]", "", text)))
    except Exit:
        script.ended = follower.variables.line
    except RecursionError:
        raise ConfigError("commands or expressions are nested too deeply to be read") from None
    return script


class _Follower(SimpleCommands):
    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.count = 0
        self.kinds: dict[type, Callable[..., Status]] = {
            Simple: self.simple, Sum: self._arithmetic, Test: self._test, Group: self._group, Choice: self._choice,
            Loop: self._loop, Each: self._each, Case: self._case, Function: self._define, Chain: self._chain,
            Pipe: self._pipe,
        }  # fmt: skip

    def run(self, nodes: Sequence[Node]) -> Status:
        """Follow commands; the status of the last one."""
        status: Status = True
        for node in nodes:
            self.count += 1
            self.variables.line = node.line
            if self.count > _MOST:
                raise self.variables.error(f"more than {_MOST} commands are run; the script is not followed to its end")
            status = self.kinds[type(node)](node)
        return status

    # -- compound commands ----------------------------------------------------------------------------------------

    def _group(self, node: Group) -> Status:
        if not node.apart:
            return self.run(node.body)
        with self.apart():
            return self.run(node.body)

    def _chain(self, node: Chain) -> Status:
        status = self.run([node.first])
        for sign, following in node.rest:
            if status is None:
                self.perhaps([following])
            elif status == (sign == "&&"):
                status = self.run([following])
        return status

    def _pipe(self, node: Pipe) -> Status:
        status: Status = None
        for part in node.parts:
            if len(node.parts) == 1:
                status = self.run([part])
            else:
                with self.apart():
                    self.run([part])
        return None if status is None or not node.negated else not status

    def _choice(self, node: Choice) -> Status:
        known = True
        for condition, body in node.branches:
            answer = True if condition is None else self.perhaps(condition, sure=known)
            if answer is True and known:
                return self.run(body)
            if answer is not False:
                known = False
                self.perhaps(body)
        return True if known else None

    def _loop(self, node: Loop) -> Status:
        condition = node.condition or ()
        answer = self.run(condition) if condition else None
        if answer is not None and answer == node.until:
            return True
        return self._any_number_of_times([*condition, *node.body])

    def _any_number_of_times(self, body: Sequence[Node]) -> Status:
        """Follow a body twice: what it assigns at its end is not known at its beginning either."""
        starts = list(self.script.starts)
        for _ in range(2):
            self.script.starts[:] = starts
            self.perhaps(body)
        return None

    def _each(self, node: Each) -> Status:
        if not (self.variables.arguments if node.words is None else self.variables.words(node.words)):
            return True
        self.variables.forget([node.name], "takes several values in a loop")
        return self._any_number_of_times(node.body)

    def _case(self, node: Case) -> Status:
        word, known = self.variables.text(node.word), True
        for patterns, body in node.branches:
            found = [self._fits(word, pattern) for pattern in patterns]
            if any(fits is True for fits in found) and known:
                return self.run(body)
            if not all(fits is False for fits in found):
                known = False
                self.perhaps(body)
        return True if known else None

    def _fits(self, word: str, template: Template) -> Status:
        pattern = self.variables.pattern(template)
        if pattern == "*":
            return True
        return None if pattern is None or missing(word) or missing(pattern) else fnmatchcase(word, pattern)

    def _define(self, node: Function) -> Status:
        self.functions[node.name] = None if self.variables.unsure else node.body
        return True

    def _arithmetic(self, node: Sum) -> Status:
        text = self.variables.text(double_quoted(node.text))
        if names := assigned(text):
            self.variables.forget(names, "is changed within a sum")
            return None
        value = Text.of(text if missing(text) else self.variables.calculate(text))
        return None if value.missing else value.text != "0"

    def _test(self, node: Test) -> Status:
        return double_bracket(self.variables, node.tokens)
