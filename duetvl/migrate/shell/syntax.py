"""The parts of a shell script, as `parser.py` finds them and `run.py` follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, Union


@dataclass(frozen=True)
class WordPart:
    """A stretch of a word.

    `text` is the text itself; the name of a variable, with `index`, `operator` and `operand` of
    `${name[index]:-operand}` (`length` is the operator of `${#name}`); or the source of what is not worked out: a
    command's output, and expansions that are not read. The `operand` of a sum is what is to be calculated.
    """

    kind: Literal["text", "variable", "sum", "command", "unread"]
    text: str
    quoted: bool = False
    index: str = ""
    operator: str = ""
    operand: tuple[WordPart, ...] = ()


Template: TypeAlias = tuple[WordPart, ...]


def plain(word: Template) -> str:
    """A word without quotes and expansions; empty for any other."""
    return word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else ""


@dataclass(frozen=True)
class Assignment:
    """`name=word`, `name=(word word)`, with `append` the same with `+=`, with `element` `name[...]=word`."""

    name: str
    words: tuple[Template, ...]
    array: bool = False
    append: bool = False
    element: bool = False


@dataclass(frozen=True)
class Simple:
    """Assignments and the words of a command."""

    line: int
    assignments: tuple[Assignment, ...]
    words: tuple[Template, ...]


@dataclass(frozen=True)
class Sum:
    """`((...))`; true where the value is not zero."""

    line: int
    text: str


@dataclass(frozen=True)
class Test:
    """`[[ ... ]]`: words, and the operators between them as texts."""

    line: int
    tokens: tuple[Template | str, ...]


@dataclass(frozen=True)
class Group:
    """`{ ... }`, or with `apart` `( ... )` and what else runs in a shell of its own."""

    line: int
    body: tuple[Node, ...]
    apart: bool


@dataclass(frozen=True)
class Choice:
    """`if`, with a branch for each `elif`; the branch for `else` has no condition."""

    line: int
    branches: tuple[tuple[tuple[Node, ...] | None, tuple[Node, ...]], ...]


@dataclass(frozen=True)
class Loop:
    """`while` and `until`; without a condition a loop over numbers, `for ((...))`, which is not counted."""

    line: int
    condition: tuple[Node, ...] | None
    body: tuple[Node, ...]
    until: bool = False


@dataclass(frozen=True)
class Each:
    """`for name in words`; without words over the script's arguments."""

    line: int
    name: str
    words: tuple[Template, ...] | None
    body: tuple[Node, ...]


@dataclass(frozen=True)
class Case:
    """`case word in`: the first branch of which a pattern fits."""

    line: int
    word: Template
    branches: tuple[tuple[tuple[Template, ...], tuple[Node, ...]], ...]


@dataclass(frozen=True)
class Function:
    """A function's definition."""

    line: int
    name: str
    body: Node


@dataclass(frozen=True)
class Chain:
    """Commands between `&&` and `||`."""

    line: int
    first: Node
    rest: tuple[tuple[str, Node], ...]


@dataclass(frozen=True)
class Pipe:
    """Commands between `|`, each in a shell of its own; `negated` by `!`."""

    line: int
    parts: tuple[Node, ...]
    negated: bool


Node: TypeAlias = Union[  # noqa: UP007  the classes name it before it is made
    Simple, Sum, Test, Group, Choice, Loop, Each, Case, Function, Chain, Pipe
]
