"""The grammar of shell scripts. What is not in it is refused with its line; nothing is passed over."""

from __future__ import annotations

import re
from typing import Final

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
    Pipe,
    Simple,
    Sum,
    Template,
    Test,
    plain,
)
from duetvl.migrate.shell.words import ENDS, NAME, WordReader

ASSIGNING: Final = frozenset({"export", "declare", "local", "readonly", "typeset"})
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_]\w*)(\[[^\]\n]*\])?(\+?)=(\(?)", re.ASCII)
_REDIRECT: Final = re.compile(r"(?:\d+|\{\w+\})?(<<<|<<-?|<>|<&|>&|>>|>\||<|>)|(&>>?)", re.ASCII)
_INNER: Final = ("then", "elif", "else", "fi", "do", "done", "esac", "}")


def parse(text: str) -> tuple[Node, ...]:
    """The commands of a script. Raises ConfigError, which begins with the line, for what is not read."""
    return _Parser(text).script()


class _Parser(WordReader):
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

    def pass_commands(self) -> None:
        self.bracket()

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
            while self.char() not in ("", *ENDS):
                words.append(self.word())
                self.blank()
        self.separator()
        return Each(line, name, None if words is None else tuple(words), self.do())

    def separator(self) -> None:
        self.blank()
        if self.char() == ";":
            self.at += 1

    def name(self) -> str:
        found = NAME.match(self.text, self.at)
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
            if self.char() in ("", *ENDS) and not self.starts("<(") and not self.starts(">("):
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
            if self.char() in ("", *ENDS):
                raise self.error("( is not closed", begun)
            if self.char() == "[":
                element = True
            words.append(self.word())
            self.lines()
        self.at += 1
        return Assignment(name, tuple(words), array=True, append=append, element=element)

    def expect(self, word: str) -> None:
        """Go over a reserved word or a sign, which has to stand here."""
        self.lines()
        found = self.reserved() if word.isalpha() or word in "{}" else self.text[self.at : self.at + len(word)]
        if found != word:
            raise self.error(f"expected {word!r}, found {self.text[self.at : self.end_of_line()][:20].strip()!r}")
        self.at += len(word)
