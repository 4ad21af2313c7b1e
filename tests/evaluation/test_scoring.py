"""From answers to scores: what counts, what does not, and what is told beside a score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import miniatures
import pytest
from runs import asked_of

from duetvl.evaluation.question import Question
from duetvl.evaluation.scoring import Marked, mark, summarize, tally
from duetvl.evaluation.statistics import interval, wilson


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def marks(task: str, path: Path, rows: Mapping[int, Any], judge: Any = None, **options: Any) -> list[Marked]:
    asked = asked_of(task, path, **options)
    return list(mark(asked.task, asked.profile, asked, rows, judge))


def row(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"text": text, "finish_reason": reason}


def test_all_right_and_all_wrong_on_every_benchmark(data: Path) -> None:
    for make, task in (
        (miniatures.ai2d, "ai2d_test"), (miniatures.chartqa, "chartqa_test"), (miniatures.docvqa, "docvqa_val"),
        (miniatures.mmmu, "mmmu_dev_val"), (miniatures.textvqa, "textvqa_val"), (miniatures.videobench, "videobench"),
    ):  # fmt: skip
        (data / task).mkdir()
        asked = asked_of(task, make(data / task))
        askable = [question for question in asked if not question.problem]
        right = {question.index: row(miniatures.truth_of(question)) for question in askable}
        summary = summarize(list(mark(asked.task, asked.profile, asked, right)), asked.task.groups)
        assert summary.whole.n == len(askable) >= 40
        assert summary.whole.score is not None and summary.whole.score > 80, task
        assert summary.whole.unparsed == summary.whole.truncated == 0
        for values in summary.groups.values():
            assert sum(one.n for one in values.values()) == summary.whole.n
        wrong = {question.index: row("zzzzzz") for question in askable}
        whole = tally(list(mark(asked.task, asked.profile, asked, wrong)))
        assert (whole.score, whole.low) == (0, 0) and whole.high is not None and 0 < whole.high < 50, task


def test_what_stands_beside_a_score(data: Path) -> None:
    path = miniatures.ai2d(data)
    truths = {question.index: miniatures.truth_of(question) for question in asked_of("ai2d_test", path)}
    rows: dict[int, Any] = {index: row(truth) for index, truth in truths.items() if index < 40}
    rows[0] = row("It is hard to tell", "length")  # cannot be read, and was cut off
    rows[1] = row(f"The answer is {truths[1]}. Because", "length")
    rows[2] = row("ABCD"["ABCD".index(truths[2]) - 1])
    rows[3] = {"text": None, "finish_reason": "error", "error": "the logits are not finite"}
    marked = marks("ai2d_test", path, rows)
    whole = tally(marked)
    assert (whole.n, whole.unparsed, whole.truncated, whole.unanswered) == (39, 1, 2, 9)
    assert whole.score == pytest.approx(100 * 37 / 39, abs=1e-3)
    assert [one.verdict for one in marked[:4]] == ["unparsed", "right", "wrong", "unanswered"]
    assert marked[3].problem == "the logits are not finite" and marked[47].problem == "it was not asked"
    # Four questions share a picture: ten pictures, of which the interval is.
    values, clusters = [one.value or 0.0 for one in marked[:40] if one.value is not None], whole.clusters
    assert clusters == 10 and whole.method == "wilson"
    low, high = wilson(sum(values) / 39, 10)
    assert (whole.low, whole.high) == (pytest.approx(100 * low, abs=1e-3), pytest.approx(100 * high, abs=1e-3))


def test_many_pictures_are_resampled(data: Path, tmp_path: Path) -> None:
    path = miniatures.ai2d(tmp_path, 160)
    asked = asked_of("ai2d_test", path)
    rows = {q.index: row(miniatures.truth_of(q) if q.index % 3 else "none of them") for q in asked}
    marked = list(mark(asked.task, asked.profile, asked, rows))
    whole = tally(marked)
    expected = interval([one.value or 0.0 for one in marked], [one.cluster for one in marked])
    assert whole.method == expected.method == "bootstrap" and whole.clusters == 40
    assert (whole.low, whole.high) == (round(100 * expected.low, 4), round(100 * expected.high, 4))


def test_by_split_and_category(tmp_path: Path) -> None:
    path = miniatures.chartqa(tmp_path)
    asked = asked_of("chartqa_test", path)
    rows = {q.index: row(miniatures.truth_of(q) if q.groups["split"] == "test_human" else "nothing") for q in asked}
    summary = summarize(list(mark(asked.task, asked.profile, asked, rows)), asked.task.groups)
    split = summary.groups["split"]
    assert {name: (one.score, one.n) for name, one in split.items()} == {
        "test_human": (100, 20), "test_augmented": (0, 20)
    }  # fmt: skip
    assert summary.whole.score == 50


def test_other_rules_stand_beside(tmp_path: Path) -> None:
    """Ten people said Dakota: MindIE's tool counts nothing of it, VQA's rule all."""
    path = miniatures.textvqa(tmp_path)
    asked = asked_of("textvqa_val", path, profile="mindie")
    rows = {q.index: row(miniatures.truth_of(q)) for q in asked}
    whole = tally(list(mark(asked.task, asked.profile, asked, rows)))
    assert len(whole.others) == 1
    (other,) = whole.others.values()
    assert whole.score is not None and other > whole.score


def test_a_judge_reads_what_the_rule_cannot(data: Path) -> None:
    path = miniatures.ai2d(data)
    asked = asked_of("ai2d_test", path)
    truths = {question.index: miniatures.truth_of(question) for question in asked}
    rows = {0: row("the first of them, surely"), 1: row("hard to say"), 2: row(truths[2])}
    shown: list[str] = []

    def judge(question: Question, answer: str) -> str | None:
        shown.append(answer)
        return truths[question.index] if question.index == 0 else None

    marked = marks("ai2d_test", path, rows, judge, count=3)
    assert shown == ["the first of them, surely", "hard to say"]
    assert [(one.verdict, one.judged) for one in marked] == [("right", True), ("unparsed", False), ("right", False)]


def test_a_row_on_disk_is_what_it_was(data: Path) -> None:
    path = miniatures.ai2d(data)
    for one in marks("ai2d_test", path, {0: row("A"), 1: row("x")}, count=3):
        assert Marked.from_row(one.as_row()) == one
        assert one.prompt.startswith("<image>Question: ")
