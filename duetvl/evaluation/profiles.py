"""Prompt profiles: the words that a benchmark is asked in, and the pixels that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from duetvl.core.errors import ConfigError, did_you_mean, shown
from duetvl.data.media.images import NO_WISH, Resize


@dataclass(frozen=True)
class Profile:
    """How the questions of a benchmark are put to a model, after one of the known evaluation tools.

    `pixels` bound each picture; `max_new_tokens` bounds an answer, which is greedy.
    """

    name: str
    pixels: Resize
    max_new_tokens: int


_AREA: Final = 28 * 28  # pixels of a token
_KIT_PIXELS: Final = Resize(min_pixels=1280 * _AREA, max_pixels=16384 * _AREA)

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("qwen2_vl", _KIT_PIXELS, 2048),
        Profile("vlmevalkit", _KIT_PIXELS, 2048),
        Profile("mindie", NO_WISH, 100),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of this name. Raises ConfigError with the nearest one."""
    if name not in PROFILES:
        raise ConfigError(f"no prompt profile {shown(name)}{did_you_mean(name, PROFILES)}")
    return PROFILES[name]
