"""Prompt profiles: the words that a benchmark is asked in, the pixels that go with them, how a choice is read.

Every string is that of the tool that a profile is named after, blanks and line ends included: scores move with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from duetvl.core.errors import ConfigError, did_you_mean, shown
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.data.media.images import NO_WISH, Resize
from duetvl.evaluation.extraction import first_letter, option_named

Options = Mapping[str, str]
Medium = bytes | Path
_AS_THE_MODEL: Final = VideoPart("")


@dataclass(frozen=True)
class Profile:
    """How the questions of a benchmark are put to a model, and its choices read, after one of the known tools.

    choice: (question, options, hint) -> the text of a question with options. open_suffix: what follows one without.
    interleaved: pictures stand where the text names them, not in front. pixels: bounds of each picture; `video`
    bounds frames. max_new_tokens: of an answer, which is greedy.
    """

    name: str
    choice: Callable[[str, Options, str], str]
    open_suffix: str
    read_choice: Callable[[str, Options], str | None]
    interleaved: bool = False
    pixels: Resize = NO_WISH
    video: VideoPart = _AS_THE_MODEL
    max_new_tokens: int = 2048

    def picture(self, source: Medium) -> ImagePart:
        """A picture of a question."""
        return ImagePart(source, wish=self.pixels)

    def clip(self, source: Path) -> VideoPart:
        """A video of a question."""
        return replace(self.video, source=source)


# -- VLMEvalKit ------------------------------------------------------------------------------------------------------

SELECT: Final = "Please select the correct answer from the options above."
SELECT_CHINESE: Final = "请直接回答选项字母。"
_CHINESE: Final = re.compile("[\u4e00-\u9fff]")


def question_lines(question: str, options: Options, hint: str) -> str:
    """A question as VLMEvalKit lays it out: the hint, the question, an option a line, each with its line end."""
    lines = [f"Hint: {hint}\n"] if hint else []
    lines.append(f"Question: {question}\n")
    if options:
        lines.append("Options:\n")
    lines.extend(f"{letter}. {text}\n" for letter, text in options.items())
    return "".join(lines)


def _qwen2_vl_choice(question: str, options: Options, hint: str) -> str:
    lines = question_lines(question, options, hint)
    request = SELECT_CHINESE if _CHINESE.search(lines) else SELECT
    return (lines + request * bool(options)).rstrip()


def _vlmevalkit_choice(question: str, options: Options, hint: str) -> str:
    return question_lines(question, options, hint) + f"{SELECT} \n" * bool(options)


# -- MindIE's modeltest ----------------------------------------------------------------------------------------------

_NUMBER_WORDS: Final = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def _mindie_choice(question: str, options: Options, hint: str) -> str:
    """Video-Bench's prompt as modeltest has it, with its uneven blanks; it knows no hints."""
    listed = " ".join(f"{letter}.{text}" for letter, text in options.items())
    count, letters = _NUMBER_WORDS.get(len(options)), ", ".join(options)
    lead = "Choices: " if len(options) == 6 else " "
    end = "" if len(options) in (4, 6) else " "
    lines = (
        f"{lead}{listed} \n",
        f" Among the {count} options {letters} above, the one closest to the correct answer is:{end}",
    )
    return question + "".join(lines) * bool(count) + _MINDIE_REQUEST


_MINDIE_REQUEST: Final = (
    " Please respond with only the corresponding options and do not provide any explanations or additional information."
    " ASSISTANT:"
)

# -- the profiles ----------------------------------------------------------------------------------------------------

_AREA: Final = 28 * 28  # pixels of a token
_KIT_PIXELS: Final = Resize(min_pixels=1280 * _AREA, max_pixels=16384 * _AREA)
_KIT_VIDEO: Final = VideoPart(
    "", fps=2.0, total_pixels=24576 * _AREA, wish=Resize(min_pixels=128 * _AREA, max_pixels=768 * _AREA)
)

QWEN2_VL: Final = Profile(
    name="qwen2_vl",  # VLMEvalKit with the prompts that it has for Qwen2-VL
    choice=_qwen2_vl_choice,
    open_suffix="\nPlease try to answer the question with short words or phrases if possible.",
    read_choice=option_named,
    pixels=_KIT_PIXELS,
    video=_KIT_VIDEO,
)
VLMEVALKIT: Final = replace(
    QWEN2_VL,
    name="vlmevalkit",  # with its own, which it uses for Qwen2.5-VL
    choice=_vlmevalkit_choice,
    open_suffix="\nAnswer the question using a single word or phrase.",
    interleaved=True,
)
MINDIE: Final = Profile(
    name="mindie",
    choice=_mindie_choice,
    open_suffix=" Answer the question using a single word or phrase.",
    read_choice=first_letter,
    video=VideoPart("", fps=2.0, total_pixels=24576 * _AREA),
    max_new_tokens=100,
)
MINDIE_GUIDE: Final = replace(
    MINDIE,
    name="mindie_guide",  # frames as its guide for Video-Bench says; its code now takes four times as many
    video=replace(MINDIE.video, fps=0.5),
)
PROFILES: Final = {profile.name: profile for profile in (QWEN2_VL, VLMEVALKIT, MINDIE, MINDIE_GUIDE)}
BY_FAMILY: Final = {"qwen2_vl": QWEN2_VL, "qwen2_5_vl": VLMEVALKIT}


def find_profile(name: str) -> Profile:
    """The profile of this name. Raises ConfigError with the nearest one."""
    if name not in PROFILES:
        raise ConfigError(f"no prompt profile {shown(name)}{did_you_mean(name, PROFILES)}")
    return PROFILES[name]


def default_profile(family: str) -> Profile:
    """The profile that the scores of a family are usually given in; `family` is the `model_type` of its config."""
    return BY_FAMILY.get(family, VLMEVALKIT)


def require_profile(task: str, profiles: tuple[str, ...], profile: Profile) -> None:
    """Raise ConfigError where a task has no prompt in a profile."""
    if profile.name not in profiles:
        raise ConfigError(f"{task} has no prompt in the profile {profile.name}; it has one in {', '.join(profiles)}")
