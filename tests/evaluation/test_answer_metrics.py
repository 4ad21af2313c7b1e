"""What answers are worth, by literal tables."""

from __future__ import annotations

from typing import Any

import pytest

from duetvl.evaluation.metrics import (
    METRICS,
    anls,
    edit_distance,
    exact_match,
    mindie_textvqa,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_words,
)


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("0", "0", True), ("0", "0.0", False), ("0", "0.00", False), ("100", "105", True), ("100", "105.1", False),
        ("5%", "0.05", True), ("0.05", "5%", True), ("5", "5%", False), ("50%", "50", False), ("1,000", "1000", False),
        ("1000", "1,000", False), ("-5", "5", False), ("nan", "nan", False), ("inf", "inf", False), ("3 ", "3", True),
        ("Yes", "yes.", False), ("2019", "2020", True), ("$5", "5", False), ("Yes", " yes\n", True),
    ],
)  # fmt: skip
def test_relaxed_accuracy_is_relative_to_the_truth(truth: str, answer: str, right: bool) -> None:
    assert relaxed_accuracy([truth], answer) == right


def test_the_best_truth_counts() -> None:
    assert relaxed_accuracy(["7", "100"], "104") == 1
    assert relaxed_accuracy(["104"], "100") == 1 and relaxed_accuracy(["95"], "100") == 0  # 5.3% of the truth
    assert anls(["nothing like it", "hello"], "hell") == pytest.approx(0.8)
    assert exact_match(["x", "Yes "], "yes") == 1


@pytest.mark.parametrize(
    ("truth", "answer", "value"),
    [
        ("", "", 1), ("a", "A", 1), ("hello world", "hello  world", 1), ("TRUE", "true.", 0.8), ("ab", "cd", 0),
        ("5", "5.0", 0), ("hello", "hell", 0.8), ("ab", "ac", 0.5), ("abc", "abc   d", 1 - 2 / 7), ("x" * 9, "", 0),
    ],
)  # fmt: skip
def test_anls(truth: str, answer: str, value: float) -> None:
    assert anls([truth], answer) == pytest.approx(value)


def test_edit_distance() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", ""), ("ab", "ba"))] == [
        3,
        3,
        3,
        2,
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12.5%", "12.5%"), ("U.S.A.", "usa"), ("$1,000", "$1000"), ("one", "1"), ("none", "0"),
        ("The Coca-Cola", "coca cola"), ("dont", "don't"), ("e-mail", "e mail"), ("7:45", "7:45"),
        ("st. john's", "st john's"), ("well", "well"), ("a\tB\nthe C", "b c"), ("wouldnt've", "wouldn't've"),
        ("wouldntve", "wouldntve"), ("its", "its"), ("twas", "'twas"), ("left - right", "left right"),
    ],
)  # fmt: skip
def test_words_are_compared_as_in_vqa(text: str, words: str) -> None:
    assert vqa_words(text) == words


@pytest.mark.parametrize(("equal", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_people(equal: int, value: float) -> None:
    people = ["Coca-Cola"] * equal + [f"other {n}" for n in range(10 - equal)]
    assert vqa_accuracy(people, "the coca cola") == pytest.approx(value)


def entries(*answers: str, numbered: bool = True) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": n} if numbered else {"answer": text} for n, text in enumerate(answers)]


def test_mindie_never_meets_a_truth_with_a_capital() -> None:
    people = ["Dakota"] * 10
    assert mindie_textvqa(entries(*people), "Dakota") == 0
    assert vqa_accuracy(people, "Dakota") == 1


def test_mindie_compares_whole_entries() -> None:
    people = ["dakota"] * 10
    assert mindie_textvqa(entries(*people), "Dakota<|im_end|>") == 1
    assert mindie_textvqa(entries(*people, numbered=False), "Dakota") == 0  # equal ones leave each other out
    mixed = [*["e-mail"] * 5, *["post"] * 5]
    assert mindie_textvqa(entries(*mixed), "e-mail") == pytest.approx(1)  # truths differ: their punctuation goes too
    assert mindie_textvqa(entries(*["e-mail"] * 10), "e-mail") == 0  # they do not
    assert mindie_textvqa(entries(*["1"] * 10), "") == 1  # nothing is read as -1, which loses its sign
    assert mindie_textvqa(entries(*["1"] * 10), " \n") == 0


def test_no_metric_likes_an_empty_answer() -> None:
    assert {name: metric(["1", "2"], "") for name, metric in METRICS.items()} == dict.fromkeys(METRICS, 0.0)
