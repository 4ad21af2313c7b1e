"""VLMEvalKit's files: pictures by reference, lists, quotes, line ends, and what pandas would lose."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from miniatures import picture, picture_cell, write_tsv

from duetvl.core.errors import DataError
from duetvl.evaluation.profiles import QWEN2_VL
from duetvl.evaluation.tasks.registry import find_task
from duetvl.evaluation.tsv import TsvRows

RED, BLUE = picture("red"), picture("blue")


def rows_of(folder: Path, *rows: dict[str, Any], **how: str) -> TsvRows:
    """A file of these rows, each with what it must have."""
    whole = [
        {"index": n, "image": picture_cell("red"), "question": "q", "answer": "A", **row} for n, row in enumerate(rows)
    ]
    return TsvRows(write_tsv(folder / "x.tsv", whole, **how), ("question", "answer"))


def test_a_picture_may_be_in_another_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"image": "2"}, {"image": "0"}, {"image": picture_cell("blue")}, {})
    assert [rows.pictures(number) for number in range(4)] == [(BLUE,), (BLUE,), (BLUE,), (RED,)]
    clusters = [rows[number].cluster for number in range(4)]
    assert clusters[0] == clusters[1] == clusters[2] != clusters[3]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["0"], r"x.tsv:2: its picture is said to be in the row '0', which leads back here"),
        (["1", "2", "0"], r"x.tsv:2: .* the row '0', which leads back here"),
        (["7"], r"x.tsv:2: .* the row '7', which is not there"),
    ],
)
def test_references_that_lead_nowhere_are_refused(tmp_path: Path, images: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, *({"image": image} for image in images))


def test_several_pictures_and_paths(tmp_path: Path) -> None:
    (tmp_path / "images" / "AI2D").mkdir(parents=True)
    (tmp_path / "images" / "AI2D" / "7.jpg").write_bytes(RED)
    cells = [picture_cell("red"), picture_cell("blue")]
    rows = rows_of(
        tmp_path, {"image": repr(cells)}, {"image": None, "image_path": "/home/of/others/AI2D/7.jpg"},
        {"image": "data:image/jpeg;base64," + cells[1]},
    )  # fmt: skip
    assert rows.pictures(0) == (RED, BLUE) and rows.pictures(2) == (BLUE,)
    assert rows.pictures(1) == (tmp_path / "images" / "AI2D" / "7.jpg",)


def test_cells_are_texts_as_they_stand(tmp_path: Path) -> None:
    odd = 'a "b"\tc\r\nd'
    rows = rows_of(tmp_path, {"question": odd, "A": "007", "B": "1.0"}, start="\ufeff", end="\r\n")
    assert rows[0].cells["question"] == odd and rows[0].id == "0"
    assert rows[0].options == {"A": "007", "B": "1.0"}


@pytest.mark.parametrize("word", ["None", "NA", "null", "nan", "n/a", "N/A"])
def test_options_that_pandas_would_lose_are_kept_and_listed(tmp_path: Path, word: str) -> None:
    write_tsv(
        tmp_path / "AI2D_TEST.tsv",
        [
            {
                "index": 0,
                "image": picture_cell("red"),
                "question": "q",
                "A": "cat",
                "B": word,
                "C": None,
                "D": "x",
                "answer": "B",
            }
        ],
    )
    question = find_task("ai2d_test").questions(tmp_path, QWEN2_VL)[0]
    assert question.options == {"A": "cat", "B": word, "D": "x"} and not question.problem
    assert f"B. {word}\nD. x" in str(question.conversation.turns[0].parts[-1])
    assert question.notes == (f"VLMEvalKit reads B {word!r} as missing",)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": None}, "has no picture"),
        ({"image": "nan"}, "has no picture"),
        ({"image": picture_cell("red")[:-3]}, "is not base64, or cut off"),
        ({"image": None, "image_path": "7.jpg"}, "'7.jpg': no such file under"),
        ({"answer": "E"}, "its answer is 'E', its options are A, B"),
        ({"answer": None}, "its answer is '', its options are A, B"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    good = {"image": picture_cell("red"), "question": "q", "A": "cat", "B": "dog", "answer": "B"}
    write_tsv(tmp_path / "AI2D_TEST.tsv", [{"index": 0, **good, **row}, {"index": 1, **good}])
    questions = find_task("ai2d_test").questions(tmp_path / "AI2D_TEST.tsv", QWEN2_VL)
    assert problem in questions[0].problem and not questions[1].problem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\timage\tquestion\n1\tx\ty\n", "has no column 'answer'; its columns are index, image, question"),
        (
            "index\timage\tquestion\tanswer\n1\tx\ty\tA\n",
            "has no column 'A'; its columns are index, image, question, ans",
        ),
        ("index\tquestion\tanswer\tA\tB\n1\tx\ty\tz\tz\n", "has neither a column 'image' nor 'image_path'"),
        ("index\timage\tquestion\tanswer\n1\tx\n", "AI2D_TEST.tsv:2: has 2 fields, but the header has 4"),
        ('index\timage\tquestion\tanswer\n1\t"x\ty\tz\n', "never closed"),
        ("index\timage\tquestion\tanswer\n", "no records"),
        ("", "is empty"),
        (
            "index\timage\tquestion\tanswer\tA\tB\n1\t\tx\ty\ta\tb\n1\t\tx\ty\ta\tb\n",
            "AI2D_TEST.tsv:3: its id '1' is that of .*:2 too",
        ),
    ],
)
def test_damaged_files_are_refused_at_once(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "AI2D_TEST.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        find_task("ai2d_test").questions(path, QWEN2_VL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"AI2D_TEST.tsv: no such file"):
        find_task("ai2d_test").questions(tmp_path, QWEN2_VL)
    (tmp_path / "ai2d.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"ai2d.jsonl: expected VLMEvalKit's table, with the suffix .tsv"):
        find_task("ai2d_test").questions(tmp_path / "ai2d.jsonl", QWEN2_VL)
    with pytest.raises(DataError, match=r"ai2d.tsv: no such file; expected AI2D_TEST.tsv, or the directory"):
        find_task("ai2d_test").questions(tmp_path / "ai2d.tsv", QWEN2_VL)


def test_pictures_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """Nothing of a picture is kept: what replaces it in the file later is what is read."""
    rows = rows_of(tmp_path, {}, {})
    content = (tmp_path / "x.tsv").read_bytes()
    changed = base64.b64encode(RED[:-2] + b"\xff\xff")
    (tmp_path / "x.tsv").write_bytes(content.replace(picture_cell("red").encode(), changed))
    assert rows.pictures(1) == (RED[:-2] + b"\xff\xff",)
