"""Fields of a recipe as they are given on the command line by mistake, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.text import candidates, fields, near_candidates


def as_overrides(words: Sequence[str]) -> list[str]:
    """What words such as `--lr 3`, `--optim.lr=3`, `optim.lr = 3` or `learning_rate=3` mean, as section.key=value.

    Of a name that no field is near to, nothing; of one that several sections have, each of these.
    """
    return [f"{field}={value}" for name, value in _pairs(words) for field in nearest(name)]


def nearest(name: str) -> list[str]:
    """The fields, as section.key, that a name means: by what they are called here or elsewhere, then by its letters."""
    section, dot, key = name.replace("-", "_").partition(".")
    if not dot and section in Recipe.model_fields:  # all of it: `--lora {}`
        return [section]
    if not dot:
        return candidates(section) or near_candidates(section)
    sections = get_close_matches(section, Recipe.model_fields, n=1, cutoff=0.5)
    keys = get_close_matches(key, fields(sections[0]), n=1, cutoff=0.5) if sections else []
    return [f"{sections[0]}.{keys[0]}"] if keys else candidates(key)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names without their dashes, and the values that follow them, whatever stands between."""
    rest = [part for word in words for part in _split(word)]
    while rest:
        name = rest.pop(0).lstrip("-")
        if rest and rest[0] == "=":
            rest.pop(0)
        if name and rest:
            yield name, rest.pop(0)


def _split(word: str) -> list[str]:
    """`--lr=3` as name, sign and value; a value with a sign in it stays whole."""
    name, sign, value = word.partition("=")
    return [part for part in (name, sign, value) if part]
