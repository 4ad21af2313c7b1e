"""Calls in texts that come in pieces, and grammars that are kept."""

from __future__ import annotations

import random

import pytest
import tiny_run

from duetvl.core.errors import ConfigError
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.guided import Grammars
from duetvl.serving.calls import Call, CallReader
from duetvl.serving.grammars import KEPT, Grammar, KnownGrammars

TEXTS: list[tuple[str, list[str | tuple[str, str]]]] = [
    (
        'a <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"name": "g"}</tool_call> z ',
        ["a", ("f", '{"x": 1}'), ("g", "{}"), " z "],
    ),
    ("<tool_call>{bad}</tool_call> x", ["<tool_call>{bad}</tool_call> x"]),
    ('<tool_call>{"name": 1}</tool_call>', ['<tool_call>{"name": 1}</tool_call>']),
    ("hi <tool", ["hi <tool"]),
    ('<tool_call>{"name": "f"}', [("f", "{}")]),  # its end mark was the stop string
    ("a\n\n<b <tool_cal </tool_call>  z", ["a\n\n<b <tool_cal </tool_call>  z"]),
    ("<tool_call>" + "[" * 5000, ["<tool_call>" + "[" * 5000]),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_calls_are_found_wherever_the_text_is_cut(text: str, expected: list[str | tuple[str, str]]) -> None:
    for seed in range(20):
        cuts, reader = random.Random(seed), CallReader()
        pieces: list[str | Call] = []
        start = 0
        while start < len(text):
            stop = start + cuts.randint(1, 9 if len(text) < 1000 else 999)
            pieces += reader.take(text[start:stop])
            start = stop
        joined: list[str | tuple[str, str]] = []
        for piece in [*pieces, *reader.finish()]:
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                joined[-1] = joined[-1] + piece
            else:
                joined.append(piece if isinstance(piece, str) else (piece.name, piece.arguments))
        assert joined == expected


def test_grammars_are_kept_good_and_bad() -> None:
    pytest.importorskip("llguidance")
    tokenizer, made = tiny_run.tokenizer(), []

    def compiler() -> Grammars:
        made.append(1)
        size = tokenizer.get_vocab_size()
        return Grammars(TextTokenizer(tokenizer), size, [size - 1])

    known = KnownGrammars(compiler)
    first = known.guides(Grammar("choice", ["a"], "structured_outputs"))
    assert known.guides(Grammar("choice", ["a"], "response_format")) is first
    for _ in range(2):
        with pytest.raises(ConfigError, match="the pattern cannot be used"):
            known.guides(Grammar("regex", "(?=a)", "structured_outputs"))
    for number in range(KEPT):
        known.guides(Grammar("choice", [str(number)], "structured_outputs"))
    assert known.guides(Grammar("choice", ["a"], "structured_outputs")) is not first, "the oldest is gone"
    assert made == [1]
