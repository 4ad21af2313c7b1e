"""The words of shell scripts: quotes, expansions and here-documents."""

from __future__ import annotations

import re
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.syntax import Template, WordPart

NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
ENDS: Final = " \t\n;&|<>()"
_PARAMETER: Final = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!-]", re.ASCII)
_RESERVED: Final = re.compile(r"(?:[a-z]+|[{}!]|\[\[|\]\])(?=[\s;&|<>()]|$)", re.ASCII)
_OPERATOR: Final = re.compile(r":[-=?+]|[-=?+]|%%|%|##|#")
_SPECIAL: Final = "@*#?$!-0123456789"


def double_quoted(text: str) -> Template:
    """The parts of a text as between double quotes."""
    return tuple(WordReader(text).quoted_parts(""))


class WordReader:
    """A script and the place in it up to which it is read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.documents: list[tuple[str, bool]] = []  # ends of here-documents that begin at the next line
        self._counted = (0, 1)  # a place and its line

    def pass_commands(self) -> None:
        """Go over `( commands )`, of which only a reader of commands knows the end for certain."""
        self.bracketed("(", ")")

    # -- places ---------------------------------------------------------------------------------------------------

    def error(self, what: str, at: int | None = None) -> ConfigError:
        """An error of this place, or of another one."""
        line = self.text.count("\n", 0, self.at if at is None else at) + 1
        return ConfigError(f"line {line}: {what}")

    def line(self) -> int:
        """The number of the line, from 1."""
        at, line = self._counted if self._counted[0] <= self.at else (0, 1)
        self._counted = self.at, line + self.text.count("\n", at, self.at)
        return self._counted[1]

    def char(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.at : self.at + 1]

    def starts(self, text: str) -> bool:
        """Whether this text comes next."""
        return self.text.startswith(text, self.at)

    def reserved(self) -> str:
        """A word that may be a reserved one, if one comes next."""
        found = _RESERVED.match(self.text, self.at)
        return found[0] if found else ""

    def blank(self) -> None:
        """Go over blanks, continued lines and a comment."""
        while found := re.compile(r"[ \t]+|\\\n").match(self.text, self.at):
            self.at = found.end()
        if self.char() == "#" and (not self.at or self.text[self.at - 1] in ENDS):
            self.at = self.end_of_line()

    def lines(self) -> None:
        """Go over blanks, comments and ends of lines, with the here-documents that follow them."""
        self.blank()
        while self.char() == "\n":
            self.at += 1
            for end, indented in self.documents:
                self.document(end, indented)
            self.documents.clear()
            self.blank()

    def document(self, end: str, indented: bool) -> None:
        """Go over the lines of a here-document and its end."""
        while self.at < len(self.text):
            line = self.text[self.at : self.end_of_line()]
            self.at = min(self.end_of_line() + 1, len(self.text))
            if (line.lstrip("\t") if indented else line) == end:
                return

    def end_of_line(self) -> int:
        """The place of the next end of a line, or of the text."""
        found = self.text.find("\n", self.at)
        return len(self.text) if found < 0 else found

    # -- words ----------------------------------------------------------------------------------------------------

    def word(self, *, closing: str = "", regex: bool = False) -> Template:
        """The parts of a word, which ends at a blank or sign, or with `closing` at that alone."""
        ends = closing or (" \t\n" if regex else ENDS)
        parts: list[WordPart] = []
        while self.at < len(self.text):
            letter = self.char()
            if not closing and letter in "<>" and self.text[self.at + 1 : self.at + 2] == "(":
                parts.append(self.process())
            elif letter in ends:
                break
            elif letter == "'":
                parts.append(WordPart("text", self.until("'"), quoted=True))
            elif letter == '"':
                self.at += 1
                parts += self.quoted_parts('"')
            elif letter == "\\":
                escaped = self.text[self.at + 1 : self.at + 2]
                self.at += 2
                if escaped != "\n":
                    parts.append(WordPart("text", escaped or "\\", quoted=True))
            elif letter in "$`":
                parts.append(self.expansion(quoted=False))
            else:
                begun = self.at
                while self.at < len(self.text) and self.text[self.at] not in ends + "'\"\\$`":
                    self.at += 1
                parts.append(WordPart("text", self.text[begun : self.at]))
        return tuple(parts)

    def process(self) -> WordPart:
        """`<(commands)`."""
        begun = self.at
        self.at += 1
        self.pass_commands()
        return WordPart("unread", self.text[begun : self.at])

    def quoted_parts(self, end: str, closing: str = "") -> list[WordPart]:
        """Parts up to the quote `end`, which is gone over, or up to `closing`, which is not.

        There is an empty part for `""` alone: `"$@"` without arguments is no word.
        """
        begun, parts, text = self.at - 1, list[WordPart](), ""
        while self.at < len(self.text) or not (end or closing):
            letter = self.char()
            if letter in '$`"' or letter in (end, closing):
                parts += [WordPart("text", text, quoted=True)] if text else []
                text = ""
            if letter in (end, closing):
                self.at += letter == end
                return parts or [WordPart("text", "", quoted=True)]
            if letter in "$`":
                parts.append(self.expansion(quoted=True))
            elif letter == '"' and closing:
                self.at += 1
                parts += self.quoted_parts('"')
            elif letter == "\\" and self.text[self.at + 1 : self.at + 2] in tuple(f'$`"\\\n{closing}'):
                text += self.text[self.at + 1].replace("\n", "")
                self.at += 2
            else:
                text += letter
                self.at += 1
        raise self.error(f"{end or '${'} is not closed", begun)

    def expansion(self, *, quoted: bool) -> WordPart:
        """What begins with `$` or a backquote."""
        begun = self.at
        if self.char() == "`":
            self.backquoted()
            return WordPart("command", self.text[begun + 1 : self.at - 1], quoted)
        self.at += 1
        if self.char() == "(":
            if self.starts("(("):
                inner = self.bracketed("(", ")")
                if inner.startswith("(") and inner.endswith(")"):
                    return WordPart("sum", inner[1:-1], quoted, operand=double_quoted(inner[1:-1]))
                self.at = begun + 1
            self.pass_commands()
            return WordPart("command", self.text[begun + 2 : self.at - 1], quoted)
        if self.char() == "{":
            return self.braces(quoted)
        if self.char() == "[":
            self.bracketed("[", "]")
            return WordPart("unread", self.text[begun : self.at], quoted)
        if not quoted and self.char() in ("'", '"'):
            return self.special_quotes(begun)
        found = NAME.match(self.text, self.at)
        name = found[0] if found else self.char() if self.char() and self.char() in _SPECIAL else ""
        self.at += len(name)
        return WordPart("variable", name, quoted) if name else WordPart("text", "$", quoted)

    def special_quotes(self, begun: int) -> WordPart:
        """`$'...'`, whose escapes are not read, and `$"..."`, which is left to be read as `"..."`."""
        if self.char() == '"':
            return WordPart("text", "", quoted=True)
        self.at += 1
        while self.char() not in ("", "'"):
            self.at += 2 if self.char() == "\\" else 1
        if not self.char():
            raise self.error("' is not closed", begun)
        self.at += 1
        text = self.text[begun + 2 : self.at - 1]
        return (
            WordPart("unread", self.text[begun : self.at], quoted=True)
            if "\\" in text
            else WordPart("text", text, True)
        )

    def braces(self, quoted: bool) -> WordPart:
        """`${...}`, from its brace on."""
        begun = self.at
        self.at += 1
        following = self.text[self.at + 1 : self.at + 2]
        length = self.char() == "#" and following not in tuple("}-=?+:%#")
        self.at += length
        found = _PARAMETER.match(self.text, self.at)
        name = found[0] if found else ""
        self.at += len(name)
        index = ""
        if name and self.char() == "[":
            index = self.bracketed("[", "]")
        operator = _OPERATOR.match(self.text, self.at)
        sign = operator[0] if operator else ""
        self.at += len(sign)
        operand = self.operand(quoted and sign.lstrip(":") in ("", "-", "=", "?", "+"), begun)
        source = self.text[begun - 1 : self.at]
        readable = (
            name
            and (bool(sign) or not operand)
            and not (length and sign)
            and (index in ("", "@", "*") or index.isdecimal())
        )
        if not readable or (index in ("@", "*") and sign.lstrip(":") in ("=", "%", "%%", "#", "##")):
            return WordPart("unread", source, quoted)
        return WordPart("variable", name, quoted, index, "length" if length else sign, operand)

    def operand(self, quoted: bool, begun: int) -> Template:
        """What follows the operator of `${...}`, up to its bracket, which is gone over."""
        parts = self.quoted_parts("", "}") if quoted else self.word(closing="}")
        if self.char() != "}":
            raise self.error("${ is not closed", begun)
        self.at += 1
        return tuple(part for part in parts if part.kind != "text" or part.text or not quoted)

    def backquoted(self) -> None:
        """Go over a command between backquotes."""
        begun = self.at
        self.at += 1
        while self.char() not in ("", "`"):
            self.at += 2 if self.char() == "\\" else 1
        if not self.char():
            raise self.error("` is not closed", begun)
        self.at += 1

    def bracketed(self, opening: str, closing: str) -> str:
        """The text between brackets, which may hold more of them, and quotes; goes over both."""
        begun, depth, quote = self.at, 0, ""
        while self.at < len(self.text):
            letter = self.char()
            self.at += 1
            if letter == "\\":
                self.at += 1
            elif quote:
                quote = "" if letter == quote else quote
            elif letter in "'\"":
                quote = letter
            elif letter in (opening, closing):
                depth += 1 if letter == opening else -1
                if not depth:
                    return self.text[begun + 1 : self.at - 1]
        raise self.error(f"{opening} is not closed", begun)

    def until(self, end: str) -> str:
        """The text between this quote and the next, which is gone over."""
        begun = self.at
        found = self.text.find(end, begun + 1)
        if found < 0:
            raise self.error(f"{end} is not closed", begun)
        self.at = found + 1
        return self.text[begun + 1 : found]
