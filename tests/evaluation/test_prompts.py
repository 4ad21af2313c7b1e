"""The exact words of every profile, and what goes with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from miniatures import NAMES, picture_cell, write_tsv

from duetvl.core.errors import ConfigError
from duetvl.data.conversation import ImagePart
from duetvl.evaluation.profiles import (
    MINDIE,
    MINDIE_GUIDE,
    PROFILES,
    QWEN2_VL,
    VLMEVALKIT,
    default_profile,
    find_profile,
)
from duetvl.evaluation.published import published
from duetvl.evaluation.tasks.registry import find_task

SELECT = "Please select the correct answer from the options above."
SHORT = "\nPlease try to answer the question with short words or phrases if possible."
ANIMALS = {"A": "cat", "B": "dog"}


@pytest.mark.parametrize(
    ("profile", "hint", "question", "text"),
    [
        (QWEN2_VL, "", "Which?", f"Question: Which?\nOptions:\nA. cat\nB. dog\n{SELECT}"),
        (QWEN2_VL, "Look", "Which?", f"Hint: Look\nQuestion: Which?\nOptions:\nA. cat\nB. dog\n{SELECT}"),
        (QWEN2_VL, "", "哪个?", "Question: 哪个?\nOptions:\nA. cat\nB. dog\n请直接回答选项字母。"),
        (VLMEVALKIT, "Look", "Which?", f"Hint: Look\nQuestion: Which?\nOptions:\nA. cat\nB. dog\n{SELECT} \n"),
        (VLMEVALKIT, "", "哪个?", f"Question: 哪个?\nOptions:\nA. cat\nB. dog\n{SELECT} \n"),
    ],
)
def test_choices(profile: Any, hint: str, question: str, text: str) -> None:
    assert profile.choice(question, ANIMALS, hint) == text


TAIL = (
    " Please respond with only the corresponding options and do not provide any explanations or additional "
    "information. ASSISTANT:"
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "Q?"),
        (2, "Q? A.a B.b \n Among the two options A, B above, the one closest to the correct answer is: "),
        (3, "Q? A.a B.b C.c \n Among the three options A, B, C above, the one closest to the correct answer is: "),
        (4, "Q? A.a B.b C.c D.d \n Among the four options A, B, C, D above, the one closest to the correct answer is:"),
        (5, "Q? A.a B.b C.c D.d E.e \n Among the five options A, B, C, D, E above, the one closest to the correct "
            "answer is: "),
        (6, "Q?Choices: A.a B.b C.c D.d E.e F.f \n Among the six options A, B, C, D, E, F above, the one closest to "
            "the correct answer is:"),
    ],
)  # fmt: skip
def test_choices_of_video_bench_as_mindie_asks_them(count: int, text: str) -> None:
    assert MINDIE.choice("Q?", {letter: letter.lower() for letter in "ABCDEF"[:count]}, "") == text + TAIL


def test_open_questions() -> None:
    assert {name: profile.open_suffix for name, profile in PROFILES.items()} == {
        "qwen2_vl": SHORT,
        "vlmevalkit": "\nAnswer the question using a single word or phrase.",
        "mindie": " Answer the question using a single word or phrase.",
        "mindie_guide": " Answer the question using a single word or phrase.",
    }


def test_settings_that_go_with_the_words() -> None:
    assert QWEN2_VL.pixels == VLMEVALKIT.pixels == (1280 * 784, 16384 * 784, None, None)
    assert (QWEN2_VL.max_new_tokens, MINDIE.max_new_tokens) == (2048, 100)
    assert (MINDIE.video.fps, MINDIE_GUIDE.video.fps, MINDIE.video.total_pixels) == (2.0, 0.5, 24576 * 784)
    assert default_profile("qwen2_vl") is QWEN2_VL and default_profile("qwen2_5_vl") is VLMEVALKIT
    with pytest.raises(ConfigError, match="did you mean 'mindie'"):
        find_profile("mindi")


def test_each_task_knows_its_profiles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ai2d_test has no prompt in the profile mindie; it has one in qwen2_vl"):
        find_task("ai2d_test").questions(tmp_path, MINDIE)


# -- MMMU: pictures in the text --------------------------------------------------------------------------------------


def mmmu_parts(folder: Path, profile: Any, pictures: int, **cells: Any) -> tuple[list[Any], str]:
    """The parts of one question, pictures as their numbers; and its problem."""
    cells_of_pictures = [picture_cell(NAMES[n % 8], size=(30 + n, 30)) for n in range(pictures)]
    row = {
        "index": "1",
        "image": repr(cells_of_pictures),
        "split": "validation",
        "question": "",
        "answer": "A",
        **cells,
    }
    question = find_task("mmmu_dev_val").questions(write_tsv(folder / "MMMU_DEV_VAL.tsv", [row]), profile)[0]
    parts = question.conversation.turns[0].parts
    return [picture_number(part) if isinstance(part, ImagePart) else part for part in parts], question.problem


def picture_number(part: ImagePart) -> int:
    from duetvl.data.media.images import image_size

    return image_size(part.source)[1] - 29


def test_pictures_stand_in_front_or_in_the_text(tmp_path: Path) -> None:
    cells = {"question": "From <image 2> to <image 1>?", "A": "<image 2>", "B": "none"}
    text = "Question: From <image 2> to <image 1>?\nOptions:\nA. <image 2>\nB. none\n" + SELECT
    assert mmmu_parts(tmp_path, QWEN2_VL, 2, **cells) == ([1, 2, text], "")
    parts = ["Question: From ", 2, " to ", 1, "?\nOptions:\nA. ", 2, f"\nB. none\n{SELECT} \n"]
    assert mmmu_parts(tmp_path, VLMEVALKIT, 2, **cells) == (parts, "")


def test_pictures_without_a_place_stand_in_front(tmp_path: Path) -> None:
    assert mmmu_parts(tmp_path, VLMEVALKIT, 2, question="Why?")[0] == [1, 2, "Question: Why?\n"]
    assert mmmu_parts(tmp_path, QWEN2_VL, 2, question="为什么?", A="x")[0][-1].endswith(SELECT)  # never in Chinese


def test_two_digits_name_a_picture_too(tmp_path: Path) -> None:
    assert mmmu_parts(tmp_path, VLMEVALKIT, 10, question="<image 10>.")[0] == ["Question: ", 10, ".\n"]
    problem = mmmu_parts(tmp_path, VLMEVALKIT, 2, question="<image 10>.")[1]
    assert "names picture 10, of which it has 2" in problem


# -- published scores ------------------------------------------------------------------------------------------------


def test_published_scores_are_found_by_the_models_name() -> None:
    score = published("ckpt/Qwen2.5-VL-7B-Instruct/", "mmmu_dev_val")
    assert score and (score.score, score.split, score.group, score.checked) == (
        58.6,
        "validation",
        ("split", "validation"),
        True,
    )
    assert published("Qwen/Qwen2-VL-2B-Instruct", "chartqa_test") == replace(
        published("qwen2_vl_2b", "chartqa_test") or score, score=73.5
    )
    other_split = published("Qwen2-VL-7B", "docvqa_val")
    assert other_split and other_split.score == 94.5 and "validation" in other_split.warning
    assert published("Qwen2.5-VL-7B-Instruct-receipts", "docvqa_val") is None
    assert published("Qwen2.5-VL-32B", "chartqa_test") is None and published("Qwen2-VL-7B", "videobench") is None
    unchecked = published("Qwen2-VL-7B", "ai2d_test")
    assert unchecked and not unchecked.checked
