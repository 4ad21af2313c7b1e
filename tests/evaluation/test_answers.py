"""Answers on disk: none is asked twice, and none is taken for the answer to something else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import miniatures
import pytest
from runs import asked_of, write_run

from duetvl.core.errors import ConfigError, DataError
from duetvl.data.conversation import Conversation, Turn
from duetvl.data.media.images import Resize
from duetvl.evaluation.answers import RunAnswers, data_md5, open_run, read_answers, read_run
from duetvl.evaluation.question import Question, Questions
from duetvl.storage.answers_file import alone


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.chartqa(tmp_path_factory.mktemp("data"))


def row(text: str) -> dict[str, str]:
    return {"text": text, "finish_reason": "stop"}


def test_a_torn_line_is_asked_again_and_no_other(data: Path, tmp_path: Path) -> None:
    asked = asked_of("chartqa_test", data)
    run = RunAnswers(asked, tmp_path)
    assert run.missing() == list(range(40))
    with run.file.adding() as add:
        for number in (3, 0, 7):
            run.add(add, number, row(f"answer {number}"))
    part = tmp_path / "answers.jsonl.part"
    part.write_bytes(part.read_bytes()[:-5])  # as a kill leaves it
    again = RunAnswers(asked, tmp_path)
    assert again.missing() == [number for number in range(40) if number not in (0, 3)]
    with again.file.adding() as add:
        for number in again.missing():
            again.add(add, number, row(f"answer {number}"))
    again.finish()
    answers = read_answers(tmp_path)
    assert list(answers) == list(range(40)) and all(answers[n]["text"] == f"answer {n}" for n in answers)
    assert not part.exists() and RunAnswers(asked, tmp_path).missing() == []


def test_several_processes_write_what_one_does(data: Path, tmp_path: Path) -> None:
    asked, files = asked_of("chartqa_test", data), []
    for count in (1, 2, 3):
        directory = tmp_path / str(count)
        directory.mkdir()
        runs = [RunAnswers(asked, directory) for _ in range(count)]
        for process, run in enumerate(runs):
            with run.file.adding(process) as add:
                assert run.missing(process, count) == list(range(process, 40, count))
                for number in reversed(run.missing(process, count)):
                    run.add(add, number, row(f"answer {number}"))
        whole = RunAnswers(asked, directory)
        assert whole.missing() == []
        whole.finish()
        assert [path.name for path in directory.iterdir()] == ["answers.jsonl"]
        files.append((directory / "answers.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]


def test_what_an_answer_depends_on_is_never_mixed(data: Path, tmp_path: Path) -> None:
    """Other words, other pixels, another place in the data, other weights: other keys, and the file is refused."""
    asked = asked_of("chartqa_test", data, way="weights 1")
    first = RunAnswers(asked, tmp_path)
    with first.file.adding() as add:
        for number in first.missing():
            first.add(add, number, row("14"))
    first.finish()
    small = replace(asked.profile, pixels=Resize(784, 3136))
    plain = asked.questions

    def moved(number: int) -> Question:
        return replace(plain[(number + 1) % 40], index=number)

    def worded(number: int) -> Question:
        turn = plain[number].conversation.turns[0]
        return replace(plain[number], conversation=Conversation((Turn("user", (*turn.parts, " Please.")),)))

    others = [
        asked_of("chartqa_test", data, profile="qwen2_vl", way="weights 1"),
        replace(asked, questions=asked.task.questions(data, small)),
        replace(asked, questions=Questions(40, moved)),
        replace(asked, questions=Questions(40, worded)),
        replace(asked, way="weights 2"),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="40 of its lines are answers to other questions, or made in another way"):
            RunAnswers(other, tmp_path)
    assert RunAnswers(asked, tmp_path).missing() == []


def test_more_questions_later_and_fewer(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, asked_of("chartqa_test", data, count=10), data, lambda question: "14")
    assert RunAnswers(asked_of("chartqa_test", data, count=12), tmp_path).missing() == [10, 11]
    fewer = RunAnswers(asked_of("chartqa_test", data, count=4), tmp_path)
    assert fewer.missing() == []
    fewer.finish()
    assert list(read_answers(tmp_path)) == list(range(10))


def test_what_failed_is_asked_again(data: Path, tmp_path: Path) -> None:
    asked = asked_of("chartqa_test", data)
    failed = {"text": None, "finish_reason": "error", "error": "the logits are not finite"}
    write_run(tmp_path, asked, data, lambda question: failed if question.index == 5 else "14")
    assert RunAnswers(asked, tmp_path).missing() == [5]


def test_a_missing_video_is_not_asked(tmp_path: Path) -> None:
    data = miniatures.videobench(tmp_path / "data")
    run = RunAnswers(asked_of("videobench", data, profile="mindie"), tmp_path)
    assert len(run.unasked) == 2 and not set(run.unasked) & set(run.missing())
    assert all("no such file" in problem for problem in run.unasked.values())


def test_a_directory_is_of_one_run(data: Path, tmp_path: Path) -> None:
    open_run(tmp_path, {"task": "a", "profile": "b"}, {"data": data})
    open_run(tmp_path, {"task": "a", "profile": "b"}, {"data": data, "questions": 7})
    assert read_run(tmp_path)["about"]["questions"] == 7
    with pytest.raises(ConfigError, match="holds a run with profile 'b', and this one has 'c'; give each run a direct"):
        open_run(tmp_path, {"task": "a", "profile": "c"}, {})
    with pytest.raises(ConfigError, match="holds a run with seed None, and this one has 3"):
        open_run(tmp_path, {"task": "a", "profile": "b", "seed": 3}, {})
    (tmp_path / "run.json").write_text('{"settings": 1}')
    with pytest.raises(ConfigError, match="is not what duetvl eval writes"):
        read_run(tmp_path)


def test_other_files_are_left_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"answers\.jsonl:1: exists already, and is not an answer of duetvl eval"):
        RunAnswers(asked_of("chartqa_test", data), tmp_path)
    with pytest.raises(ConfigError, match="is not an answer of duetvl eval"):
        read_answers(tmp_path)
    with pytest.raises(ConfigError, match="no answers of a run"):
        read_answers(tmp_path / "gone")
    with alone(tmp_path / "answers.jsonl"), pytest.raises(ConfigError, match="another process is writing it"):
        alone(tmp_path / "answers.jsonl").__enter__()
    assert (tmp_path / "answers.jsonl").read_text() == "my notes\n"


def test_md5_of_data(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"hello\n")
    assert data_md5(tmp_path / "a.tsv") == "b1946ac92492d2347c6235b4d2611184"
    whole = data_md5(tmp_path)
    (tmp_path / "picture.jpg").write_bytes(b"1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").write_text("{}")
    assert data_md5(tmp_path) == whole
    (tmp_path / "a.tsv").write_bytes(b"hallo\n")
    assert data_md5(tmp_path) != whole
    with pytest.raises(DataError, match="gone: no such file or directory"):
        data_md5(tmp_path / "gone")


def test_a_line_holds_what_is_needed(data: Path, tmp_path: Path) -> None:
    write_run(tmp_path, asked_of("chartqa_test", data, count=2), data, lambda question: "wörd\u2028 \U0001f600")
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 2
    assert set(json.loads(lines[0])) == {"index", "id", "key", "text", "finish_reason"}
