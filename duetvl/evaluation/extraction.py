"""What an answer says: the letter of an option, or the values that an open answer may stand for.

Each rule is that of a published tool, so that scores can be compared with those of others; none guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

REFUSED: Final = "Z"  # what an answer is read as that declines to choose: the letter of no option

_REFUSALS: Final = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_AROUND_LETTERS: Final = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS: Final = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS: Final = 5  # a letter before these is a word of the sentence: "A cat is shown here"


def option_named(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names, by VLMEvalKit's rule without a judge: its letter, REFUSED, or None.

    The one option's letter among the last words; else "answer is B"; else the one option whose text the answer holds,
    unless the answer is much longer than all options.
    """
    if any(phrase in answer for phrase in _REFUSALS):
        return REFUSED
    words = answer.translate(_AROUND_LETTERS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and REFUSED in words:
        return REFUSED
    stated = _ANSWER_IS.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return _option_quoted(answer.lower(), options)


def _option_quoted(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    quoted = [letter for letter, text in options.items() if text.lower() in answer]
    return quoted[0] if len(quoted) == 1 else None


def first_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The first of A to F that occurs anywhere in the answer, tried in that order, as MindIE's modeltest reads it.

    "Answer: C" is read as A. `options` are not looked at.
    """
    return next((letter for letter in "ABCDEF" if letter in answer), None)


# -- open questions of MMMU ------------------------------------------------------------------------------------------

_LEADS: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS: Final = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)  # a match that fails at the first of many digits would at the others too: an answer may be a run of them


def open_values(answer: str) -> list[str | float]:
    """What an open answer may stand for by MMMU's own rule: the ends of its lines, and the numbers in them."""
    ends = _ends_of_lines(answer.strip().strip(".").lower())
    texts = [*ends, *(number for end in ends for pattern in _NUMBERS for number in pattern.findall(end))]
    return list(dict.fromkeys(value for text in texts for value in comparable(text)))


def _ends_of_lines(answer: str) -> list[str]:
    """What follows the words that lead to a result, in each line that has some; the whole answer where none has.

    MMMU's rule also splits sentences before a capital letter, of which a text in lower case has none.
    """
    lines = answer.split("\n")
    ends = []
    for number, line in enumerate(lines):
        leads = (*_LEADS, "=") if number == len(lines) - 1 else _LEADS
        shortest = ""
        for tail in (line.split(lead)[-1].strip() for lead in leads if lead in line):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(shortest)
    return ends or [answer]


def comparable(text: str) -> list[str | float]:
    """A text as MMMU compares it: a number with two decimals, or lower case.

    A single character has a blank beside it, so that it is not looked for inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_matches(truths: tuple[str, ...], values: list[str | float]) -> bool:
    """Whether one of the values is a truth by MMMU's own rule: an equal number, or a text that holds it."""
    right = [value for truth in truths for value in comparable(truth)]
    texts = [value for value in right if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in right for value in values)
