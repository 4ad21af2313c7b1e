"""Messages stay on one line and short, whatever they quote."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from duetvl.core.errors import LONGEST, ConfigError, DataError, did_you_mean, one_line, shown


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "a\nb\r\x1b[31m\u2028\u202e\ud800",
        "x" * 10**6,
        b"\n" * 10**6,
        {"key\n" * 100: "v\n" * 100, **{str(n): n for n in range(1000)}},
        [["a\n" * 1000] * 1000] * 1000,
        nested(5000),
        np.zeros((100, 100)),
        10**5000,
        None,
    ],
    ids=range(9),
)
def test_values_are_shown_short_and_on_one_line(value):
    for text in (shown(value), str(DataError(f"{value if isinstance(value, str) else shown(value)} is no path"))):
        assert text.encode() and text.isprintable()
        assert len(text) <= LONGEST
    assert len(shown(value)) <= 400


def test_short_values_are_shown_as_they_are():
    for value in ("a'b", "é 你", b"ab", 3, None, [1, "a"], {"a": [1, 2]}, 0.5):
        assert shown(value) == repr(value)
    assert shown("x" * 100, 10) == "'xxxxxxxxxx'... (100 in all)"


def test_a_message_is_cut_in_its_middle_and_only_once():
    error = ConfigError("first " + "x" * 10_000 + " last\n")
    assert str(error).startswith("first xxx") and str(error).endswith(r" last\n")
    assert "... (10012 characters) ..." in str(error) and len(str(error)) == LONGEST
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == one_line(str(error))


def test_names_of_any_length_have_a_hint():
    assert did_you_mean("lr" + "x" * 10**6, ["lr", "beta"]) == "; there are beta, lr"
