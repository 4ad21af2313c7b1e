"""Text of growing answers: what is handed out is the whole text, whatever tokens it comes in; stop strings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from qwen_tokenizer import build_qwen_tokenizer

from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.output import Output, StopFinder, TextStream, check_stops, spelt
from duetvl.inference.request import Request
from duetvl.inference.sampling import TokenLogprob

PROMPT = Sample(np.array([1, 2], np.int64))
BYTES = TextTokenizer(tiny_run.tokenizer())


@pytest.fixture(scope="module")
def qwen() -> TextTokenizer:
    return TextTokenizer(build_qwen_tokenizer())


def request(**options) -> Request:
    return Request(PROMPT, **{"max_new_tokens": 10**6, **options})


def run(tokenizer: TextTokenizer, tokens, **options) -> tuple[list[str], Output, int]:
    """What is handed out after each token and at the end, and how many tokens were taken."""
    output, deltas = Output(request(**options), tokenizer), []
    for token in tokens:
        reason = output.add(int(token))
        deltas.append(output.text_delta())
        if reason is not None:
            break
    else:
        output.finish("cancelled")
        deltas.append(output.text_delta())
    assert "".join(deltas) == output.text
    return deltas, output, output.count


def letters(text: str | bytes) -> list[int]:
    """A token for each byte."""
    return [BYTES.encode(chr(byte))[0] if byte < 128 else byte_token(byte) for byte in _raw(text)]


def _raw(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def byte_token(byte: int) -> int:
    return next(number for number in range(256) if BYTES.bytes_of(number) == bytes([byte]))


# -- characters over tokens -------------------------------------------------------------------------------------------


def test_random_tokens_are_the_text_that_the_library_decodes(qwen):
    rng = np.random.default_rng(0)
    short = [number for number in range(qwen.largest_id + 1) if len(qwen.spelling(number)) <= 2]
    for length in (1, 2, 7, 40, 400):
        for _ in range(60):
            ids = np.where(rng.random(length) < 0.6, rng.choice(short, length), rng.integers(0, 151_700, length))
            deltas, output, _ = run(qwen, ids)
            assert output.text == qwen.decode(ids), ids
            assert len(deltas) == length + 1


@given(st.lists(st.integers(0, 300), max_size=40))
def test_bytes_that_are_no_text(ids):
    assert run(BYTES, ids)[1].text == BYTES.decode(ids)


def test_a_character_comes_when_it_is_whole():
    family = "\N{MAN}\u200d\N{WOMAN}\u200d\N{GIRL}"
    deltas, _, _ = run(BYTES, letters(family))
    assert deltas == ["", "", "", "\N{MAN}", "", "", "\u200d", "", "", "", "\N{WOMAN}", "", "", "\u200d", "", "", "",
                      "\N{GIRL}", ""]  # fmt: skip


def test_a_true_replacement_character_is_not_held_back():
    assert run(BYTES, letters("a\ufffdb"))[0] == ["a", "", "", "\ufffd", "b", ""]


def test_what_is_left_of_a_character_comes_at_the_end():
    half = letters("é")[:1]
    assert run(BYTES, [*letters("a"), *half])[0] == ["a", "", "\ufffd"]
    end = BYTES.token_id("<|im_end|>")
    deltas, output, _ = run(BYTES, [*half, end, *letters("b")], stop_ids=frozenset([end]))
    assert (deltas, output.finish_reason) == (["", "\ufffd"], "stop")


def test_control_tokens_are_no_text(qwen):
    ids = [qwen.token_id("<|im_end|>"), *qwen.encode("<tool_call> a"), 10**7]
    assert run(qwen, ids)[1].text == qwen.decode(ids)
    assert qwen.bytes_of(ids[0]) == b"" and qwen.spelling(ids[0]) == b"<|im_end|>"


def test_the_work_of_a_token_does_not_grow():
    """What is held is bounded, however long the answer."""
    stream, finder = TextStream(BYTES.bytes_of), StopFinder(("ab" * 20 + "c",))
    for token in letters("ab" * 2000):
        finder.add(stream.add(token))
        assert len(finder.held) <= 40


# -- stop strings -----------------------------------------------------------------------------------------------------


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stops_are_found_wherever_the_text_is_cut(text, stops, data):
    """As in the whole text, letter by letter: the stop that is complete first, the longest of those."""
    finder, told, found = StopFinder(tuple(stops)), "", False
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for piece in pieces:
        new, found = finder.add(piece)
        told += new
        if found:
            break
    ends = [(end, -len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    if ends:
        end, length = min(ends)
        assert (found, told) == (True, text[: end + length])
    else:
        assert (found, told + finder.finish()) == (False, text)


@pytest.mark.parametrize(
    ("text", "stops", "told"),
    [
        ("one STOP two", ("STOP",), "one "), ("STOSTOP", ("STOP",), "STO"), ("abcd", ("abc", "ab"), ""),
        ("abcd", ("abcx", "bc"), "a"), ("xabyabz", ("abz",), "xaby"), ("café!", ("é",), "caf"),
        ("no such", ("such as",), "no such"),
    ],
)  # fmt: skip
def test_stop_strings_over_tokens(text, stops, told):
    _, output, count = run(BYTES, letters(text), stop=stops)
    assert output.text == told
    stopped = told != text
    assert output.finish_reason == ("stop" if stopped else "cancelled")
    if stopped:  # the tokens of the stop string count
        stop = next(s for s in sorted(stops, key=len) if text.startswith(s, len(told)))
        assert count == len((told + stop).encode())


def test_no_more_is_held_back_than_may_be_a_stop():
    assert run(BYTES, letters("abab!"), stop=("abc",))[0] == ["", "", "ab", "", "ab!", ""]


def test_a_stop_among_the_first_tokens_is_none():
    _, output, count = run(BYTES, letters("a.b.c"), stop=(".",), min_new_tokens=2)
    assert (output.text, count, output.finish_reason) == ("a.b", 4, "stop")


def test_length_and_stop_ids():
    assert run(BYTES, letters("abcdef"), max_new_tokens=3)[1].finish_reason == "length"
    token = letters("c")[0]
    _, output, count = run(BYTES, letters("abcdef"), stop_ids=frozenset([token]), max_new_tokens=3)
    assert (output.finish_reason, count, output.text) == ("stop", 3, "abc")
    _, output, _ = run(BYTES, letters("aST"), stop=("STOP",), max_new_tokens=3)
    assert (output.finish_reason, output.text) == ("length", "aST")


@pytest.mark.parametrize("stops", ["STOP", ("",), ("a" * 257,), ("a",) * 17, (3,)])
def test_stops_that_make_no_sense(stops):
    with pytest.raises(ConfigError, match=r"^stop"):
        check_stops(stops)


def test_a_tokenizer_that_is_not_byte_level():
    from tokenizers import decoders

    other = tiny_run.tokenizer()
    other.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match="is not byte-level"):
        Output(request(), TextTokenizer(other))


# -- log-probabilities as they are written ----------------------------------------------------------------------------


def test_logprobs_of_parts_of_characters():
    first, second = letters("é")
    found = spelt(BYTES, TokenLogprob(first, -0.5, ((second, -1.0), (letters("a")[0], -2.0))))
    assert found["token"] == "\ufffd" and found["bytes"] == [0xC3] and found["logprob"] == -0.5
    assert [one["bytes"] for one in found["top_logprobs"]] == [[0xA9], [97]]
    assert json.loads(json.dumps(found))["top_logprobs"][1]["token"] == "a"
