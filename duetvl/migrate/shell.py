"""Reads what a shell script says, and runs nothing of it.

Assignments, arrays, quotes, continued lines, `$NAME`, `${NAME:-default}` and `$((sums))` are followed from the top to
the bottom. Commands are looked at, never run: what only running them would tell, such as `$(wc -l < hosts)`, is marked
as missing with the reason, and whoever needs the value can ask the user for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from duetvl.core.errors import ConfigError

_NAME: Final = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)(\+?)=(\(?)")
_HEREDOC: Final = re.compile(r"<<-?[ \t]*(['\"]?)([\w.-]+)\1")
_REDIRECT: Final = re.compile(r"\d*[<>][<>&|]*|&>>?")
_SPECIAL: Final = "@*#?$!-0123456789"
_ENDS: Final = " \t\n;&|<>()"
# Words after which a command may still begin with assignments.
_BEFORE_A_COMMAND: Final = {
    "if", "then", "else", "elif", "do", "while", "until", "{", "}", "!", "export", "declare", "local", "readonly",
    "typeset",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A stretch of a word. command: of its output nothing is known."""

    kind: Literal["text", "variable", "sum", "command"]
    text: str
    quoted: bool = False


Template = tuple[Part, ...]


@dataclass(frozen=True)
class Assignment:
    """`name=word`, `name=(word word)`, or with `append` the same with `+=`."""

    name: str
    words: tuple[Template, ...]
    array: bool = False
    append: bool = False


@dataclass(frozen=True)
class Command:
    """A simple command; several are made of a pipe or a list."""

    line: int
    assignments: tuple[Assignment, ...]
    words: tuple[Template, ...]


def commands(text: str) -> Iterator[Command]:
    """The simple commands of a script in their order. Raises ConfigError for a quote or bracket without its end."""
    return _Scanner(text.replace("\r\n", "\n").replace("\0", "")).commands()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def commands(self) -> Iterator[Command]:
        while self.at < len(self.text):
            line = self.line()
            assignments, words = self._command()
            if assignments or words:
                yield Command(line, tuple(assignments), tuple(words))

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def _command(self) -> tuple[list[Assignment], list[Template]]:
        assignments: list[Assignment] = []
        words: list[Template] = []
        while self._blank():
            if self._redirect():
                continue
            if self.text[self.at] in _ENDS:
                self.at += 1
                break
            found = _ASSIGNMENT.match(self.text, self.at)
            if found and all(_plain(word) in _BEFORE_A_COMMAND for word in words):
                assignments.append(self._assignment(found))
            else:
                words.append(self._word())
        return assignments, words

    def _blank(self) -> bool:
        """Go over blanks, continued lines and a comment; whether anything follows."""
        found = re.compile(r"(?:[ \t]|\\\n)*(?:#[^\n]*)?").match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at < len(self.text)

    def _redirect(self) -> bool:
        """Go over `> file`, `2>&1`, and the lines of a here-document."""
        if found := _HEREDOC.match(self.text, self.at):
            end = re.compile(rf"^\s*{re.escape(found[2])}$", re.MULTILINE).search(self.text, found.end())
            self.at = end.end() if end else len(self.text)
            return True
        found = _REDIRECT.match(self.text, self.at)
        if not found:
            return False
        self.at = found.end()
        if self._blank() and self.text[self.at] not in _ENDS:
            self._word()
        return True

    def _assignment(self, found: re.Match[str]) -> Assignment:
        self.at = found.end()
        if not found[3]:
            return Assignment(found[1], (self._word(),), append=bool(found[2]))
        words, begun = [], self.at
        while self._blank() and self.text[self.at] != ")":
            if self.text[self.at] in _ENDS:
                self.at += 1
            else:
                words.append(self._word())
        if self.at >= len(self.text):
            raise self._open("(", begun)
        self.at += 1
        return Assignment(found[1], tuple(words), array=True, append=bool(found[2]))

    def _word(self) -> Template:
        parts: list[Part] = []
        while self.at < len(self.text) and self.text[self.at] not in _ENDS:
            letter = self.text[self.at]
            if letter == "'":
                parts.append(Part("text", self._until("'", self.at + 1), quoted=True))
            elif letter == '"':
                parts += self._double_quoted()
            elif letter == "\\":
                parts.append(Part("text", self.text[self.at + 1 : self.at + 2].replace("\n", ""), quoted=True))
                self.at += 2
            elif letter in "$`":
                parts.append(self._expansion(quoted=False))
            else:
                begun = self.at
                while self.at < len(self.text) and self.text[self.at] not in _ENDS + "'\"\\$`":
                    self.at += 1
                parts.append(Part("text", self.text[begun : self.at]))
        return tuple(parts)

    def _double_quoted(self) -> Iterator[Part]:
        begun = self.at
        self.at += 1
        plain = ""
        while self.at < len(self.text):
            letter = self.text[self.at]
            if letter == '"':
                self.at += 1
                yield Part("text", plain, quoted=True)
                return
            if letter in "$`":
                yield Part("text", plain, quoted=True)
                plain = ""
                yield self._expansion(quoted=True)
            elif letter == "\\" and self.text[self.at + 1 : self.at + 2] in tuple('$`"\\\n'):
                plain += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            else:
                plain += letter
                self.at += 1
        raise self._open('"', begun)

    def _expansion(self, quoted: bool) -> Part:
        if self.text[self.at] == "`":
            return Part("command", self._until("`", self.at + 1), quoted)
        rest = self.text[self.at + 1 : self.at + 3]
        if rest == "((":
            return Part("sum", self._bracketed("(", ")", 1)[1:-1], quoted)
        if rest[:1] == "(":
            return Part("command", self._bracketed("(", ")", 1), quoted)
        if rest[:1] == "{":
            return Part("variable", self._bracketed("{", "}", 1), quoted)
        found = _NAME.match(self.text, self.at + 1)
        name = found[0] if found else rest[:1] if rest[:1] and rest[:1] in _SPECIAL else ""
        self.at += 1 + len(name)
        return Part("variable", name, quoted) if name else Part("text", "$", quoted)

    def _bracketed(self, opening: str, closing: str, skip: int) -> str:
        """The text between brackets, which may hold more of them, and quotes."""
        begun = self.at + skip
        depth, at, quote = 0, begun, ""
        while at < len(self.text):
            letter = self.text[at]
            if letter == "\\":
                at += 1
            elif quote:
                quote = "" if letter == quote else quote
            elif letter in "'\"":
                quote = letter
            elif letter in (opening, closing):
                depth += 1 if letter == opening else -1
                if not depth:
                    self.at = at + 1
                    return self.text[begun + 1 : at]
            at += 1
        raise self._open(opening, begun)

    def _until(self, end: str, begun: int) -> str:
        found = self.text.find(end, begun)
        if found < 0:
            raise self._open(end, begun - 1)
        self.at = found + 1
        return self.text[begun:found]

    def _open(self, what: str, at: int) -> ConfigError:
        return ConfigError(f"line {self.text.count(chr(10), 0, at) + 1}: {what} is not closed")


def _plain(word: Template) -> str:
    return word[0].text if len(word) == 1 and word[0].kind == "text" and not word[0].quoted else ""


def double_quoted(text: str) -> Template:
    """The parts of a text as between double quotes."""
    return _Scanner(f'"{text}"')._word()


def plain(word: Template) -> str:
    """A word without quotes and expansions; empty for any other."""
    return _plain(word)
