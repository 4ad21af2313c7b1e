"""Answers that follow a grammar: JSON after a schema, a regular expression, one of some texts; by llguidance.

A grammar is compiled once, aside and within bounds, and each answer goes through a copy of it. Where the grammar is
complete, the tokens that end an answer are allowed, and nothing else where nothing can follow. An answer that is cut
off by its length need not be complete.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from duetvl.core.errors import ConfigError, first_line
from duetvl.data.tokenizer import TextTokenizer

LARGEST: Final = 64 * 1024  # characters of a grammar
SECONDS: Final = 5.0  # that compiling it may take
_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}
_AS_TRAINED: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Guide(Protocol):
    """Where one answer stands in its grammar."""

    def mask(self) -> np.ndarray:
        """The tokens that may come next, (V,) bool."""
        ...

    def take(self, token: int) -> None:
        """A token has been chosen."""
        ...


class Grammars:
    """Compiles grammars for one tokenizer; `ends` are the tokens that end an answer."""

    def __init__(self, tokenizer: TextTokenizer, vocabulary: int, ends: Sequence[int]):
        """ConfigError where llguidance is not installed, or nothing ends an answer."""
        try:
            import llguidance
        except ImportError:
            raise ConfigError("guided answers need llguidance: pip install 'duetvl[guided]'") from None
        if not ends:
            raise ConfigError("guided answers need a token that ends them; leave out ignore_eos")
        self._library: Any = llguidance
        self._ends, self._vocabulary = list(ends), vocabulary
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocabulary, eos_token=list(ends))

    def json_schema(self, schema: Any) -> Guides:
        """JSON that a schema (an object, or its text) allows. Without blanks that the schema does not ask for: a model
        that may write them can go on for ever."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self._check_size("the JSON schema", text)
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {first_line(error)}") from None
        return self._compiled("the JSON schema", grammar)

    def regex(self, pattern: str) -> Guides:
        """Texts that match the whole pattern (Rust's syntax: nothing is looked at ahead or behind)."""
        self._check_size("the pattern", pattern)
        return self._compiled("the pattern", self._library.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> Guides:
        """One of these texts."""
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ConfigError(f"a choice is between texts of at least one character, found {texts!r}")
        rule = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        self._check_size("the choice", rule)
        return self._compiled("the choice", self._library.LLMatcher.grammar_from_lark(rule))

    def calls(self, functions: Mapping[str, Any], *, most: int = 1) -> Guides:
        """One to `most` calls of functions, as training writes them (`data.formats.tools`).

        functions: name -> JSON schema of the arguments, None for those without any.
        """
        if not functions:
            raise ConfigError("there is no function to be called")
        more = f' ("\\n" call){{0,{most - 1}}}' if most > 1 else ""
        rules = [f"start: call{more}", "call: " + " | ".join(f"call_{number}" for number in range(len(functions)))]
        for number, (name, schema) in enumerate(functions.items()):
            head, tail = f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": ', "}\n</tool_call>"
            arguments = json.dumps({**(schema or _NO_ARGUMENTS), "x-guidance": _AS_TRAINED})
            rules.append(f"call_{number}: {json.dumps(head)} %json {arguments} {json.dumps(tail)}")
        rule = "\n".join(rules)
        self._check_size("the functions", rule)
        return self._compiled("the schema of a function", self._library.LLMatcher.grammar_from_lark(rule))

    def _check_size(self, what: str, text: str) -> None:
        if len(text) > LARGEST:
            raise ConfigError(f"{what} has {len(text)} characters; at most {LARGEST} are compiled")

    def _compiled(self, what: str, grammar: str) -> Guides:
        """Compile in a thread of its own; one that does not end in time is left to itself. ConfigError."""
        done: list[Any] = []

        def compile() -> None:
            done.append(self._library.LLMatcher(self._tokenizer, grammar, log_level=0))

        thread = threading.Thread(target=compile, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if not done:
            raise ConfigError(f"{what} is not compiled after {SECONDS:g} seconds; make it simpler")
        if done[0].is_error():
            raise ConfigError(f"{what} cannot be used: {_first_line(done[0])}")
        return Guides(done[0], self._ends, self._vocabulary)


class Guides:
    """A compiled grammar; called, it gives the guide of a new answer."""

    def __init__(self, matcher: Any, ends: Sequence[int], vocabulary: int):
        self._matcher, self._ends, self._vocabulary = matcher, list(ends), vocabulary

    def __call__(self) -> Guide:
        """A guide at the beginning."""
        return _Guide(self._matcher.deep_copy(), self._ends, self._vocabulary)


class _Guide:
    def __init__(self, matcher: Any, ends: Sequence[int], vocabulary: int):
        self._matcher, self._ends, self._vocabulary = matcher, ends, vocabulary

    def mask(self) -> np.ndarray:
        """See Guide."""
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool)
            if allowed.any():
                return allowed
        self._check()
        only = np.zeros(self._vocabulary, bool)
        only[self._ends] = True
        return only

    def take(self, token: int) -> None:
        """See Guide. ConfigError where the grammar has become too complex to follow."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the grammar cannot be followed further: {_first_line(self._matcher)}")


def _first_line(matcher: Any) -> str:
    return first_line(ValueError(matcher.get_error()))
