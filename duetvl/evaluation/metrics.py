"""What an open answer is worth beside the right ones, from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

Metric = Callable[[Sequence[str], str], float]
"""(truths, answer) -> value."""


def exact_match(truths: Sequence[str], answer: str) -> float:
    """1 where the answer is one of the truths, white space around it and case apart."""
    return float(any(truth.strip().lower() == answer.strip().lower() for truth in truths))


# -- ChartQA ---------------------------------------------------------------------------------------------------------

_TOLERANCE: Final = 0.05  # relative to the truth


def relaxed_accuracy(truths: Sequence[str], answer: str) -> float:
    """1 where the answer is within 5% of a truth that is a number, or equal to one that is text, case apart."""
    return float(any(_is_close(truth, answer.strip()) for truth in truths))


def _is_close(truth: str, answer: str) -> bool:
    expected, number = _number(truth), _number(answer)
    if number is None or not expected:  # no share of 0: "0.0" is not "0", as in the tools that scores come from
        return answer.lower() == truth.lower()
    return abs(number - expected) / abs(expected) <= _TOLERANCE


def _number(text: str) -> float | None:
    """The number that a text is, 5% as 0.05."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


# -- DocVQA ----------------------------------------------------------------------------------------------------------

_LEAST_SIMILAR: Final = 0.5


def anls(truths: Sequence[str], answer: str) -> float:
    """Average normalised Levenshtein similarity to the nearest truth; 0 where that is below one half.

    Case and runs of white space make no difference, but lengths are those of the texts as they are.
    """
    return max((_similarity(truth, answer) for truth in truths), default=0.0)


def _similarity(truth: str, answer: str) -> float:
    longest = max(len(truth), len(answer))
    if not longest:
        return 1.0
    a, b = (" ".join(text.lower().split()) for text in (truth, answer))
    if abs(len(a) - len(b)) > _LEAST_SIMILAR * longest:  # at least so many edits: no need to count them
        return 0.0
    similarity = 1 - edit_distance(a, b) / longest
    return similarity if similarity >= _LEAST_SIMILAR else 0.0


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace to make one text the other."""
    row = list(range(len(a) + 1))
    for j, of_b in enumerate(b, start=1):
        before, row = row, [j]
        for i, of_a in enumerate(a, start=1):
            row.append(before[i - 1] if of_a == of_b else 1 + min(before[i - 1], before[i], row[-1]))
    return row[-1]


# -- TextVQA ---------------------------------------------------------------------------------------------------------

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_MOST_PERIODS: Final = 32  # the reference passes re.UNICODE, which is 32, where the count of replacements belongs
_ARTICLES: Final = ("a", "an", "the")
_DIGITS: Final = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
# Words that may lack one apostrophe. Those that are other words without it (she'd, we'll) are not among them.
_APOSTROPHES: Final = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS: Final = {
    word[:at] + word[at + 1 :]: word for word in _APOSTROPHES.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as in the reference


def vqa_accuracy(truths: Sequence[str], answer: str) -> float:
    """Agreement with ten people's answers: of each nine of them, whether three gave this one; the mean of that.

    Both sides are freed of punctuation and articles, digits and contractions are written in one way.
    """
    people, said = [vqa_words(truth) for truth in truths], vqa_words(answer)
    equal = people.count(said)
    return _mean([min(1.0, (equal - (person == said)) / 3) for person in people])


def mindie_textvqa(entries: Sequence[Mapping[str, Any]], answer: str) -> float:
    """TextVQA as MindIE's modeltest scores it; `entries` are the ten annotations, each with an `answer`.

    Only punctuation of the truths is processed, and only where they differ, so a truth with a capital letter is never
    met. Equal entries without an `answer_id` leave each other out.
    """
    said, entries = mindie_words(answer), list(entries)
    if len({entry["answer"] for entry in entries}) > 1:
        entries = [{**entry, "answer": _without_punctuation(entry["answer"])} for entry in entries]
    others = ([other for other in entries if other != entry] for entry in entries)
    return _mean([min(1.0, sum(other["answer"] == said for other in rest) / 3) for rest in others])


_MARKS: Final = (
    "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5ceot_id|>",
    "###", "</s>",
)  # fmt: skip


def mindie_words(answer: str) -> str:
    """An answer as MindIE's modeltest compares it: up to the first mark of an end; of none, -1 without its sign."""
    answer = answer.lstrip() if answer else "-1"
    for mark in _MARKS:
        answer = answer.split(mark)[0]
    return vqa_words(answer)


def vqa_words(text: str) -> str:
    """A text as VQA's evaluation compares it."""
    words = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Marks beside a blank vanish, others become one; all vanish where a comma stands in a number."""
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = in_number or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


METRICS: Final[Mapping[str, Metric]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
}
