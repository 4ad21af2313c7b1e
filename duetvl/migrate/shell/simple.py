"""Simple commands: assignments, builtins that change variables, functions, and the start of the training."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.conditions import single_bracket
from duetvl.migrate.shell.parser import ASSIGNING, parse
from duetvl.migrate.shell.syntax import Assignment, Node, Simple, plain
from duetvl.migrate.shell.values import Text, mark, missing, short, unset
from duetvl.migrate.shell.variables import Variables

_DEEPEST: Final = 50  # functions within functions
_ENVIRONMENTS: Final = ("set_env.sh", "activate", ".bashrc", ".bash_profile", ".profile", "profile", "conda.sh",
                          "setenv.bash", "setvars.sh")  # fmt: skip
_QUIET: Final = frozenset({"echo", "printf", ":", "true", "set", "shift", "unset", "export", "trap", "umask"})
_CHANGES_NAMES: Final = frozenset({"read", "mapfile", "readarray", "getopts", "let"})

Status = bool | None  # whether a command succeeded, None where it is not known


@dataclass(frozen=True)
class Start:
    """A command that starts a Python program: its launcher's words, the program, and the program's arguments."""

    line: int
    launcher: tuple[Text, ...]
    program: str
    arguments: tuple[Text, ...]


@dataclass
class Script:
    """A script as far as it can be read. `exported`: names of variables for the programs that it starts.

    `assumed`: variables that the script does not set, with what it takes then. `ended`: the line at which it exits.
    """

    variables: Variables = field(default_factory=Variables)
    exported: list[str] = field(default_factory=list)
    sourced: list[str] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ended: int = 0

    def value(self, name: str) -> Text:
        """A variable at the end of the script, as one word."""
        return Text.of(" ".join(self.variables.values.get(name, (unset(name),))))


class Exit(Exception):
    """The script ends."""


class Return(Exception):
    """A function ends."""


class CallUnsettled(Exception):
    """It is not known whether a function ends here."""


class SimpleCommands(ABC):
    """Follows simple commands; what runs whole lists of commands is added in `run.py`."""

    def __init__(self, script: Script) -> None:
        self.script, self.variables = script, script.variables
        self.functions: dict[str, Node | None] = {}
        self.locals: list[dict[str, tuple[str, ...] | None]] = []
        self.calls: list[bool] = []

    @abstractmethod
    def run(self, nodes: Sequence[Node]) -> Status:
        """Follow commands; the status of the last one."""

    @contextmanager
    def apart(self) -> Iterator[None]:
        """As in a shell of its own, which `exit` ends."""
        functions = dict(self.functions)
        with self.variables.apart(), suppress(Exit, Return):
            yield
        self.functions = functions

    def perhaps(self, nodes: Sequence[Node], sure: bool = False) -> Status:
        """Follow commands that are run, or (not `sure`) may be run."""
        if sure:
            return self.run(nodes)
        with self.variables.maybe():
            self.run(nodes)
        return None

    def simple(self, node: Simple) -> Status:
        """Follow one command."""
        first = plain(node.words[0]) if node.words else ""
        if not node.words or first in ASSIGNING:
            flags = "".join(plain(word) for word in node.words if plain(word).startswith("-"))
            for assignment in node.assignments:
                self._keep_outer(first, flags, assignment.name)
                self._assign(assignment)
                self._declare(first, flags, assignment.name)
        if not node.words:
            outputs = any(part.kind == "command" for found in node.assignments for word in found.words for part in word)
            return None if outputs else True
        if first in ("[", "test"):
            closed = first == "test" or plain(node.words[-1]) == "]"
            return single_bracket(self.variables, node.words[1 : len(node.words) - (first == "[")]) if closed else None
        return self._command(self.variables.words(node.words), node)

    def _command(self, words: list[str], node: Simple) -> Status:
        while words and words[0] in ("command", "builtin", "exec"):
            ends = words[0] == "exec" and len(words) > 1
            words = words[1:]
            if ends:
                self._look_for_a_start(words)
                raise Exit if not self.variables.unsure else self._refused("exec under a condition")
        if not words:
            return True
        name = words[0]
        if name in self.functions:
            return self._call(name, words[1:], node.assignments)
        if name in ASSIGNING:
            self._assign_words(name, words[1:])
        elif name in ("exit", "return", "break", "continue"):
            self._jump(name)
        elif name in ("eval", "source", "."):
            return self._read_in(name, words[1:])
        elif name in ("shift", "unset", "set", "trap", "shopt", "alias"):
            self._settings(name, words[1:])
        elif name in _CHANGES_NAMES or (name == "printf" and "-v" in words):
            return self._set_names(name, words[1:])
        elif name in ("bash", "sh") and words[1:2] == ["-c"] and len(words) > 2:
            return self._shell_of_its_own(words[2])
        elif name not in _QUIET:
            self._look_for_a_start(words)
        return False if name == "false" else True if name in _QUIET or name in ASSIGNING else None

    def _shell_of_its_own(self, text: str) -> Status:
        """`bash -c text`, where all variables of the text have been filled in before."""
        if missing(text) or re.search(r"[$`]", text):
            return None
        with self.apart():
            self.run(parse(text))
        return None

    def _set_names(self, name: str, words: list[str]) -> Status:
        """Commands that put what is not known into variables."""
        if name == "getopts" and not self.variables.arguments:
            return False
        if name == "printf":
            words = words[words.index("-v") + 1 :][:1]
        if any(map(missing, words)):
            raise self._refused(f"{name} with words that are not known")
        names = [found for word in words for found in re.findall(r"[A-Za-z_]\w*", word, re.ASCII)]
        self.variables.forget([*names, "REPLY", "MAPFILE"], f"is set by {name}")
        return None

    def _refused(self, what: str) -> ConfigError:
        return self.variables.error(f"{what} is not followed; write what it does into a copy of the script")

    def _jump(self, name: str) -> None:
        """An `exit` under a condition is passed over: the script is read as going on to train.

        Where there is no function to leave, bash passes over `return`. The body of a loop may not run at all, so that
        it is left early changes nothing.
        """
        unsure = bool(self.variables.unsure)
        if name == "exit" and not unsure:
            raise Exit
        if name == "return" and self.calls and not unsure:
            raise Return
        if name == "return" and self.calls and self.calls[-1]:
            raise CallUnsettled

    # -- assignments ----------------------------------------------------------------------------------------------

    def _assign(self, assignment: Assignment) -> None:
        variables, name = self.variables, assignment.name
        if name not in variables.values and (assignment.append or _adds_to_itself(assignment)):
            variables.values[name] = () if assignment.array or assignment.append else ("",)
            variables.assumed[name] = "empty, where the script adds to it first"
        if assignment.element:
            variables.forget([name], "has elements that are set one by one")
            return
        if assignment.array:
            value = tuple(variables.words(assignment.words))
        elif [part.kind for part in assignment.words[0] if part.text] == ["command"]:
            value = (mark(f"{name} is the output of a command (line {variables.line})"),)
        else:
            value = (variables.text(assignment.words[0]) if assignment.words else "",)
        if assignment.append:
            old = variables.values.get(name, ())
            value = (*old, *value) if assignment.array else ("".join((*old[:1], *value)), *old[1:])
        variables.assign(name, value)

    def _assign_words(self, how: str, words: Sequence[str]) -> None:
        """`export NAME` and `export "NAME=value"`."""
        flags = "".join(word for word in words if word.startswith("-"))
        for word in words:
            name, equals, value = word.partition("=")
            if missing(name):
                raise self._refused(f"{how} of a name that is not known")
            if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                self._keep_outer(how, flags, name)
                if equals:
                    self.variables.assign(name, (value,))
                elif self._is_local(how, flags):
                    self.variables.remove(name)
                elif name in self.variables.declared:
                    self.variables.assign(name, ())
                self._declare(how, flags, name)

    def _is_local(self, how: str, flags: str) -> bool:
        return bool(self.locals) and how in ("local", "declare", "typeset") and "g" not in flags

    def _keep_outer(self, how: str, flags: str, name: str) -> None:
        """Remember what a name stands for outside of the function that declares it."""
        if how != "export" and "n" in flags:
            raise self._refused(f"{how} {flags}")
        if how != "export" and set(flags) & set("ilucA"):
            self.variables.declared[name] = flags
        if self._is_local(how, flags):
            self.locals[-1].setdefault(name, self.variables.values.get(name))

    def _declare(self, how: str, flags: str, name: str) -> None:
        """What a declaration does besides assigning."""
        if how == "export" or "x" in flags:
            self.script.exported.append(name)
        if how == "readonly" or (how and how != "export" and "r" in flags):
            self.variables.readonly.add(name)

    # -- functions, files and settings ----------------------------------------------------------------------------

    def _call(self, name: str, arguments: list[str], assignments: Sequence[Assignment]) -> Status:
        body, variables = self.functions[name], self.variables
        if body is None:
            raise self._refused(f"{name}, which is defined under a condition,")
        if len(self.locals) >= _DEEPEST:
            raise self._refused(f"{name}, which calls itself more than {_DEEPEST} times,")
        self.locals.append({})
        before, variables.arguments = variables.arguments, tuple(arguments)
        try:
            for assignment in assignments:
                self._keep_outer("local", "", assignment.name)
                self._assign(assignment)
            return self._body(body)
        finally:
            variables.arguments = before
            for local, value in self.locals.pop().items():
                if local not in variables.given:
                    variables.values.pop(local, None)
                    variables.values.update({} if value is None else {local: value})

    def _body(self, body: Node) -> Status:
        """Follow a function's body; once more, as one that may not be run, where it is not known where it ends."""
        starts = list(self.script.starts)
        try:
            self.calls.append(True)
            return self.run([body])
        except Return:
            return None
        except CallUnsettled:
            self.script.starts[:] = starts
            self.calls[-1] = False
            return self.perhaps([body])
        finally:
            self.calls.pop()

    def _read_in(self, how: str, words: Sequence[str]) -> Status:
        if how == "eval" and not any(map(missing, words)):
            line = self.variables.line
            try:
                nodes = parse(" ".join(words))
            except ConfigError:
                raise self._refused("eval of what is not read") from None
            with self._lines_of(line):
                return self.run(nodes)
        file = Text.of(words[0]).text if words else ""
        if how != "eval" and PurePosixPath(file).name in _ENVIRONMENTS:
            self.script.sourced.append(file)
            return None
        what = "eval" if how == "eval" else f"source {short(file)}"
        self.variables.forget(list(self.variables.values), f"may be changed by {what}")
        return None

    @contextmanager
    def _lines_of(self, line: int) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            raise ConfigError(re.sub(r"^line \d+", f"line {line}", str(error))) from None

    def _settings(self, name: str, words: list[str]) -> None:
        variables = self.variables
        if name == "unset":
            for word in words:
                self.functions.pop(word, None)
                variables.remove(word.partition("[")[0])
        elif name == "shift":
            count = int(words[0]) if words and words[0].isdecimal() else 1
            self._set_arguments(variables.arguments[count:] if count <= len(variables.arguments) else None)
        elif name == "set":
            self._set_arguments(_operands(words))
        elif name == "trap" and any(word in ("DEBUG", "ERR", "RETURN") for word in words[1:]):
            self._trap(words[0])
        elif name == "shopt" and any(word in ("lastpipe", "expand_aliases") for word in words):
            raise self._refused("shopt lastpipe or expand_aliases")

    def _trap(self, action: str) -> None:
        """An action that may run between any two commands; only one that changes no variable can be passed over."""
        before = dict(self.variables.values)
        with self.variables.apart():
            self.perhaps(() if missing(action) else parse(action))
            changed = missing(action) or self.variables.values != before
        if changed:
            raise self._refused("trap DEBUG, ERR or RETURN of what changes variables")

    def _set_arguments(self, arguments: Sequence[str] | None) -> None:
        if arguments is not None and self.variables.unsure:
            raise self._refused("changing the script's arguments under a condition that is not known")
        self.variables.arguments = self.variables.arguments if arguments is None else tuple(arguments)

    def _look_for_a_start(self, words: Sequence[str]) -> None:
        """Note a command that gives a Python program options."""
        found = [Text.of(word) for word in words]
        for at, word in enumerate(found):
            if word.text.endswith(".py") and any(rest.text.startswith("--") for rest in found[at + 1 :]):
                self.script.starts.append(
                    Start(self.variables.line, tuple(found[:at]), word.text, tuple(found[at + 1 :]))
                )
                return


def _adds_to_itself(assignment: Assignment) -> bool:
    """Whether it is `NAME="$NAME ..."`."""
    parts = [part for word in assignment.words for part in word]
    return any(part.kind == "variable" and part.text == assignment.name and not part.operator for part in parts)


def _operands(words: Sequence[str]) -> Sequence[str] | None:
    """The arguments that `set` gives the script; None where it only sets options."""
    at = 0
    while at < len(words) and words[at][:1] in ("-", "+") and words[at] != "--":
        at += 2 if words[at][1:] == "o" else 1
    rest = words[at:]
    return rest[1:] if rest[:1] == ["--"] else rest or None
