"""Choices and open answers as they are read, by literal tables."""

from __future__ import annotations

import pytest

from duetvl.evaluation.extraction import REFUSED, first_letter, open_matches, open_values, option_named

ANIMALS = {"A": "cat", "B": "dog", "C": "a bird", "D": "none"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"), ("A.", "A"), ("(B)", "B"), ("The answer is C", "C"), ("b", None), ("Answer: D", "D"),
        ("A cat is shown here in the picture", None), ("I think it is a dog", "B"), ("dog or cat", None), ("", None),
        ("A or B", None), ("The correct answer is **B**. Because A is wrong", "B"), ("None of the above", "D"),
        ("C\nbecause", "C"), ("**A**", "A"), ("A) cat", "A"), ("option A", "A"), ("A. cat\nB. dog", None),
        ("Sorry, I can't help with images of people yet.", REFUSED), ("Z", REFUSED),
        ("D is what one two three four sees", None),
    ],
)  # fmt: skip
def test_an_option_is_read_as_vlmevalkit_reads_it(answer: str, letter: str | None) -> None:
    assert option_named(answer, ANIMALS) == letter


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("red fox", {"A": "red", "B": "red fox"}, None),  # one text holds the other: not to be decided
        ("red", {"A": "red", "B": "red fox"}, "A"),
        ("I", {"A": "A", "B": "I"}, "B"),  # texts that are letters: of no option's letter, so read as a text
        ("A", {"A": "I", "B": "A"}, "A"),  # the letter comes first
        ("12", {"A": "2", "B": "12"}, None),  # numbers inside numbers
        ("None", {"A": "cat", "B": "None"}, "B"),
        ("E", {"A": "x", "E": "y"}, "E"),
        ("answer is e, not A or C, one two three four five", {"A": "x", "C": "z", "E": "y"}, None),  # A to D alone
        ("the answer is d: A and B are not what is seen in it at all", ANIMALS, "D"),
    ],
)  # fmt: skip
def test_options_that_are_hard_to_tell_apart(answer: str, options: dict[str, str], letter: str | None) -> None:
    assert option_named(answer, options) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("Because of D", "B"), ("Among them B", "A"), ("The answer is D", "D"), ("Answer: C", "A"), ("f", None)],
)  # fmt: skip
def test_mindie_takes_the_first_letter_anywhere(answer: str, letter: str | None) -> None:
    assert first_letter(answer, ANIMALS) == letter


@pytest.mark.parametrize(
    ("answer", "values"),
    [
        ("The answer is 5.", {5.0}), ("x = 3e2", {300.0, 2.0}), ("Paris", {"paris"}), ("is", {"is"}),
        ("So the total is 1,234.567 m", {"1,234.567 m", 1234.0, 234.57}), ("it is b", {" b", "b "}),
        ("Sum is 4\nso the final answer is oak tree", {4.0, "oak tree"}), ("It is :", {"it is :"}),
        ("12 is even. So is 14", {14.0}), ("9" * 20_000, {float("inf")}),
    ],
)  # fmt: skip
def test_open_answers_are_read_by_the_rule_of_mmmu(answer: str, values: set[str | float]) -> None:
    assert set(open_values(answer)) == values


@pytest.mark.parametrize(
    ("truths", "answer", "right"),
    [
        (("5",), "The answer is 5.", True), (("5.004",), "5", True), (("5",), "15", False), (("b",), "bulb", False),
        (("b",), "plan b works", True), (("oak",), "An oak tree", True), (("elm", "Oak"), "an oak", True),
        (("1,000",), "about 1000 of them", True), (("24/7",), "It is 24/7.", True), (("elm",), "oak", False),
    ],
)  # fmt: skip
def test_open_answers_are_judged_by_the_rule_of_mmmu(truths: tuple[str, ...], answer: str, right: bool) -> None:
    assert open_matches(truths, open_values(answer)) is right
