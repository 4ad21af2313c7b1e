"""The grammar of shell scripts. What is not in it is refused with its line; nothing is passed over."""

from __future__ import annotations

import re
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.shell.syntax import (
    Assignment,
    Case,
    Chain,
    Choice,
    Each,
    Function,
    Group,
    Loop,
    Node,
    Part,
    Pipe,
    Simple,
    Sum,
    Template,
    Test,
    plain,
)

ASSIGNING: Final = frozenset({"export", "declare", "local", "readonly", "typeset"})
_NAME: Final = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PARAMETER: Final = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!-]", re.ASCII)
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)(\[[^\]\n]*\])?(\+?)=(\(?)", re.ASCII)
_REDIRECT: Final = re.compile(r"(?:\d+|\{\w+\})?(<<<|<<-?|<>|<&|>&|>>|>\||<|>)|(&>>?)", re.ASCII)
_RESERVED: Final = re.compile(r"(?:[a-z]+|[{}!]|\[\[|\]\])(?=[\s;&|<>()]|$)", re.ASCII)
_INNER: Final = ("then", "elif", "else", "fi", "do", "done", "esac", "}")
_OPERATOR: Final = re.compile(r":[-=?+]|[-=?+]|%%|%|##|#")
_ENDS: Final = " \t\n;&|<>()"
_SPECIAL: Final = "@*#?$!-0123456789"


def parse(text: str) -> tuple[Node, ...]:
    """The commands of a script. Raises ConfigError, which begins with the line, for what is not read."""
    return _Parser(text).script()


def double_quoted(text: str) -> Template:
    """The parts of a text as between double quotes."""
    return tuple(_Parser(text).quoted_parts(""))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.documents: list[tuple[str, bool]] = []  # ends of here-documents that begin at the next line

    # -- places ---------------------------------------------------------------------------------------------------

    def error(self, what: str, at: int | None = None) -> ConfigError:
        line = self.text.count("\n", 0, self.at if at is None else at) + 1
        return ConfigError(f"line {line}: {what}")

    def line(self) -> int:
        return self.text.count("\n", 0, self.at) + 1

    def char(self) -> str:
        return self.text[self.at : self.at + 1]

    def starts(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def reserved(self) -> str:
        found = _RESERVED.match(self.text, self.at)
        return found[0] if found else ""

    def blank(self) -> None:
        """Go over blanks, continued lines and a comment."""
        while found := re.compile(r"[ \t]+|\\\n").match(self.text, self.at):
            self.at = found.end()
        if self.char() == "#" and (not self.at or self.text[self.at - 1] in _ENDS):
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
        while self.at < len(self.text):
            line = self.text[self.at : self.end_of_line()]
            self.at = min(self.end_of_line() + 1, len(self.text))
            if (line.lstrip("\t") if indented else line) == end:
                return

    def end_of_line(self) -> int:
        found = self.text.find("\n", self.at)
        return len(self.text) if found < 0 else found

    def expect(self, word: str) -> None:
        """Go over a reserved word or a sign, which has to stand here."""
        self.lines()
        found = self.reserved() if word.isalpha() or word in "{}" else self.text[self.at : self.at + len(word)]
        if found != word:
            raise self.error(f"expected {word!r}, found {self.text[self.at : self.end_of_line()][:20].strip()!r}")
        self.at += len(word)

    # -- commands -------------------------------------------------------------------------------------------------

    def script(self) -> tuple[Node, ...]:
        nodes = self.commands()
        if self.at < len(self.text):
            raise self.error(f"{self.text[self.at : self.end_of_line()][:20].strip()!r} is not expected here")
        return nodes

    def commands(self, *ends: str) -> tuple[Node, ...]:
        """Commands up to one of these reserved words, a closing bracket, or the end of a case's branch."""
        nodes: list[Node] = []
        while True:
            self.lines()
            if self.char() in ("", ")") or self.starts(";;") or self.starts(";&") or self.reserved() in ends:
                return tuple(nodes)
            line, node = self.line(), self.chain()
            self.blank()
            if self.char() == "&":
                node = Group(line, (node,), apart=True)
                self.at += 1
            elif self.char() == ";" and self.text[self.at + 1 : self.at + 2] not in (";", "&"):
                self.at += 1
            elif self.char() not in ("", "\n", ")", ";"):
                raise self.error(f"{self.char()!r} is not expected here")
            nodes.append(node)

    def chain(self) -> Node:
        line, first = self.line(), self.pipe()
        rest: list[tuple[str, Node]] = []
        self.blank()
        while (sign := self.text[self.at : self.at + 2]) in ("&&", "||"):
            self.at += 2
            self.lines()
            rest.append((sign, self.pipe()))
            self.blank()
        return Chain(line, first, tuple(rest)) if rest else first

    def pipe(self) -> Node:
        line, negated = self.line(), False
        while (word := self.reserved()) in ("!", "time"):
            self.at += len(word)
            negated ^= word == "!"
            self.blank()
            if word == "time" and re.compile(r"-p(?=\s)").match(self.text, self.at):
                self.at += 2
                self.blank()
        parts = [self.command()]
        self.blank()
        while self.char() == "|" and not self.starts("||"):
            self.at += 2 if self.starts("|&") else 1
            self.lines()
            parts.append(self.command())
            self.blank()
        return Pipe(line, tuple(parts), negated) if negated or len(parts) > 1 else parts[0]

    def command(self) -> Node:
        compound = {
            "{": self.group, "if": self.choice, "while": self.loop, "until": self.loop, "for": self.each,
            "case": self.case, "function": self.function, "[[": self.test,
        }.get(self.reserved())  # fmt: skip
        if self.char() == "(":
            compound = self.bracket
        elif self.reserved() in ("select", "coproc"):
            raise self.error(f"{self.reserved()} is not followed; write what it does into a copy of the script")
        elif self.reserved() in _INNER:
            raise self.error(f"{self.reserved()!r} is not expected here")
        if compound is None:
            return self.simple()
        node = compound()
        self.blank()
        while self.redirect():
            self.blank()
        return node

    def group(self) -> Node:
        line = self.line()
        self.at += 1
        body = self.commands("}")
        self.expect("}")
        return Group(line, body, apart=False)

    def bracket(self) -> Node:
        line, begun = self.line(), self.at
        if self.starts("(("):
            inner = self.bracketed("(", ")")
            if inner.startswith("(") and inner.endswith(")"):
                return Sum(line, inner[1:-1])
            self.at = begun
        self.at += 1
        body = self.commands()
        if self.char() != ")":
            raise self.error("( is not closed", begun)
        self.at += 1
        return Group(line, body, apart=True)

    def choice(self) -> Node:
        line = self.line()
        self.at += len("if")
        branches: list[tuple[tuple[Node, ...] | None, tuple[Node, ...]]] = []
        while True:
            condition = self.commands("then")
            self.expect("then")
            branches.append((condition, self.commands("elif", "else", "fi")))
            word = self.reserved()
            self.expect(word if word in ("elif", "else") else "fi")
            if word == "elif":
                continue
            if word == "else":
                branches.append((None, self.commands("fi")))
                self.expect("fi")
            return Choice(line, tuple(branches))

    def loop(self) -> Node:
        line, word = self.line(), self.reserved()
        self.at += len(word)
        return Loop(line, self.commands("do"), self.do(), until=word == "until")

    def do(self) -> tuple[Node, ...]:
        self.lines()
        self.expect("do")
        body = self.commands("done")
        self.expect("done")
        return body

    def each(self) -> Node:
        line = self.line()
        self.at += len("for")
        self.blank()
        if self.starts("(("):
            self.bracketed("(", ")")
            self.separator()
            return Loop(line, None, self.do())
        name = self.name()
        self.lines()
        words: list[Template] | None = None
        if self.reserved() == "in":
            self.at += len("in")
            words = []
            self.blank()
            while self.char() not in ("", *_ENDS):
                words.append(self.word())
                self.blank()
        self.separator()
        return Each(line, name, None if words is None else tuple(words), self.do())

    def separator(self) -> None:
        self.blank()
        if self.char() == ";":
            self.at += 1

    def name(self) -> str:
        found = _NAME.match(self.text, self.at)
        if not found:
            raise self.error(f"expected a name, found {self.text[self.at : self.end_of_line()][:20]!r}")
        self.at = found.end()
        return found[0]

    def case(self) -> Node:
        line = self.line()
        self.at += len("case")
        self.blank()
        word = self.word()
        self.lines()
        self.expect("in")
        self.lines()
        branches: list[tuple[tuple[Template, ...], tuple[Node, ...]]] = []
        while self.reserved() != "esac":
            patterns = self.patterns()
            branches.append((patterns, self.commands("esac")))
            if self.starts(";&") or self.starts(";;&"):
                raise self.error("a branch of a case that goes on with the next one is not followed")
            if not self.starts(";;"):
                break
            self.at += 2
            self.lines()
        self.expect("esac")
        return Case(line, word, tuple(branches))

    def patterns(self) -> tuple[Template, ...]:
        if self.char() == "(":
            self.at += 1
        found: list[Template] = []
        while True:
            self.blank()
            found.append(self.word())
            self.blank()
            sign = self.char()
            if sign not in ("|", ")") or not found[-1]:
                raise self.error("a pattern of a case is not read")
            self.at += 1
            if sign == ")":
                return tuple(found)

    def function(self) -> Node:
        line = self.line()
        self.at += len("function")
        self.blank()
        return self.body_of(line, plain(self.word()))

    def body_of(self, line: int, name: str) -> Node:
        self.blank()
        found = re.compile(r"\([ \t]*\)").match(self.text, self.at)
        self.at = found.end() if found else self.at
        self.lines()
        if not name or not (
            self.char() == "(" or self.reserved() in ("{", "if", "while", "until", "for", "case", "[[")
        ):
            raise self.error("a function is not read")
        return Function(line, name, self.command())

    def test(self) -> Node:
        line, tokens = self.line(), list[Template | str]()
        self.at += 2
        while True:
            self.lines()
            if self.reserved() == "]]":
                self.at += 2
                return Test(line, tuple(tokens))
            sign = next((sign for sign in ("&&", "||", "(", ")", "<", ">") if self.starts(sign)), "")
            if sign:
                self.at += len(sign)
                tokens.append(sign)
            elif self.char() in ("", ";", "&", "|"):
                raise self.error("[[ is not closed")
            else:
                tokens.append(
                    self.word(regex=bool(tokens) and not isinstance(tokens[-1], str) and plain(tokens[-1]) == "=~")
                )

    # -- simple commands ------------------------------------------------------------------------------------------

    def simple(self) -> Node:
        line, assignments, words = self.line(), list[Assignment](), list[Template]()
        while True:
            self.blank()
            if self.redirect():
                continue
            if self.char() == "(" and len(words) == 1 and not assignments:
                return self.body_of(line, plain(words[0]))
            if self.char() in ("", *_ENDS) and not self.starts("<(") and not self.starts(">("):
                break
            found = _ASSIGNMENT.match(self.text, self.at)
            if found and (not words or plain(words[0]) in ASSIGNING):
                assignments.append(self.assignment(found))
            else:
                words.append(self.word())
        if not words and not assignments and self.char() in ("(", ")", "&", "|", ";"):
            raise self.error(f"{self.char()!r} is not expected here")
        return Simple(line, tuple(assignments), tuple(words))

    def redirect(self) -> bool:
        """Go over `> file` and `2>&1`; the lines of a here-document follow with the next end of a line."""
        if self.starts("<(") or self.starts(">("):
            return False
        found = _REDIRECT.match(self.text, self.at)
        if not found:
            return False
        self.at = found.end()
        self.blank()
        target = self.word()
        if not target:
            raise self.error(f"{found[0]} leads nowhere")
        if (found[1] or "").rstrip("-") == "<<":
            self.documents.append(("".join(part.text for part in target), found[1] == "<<-"))
        return True

    def assignment(self, found: re.Match[str]) -> Assignment:
        name, element, append = found[1], bool(found[2]), bool(found[3])
        self.at = found.end()
        if not found[4]:
            return Assignment(name, (self.word(),), append=append, element=element)
        words, begun = list[Template](), self.at - 1
        self.lines()
        while self.char() != ")":
            if self.char() in ("", *_ENDS):
                raise self.error("( is not closed", begun)
            if self.char() == "[":
                element = True
            words.append(self.word())
            self.lines()
        self.at += 1
        return Assignment(name, tuple(words), array=True, append=append, element=element)

    # -- words ----------------------------------------------------------------------------------------------------

    def word(self, *, closing: str = "", regex: bool = False) -> Template:
        """The parts of a word, which ends at a blank or sign, or with `closing` at that alone."""
        ends = closing or (" \t\n" if regex else _ENDS)
        parts: list[Part] = []
        while self.at < len(self.text):
            letter = self.char()
            if not closing and letter in "<>" and self.text[self.at + 1 : self.at + 2] == "(":
                parts.append(self.process())
            elif letter in ends:
                break
            elif letter == "'":
                parts.append(Part("text", self.until("'"), quoted=True))
            elif letter == '"':
                self.at += 1
                parts += self.quoted_parts('"')
            elif letter == "\\":
                escaped = self.text[self.at + 1 : self.at + 2]
                self.at += 2
                if escaped != "\n":
                    parts.append(Part("text", escaped or "\\", quoted=True))
            elif letter in "$`":
                parts.append(self.expansion(quoted=False))
            else:
                begun = self.at
                while self.at < len(self.text) and self.text[self.at] not in ends + "'\"\\$`":
                    self.at += 1
                parts.append(Part("text", self.text[begun : self.at]))
        return tuple(parts)

    def process(self) -> Part:
        begun = self.at
        self.at += 1
        self.bracket()
        return Part("unread", self.text[begun : self.at])

    def quoted_parts(self, end: str, closing: str = "") -> list[Part]:
        """Parts up to the quote `end`, which is gone over, or up to `closing`, which is not.

        There is an empty part for `""` alone: `"$@"` without arguments is no word.
        """
        begun, parts, text = self.at - 1, list[Part](), ""
        while self.at < len(self.text) or not (end or closing):
            letter = self.char()
            if letter in '$`"' or letter in (end, closing):
                parts += [Part("text", text, quoted=True)] if text else []
                text = ""
            if letter in (end, closing):
                self.at += letter == end
                return parts or [Part("text", "", quoted=True)]
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

    def expansion(self, *, quoted: bool) -> Part:
        begun = self.at
        if self.char() == "`":
            self.backquoted()
            return Part("command", self.text[begun + 1 : self.at - 1], quoted)
        self.at += 1
        if self.char() == "(":
            if self.starts("(("):
                inner = self.bracketed("(", ")")
                if inner.startswith("(") and inner.endswith(")"):
                    return Part("sum", inner[1:-1], quoted, operand=double_quoted(inner[1:-1]))
                self.at = begun + 1
            self.bracket()
            return Part("command", self.text[begun + 2 : self.at - 1], quoted)
        if self.char() == "{":
            return self.braces(quoted)
        if self.char() == "[":
            self.bracketed("[", "]")
            return Part("unread", self.text[begun : self.at], quoted)
        if not quoted and self.char() in ("'", '"'):
            return self.special_quotes(begun)
        found = _NAME.match(self.text, self.at)
        name = found[0] if found else self.char() if self.char() and self.char() in _SPECIAL else ""
        self.at += len(name)
        return Part("variable", name, quoted) if name else Part("text", "$", quoted)

    def special_quotes(self, begun: int) -> Part:
        """`$'...'`, whose escapes are not read, and `$"..."`, which is left to be read as `"..."`."""
        if self.char() == '"':
            return Part("text", "", quoted=True)
        self.at += 1
        while self.char() not in ("", "'"):
            self.at += 2 if self.char() == "\\" else 1
        if not self.char():
            raise self.error("' is not closed", begun)
        self.at += 1
        text = self.text[begun + 2 : self.at - 1]
        return Part("unread", self.text[begun : self.at], quoted=True) if "\\" in text else Part("text", text, True)

    def braces(self, quoted: bool) -> Part:
        """`${...}`, from its brace on."""
        begun = self.at
        self.at += 1
        length = self.char() == "#" and self.text[self.at + 1 : self.at + 2] not in (
            "}",
            "-",
            "=",
            "?",
            "+",
            ":",
            "%",
            "#",
        )
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
        readable = name and (bool(sign) or not operand) and not (length and sign) and index in ("", "@", "*", "0")
        if not readable or (index in ("@", "*") and sign.lstrip(":") in ("=", "%", "%%", "#", "##")):
            return Part("unread", source, quoted)
        return Part("variable", name, quoted, index, "length" if length else sign, operand)

    def operand(self, quoted: bool, begun: int) -> Template:
        parts = self.quoted_parts("", "}") if quoted else self.word(closing="}")
        if self.char() != "}":
            raise self.error("${ is not closed", begun)
        self.at += 1
        return tuple(part for part in parts if part.kind != "text" or part.text or not quoted)

    def backquoted(self) -> None:
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
