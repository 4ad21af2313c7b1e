"""Whole tasks on miniature data in the true formats."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import miniatures
import pytest
from miniatures import truth_of

from duetvl.core.errors import ConfigError, DataError
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.evaluation.profiles import MINDIE, MINDIE_GUIDE, PROFILES, QWEN2_VL, VLMEVALKIT, Profile
from duetvl.evaluation.question import Question
from duetvl.evaluation.tasks.registry import TASKS, find_task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A miniature of every task."""
    folders = {name: tmp_path_factory.mktemp(name) for name in miniatures.ALL}
    return {name: make(folders[name]) for name, make in miniatures.ALL.items()}


def asked(name: str, path: Path, profile: Profile = QWEN2_VL) -> list[Question]:
    return list(find_task(name).questions(path, profile))


@pytest.mark.parametrize("name", list(TASKS))
def test_right_answers_score_fully_and_wrong_ones_nothing(data: dict[str, Path], name: str) -> None:
    task = find_task(name)
    questions = asked(name, data[name])
    assert len(questions) >= 40 and [question.index for question in questions] == list(range(len(questions)))
    assert len({question.id for question in questions}) == len(questions)
    scored = [question for question in questions if not question.problem]
    values = [task.score(question, truth_of(question), QWEN2_VL).value for question in scored]
    assert min(values) == 1, [question.id for question, value in zip(scored, values, strict=True) if value < 1]
    for answer in ("", "???", "something else altogether, of which nothing is true"):
        assert not any(task.score(question, answer, QWEN2_VL).value for question in scored)
    assert all(task.score(question, "", QWEN2_VL).parsed is None for question in scored)


@pytest.mark.parametrize("name", list(TASKS))
def test_questions_are_the_same_whenever_they_are_read(data: dict[str, Path], name: str) -> None:
    """One alone, out of order, from the directory: as ranks and resumed runs read them."""
    questions = find_task(name).questions(data[name], VLMEVALKIT)
    folder = data[name] if data[name].is_dir() else data[name].parent
    again = find_task(name).questions(folder, VLMEVALKIT)
    for number in (len(questions) - 1, 7, 0):
        assert content(questions[number]) == content(again[number]) and questions[number].index == number
    with pytest.raises(IndexError):
        questions[len(questions)]


def content(question: Question) -> Any:
    """What a question holds, to be compared."""
    parts = [
        part.source if isinstance(part, ImagePart | VideoPart) else part
        for part in question.conversation.turns[0].parts
    ]
    rest = (question.id, question.truths, question.options, question.groups, question.cluster, question.problem)
    return parts, *rest


# -- choices ---------------------------------------------------------------------------------------------------------


def test_ai2d_asks_of_the_picture_in_another_row(data: dict[str, Path]) -> None:
    questions = asked("ai2d_test", data["ai2d_test"])
    assert [len({question.cluster for question in questions[at : at + 4]}) for at in range(0, 48, 4)] == [1] * 12
    assert len({question.cluster for question in questions}) == 12
    picture, text = questions[5].conversation.turns[0].parts
    assert isinstance(picture, ImagePart) and picture.source == miniatures.picture("green", size=(65, 48))
    assert picture.wish == QWEN2_VL.pixels and str(text).startswith('Question: Which "colour"\tis it?\nOptions:\nA. ')
    assert questions[5].groups == {"category": "charts"}


def test_mmmu_reports_splits_and_categories_and_both_rules(data: dict[str, Path]) -> None:
    task, questions = find_task("mmmu_dev_val"), asked("mmmu_dev_val", data["mmmu_dev_val"], VLMEVALKIT)
    assert questions[4].groups == {"split": "dev", "l2-category": "Art & Design", "category": "Art"}
    assert {question.groups["split"] for question in questions} == {"dev", "validation"}
    assert [question.index for question in questions if question.kind == "open"] == [5, 11, 17, 23, 29, 35, 41]
    number, rate = questions[5], questions[11]
    assert number.truths == ("5.2",) and rate.truths == ("24/7", "24 7")
    right = task.score(number, "length = 5.196 m", VLMEVALKIT)
    assert right == (1.0, "5.196 m; 5.2", {"vlmevalkit": 0.0})  # its text is another
    repeated = task.score(number, "5.2", VLMEVALKIT)
    assert repeated.value == 1 and repeated.others == {"vlmevalkit": 1}
    assert task.score(rate, "It is open 24/7", VLMEVALKIT).value == 1
    assert task.score(number, " ", VLMEVALKIT) == (0.0, None, {"vlmevalkit": 0.0})
    choice = questions[0]
    assert task.score(choice, "none of it can be seen", VLMEVALKIT) == (0.0, None, {"vlmevalkit": 0.0})


# -- open questions --------------------------------------------------------------------------------------------------


def test_chartqa_has_human_and_augmented_questions(data: dict[str, Path]) -> None:
    questions = asked("chartqa_test", data["chartqa_test"])
    splits = [question.groups["split"] for question in questions]
    assert (splits.count("test_human"), splits.count("test_augmented")) == (20, 20)
    assert len({question.cluster for question in questions}) == 20
    task = find_task("chartqa_test")
    assert task.score(questions[3], "2100", QWEN2_VL) == (1.0, "2100", {})  # a year is a number too
    assert task.score(questions[5], "22.5", QWEN2_VL).value == 1  # of two truths


def test_docvqa_takes_the_nearest_of_several_truths(data: dict[str, Path]) -> None:
    questions = asked("docvqa_val", data["docvqa_val"])
    assert questions[4].truths == ("J. Smith 4", "john smith 4") and questions[4].id == "4"
    value = find_task("docvqa_val").score(questions[4], "John Smyth 4", QWEN2_VL).value
    assert value == pytest.approx(1 - 1 / 12)
    assert len({question.cluster for question in questions}) == 14


def test_textvqa_by_three_rules(data: dict[str, Path]) -> None:
    task, path = find_task("textvqa_val"), data["textvqa_val"]
    ours, theirs = asked("textvqa_val", path), asked("textvqa_val", path, MINDIE)
    assert theirs[0].conversation.turns[0].parts[1:] == (
        "what is written on sign 0? Answer the question using a single word or phrase.",
    )
    picture = ours[2].conversation.turns[0].parts[0]
    assert isinstance(picture, ImagePart) and picture.source == path.parent / "train_images" / "0001.jpg"
    assert task.score(ours[0], "Dakota", QWEN2_VL) == (1.0, "dakota", {})
    assert task.score(theirs[0], "Dakota", MINDIE) == (0.0, "dakota", {"vqa": 1.0})
    assert task.score(theirs[4], "Stop.", MINDIE) == (1.0, "stop", {"vqa": 1.0})


def test_textvqa_from_vlmevalkits_file_is_the_same(data: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {
            "index": number,
            "image": miniatures.picture_cell("red"),
            "question": "Which?",
            "answer": repr(["stop"] * 9 + ["go"]),
        }
        for number in range(2)
    ]
    path = miniatures.write_tsv(tmp_path / "TextVQA_VAL.tsv", rows)
    questions = asked("textvqa_val", path, MINDIE)
    assert find_task("textvqa_val").score(questions[1], "stop", MINDIE) == (1.0, "stop", {"vqa": 1.0})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "textvqa_val_annotations.json").unlink(),
            "the answers of TextVQA are expected there",
        ),
        (lambda folder: (folder / "textvqa_val_annotations.json").write_text('{"a": 1}'), 'expected {"annotations"'),
        (
            lambda folder: (folder / "textvqa_val.jsonl").write_text('{"image": "a"}\n'),
            "has no 'question'; its keys are image",
        ),
    ],
)
def test_textvqa_says_what_is_damaged(tmp_path: Path, damage: Any, message: str) -> None:
    path = miniatures.textvqa(tmp_path / "t", 4)
    damage(path.parent)
    with pytest.raises(DataError, match=message):
        find_task("textvqa_val").questions(path, QWEN2_VL)


def test_textvqa_counts_what_is_missing(tmp_path: Path) -> None:
    path = miniatures.textvqa(tmp_path / "t", 4)
    (path.parent / "train_images" / "0001.jpg").unlink()
    annotations = json.loads((path.parent / "textvqa_val_annotations.json").read_text())
    del annotations["annotations"][0]
    (path.parent / "textvqa_val_annotations.json").write_text(json.dumps(annotations))
    first, second, third, _ = (question.problem for question in asked("textvqa_val", path))
    assert first == "its answers are not among the annotations" and not second and "0001.jpg': no such file" in third


# -- videos ----------------------------------------------------------------------------------------------------------


def test_videobench_has_one_to_six_options_and_counts_missing_videos(data: dict[str, Path]) -> None:
    task, questions = find_task("videobench"), asked("videobench", data["videobench"], MINDIE)
    by_id = {question.id: question for question in questions}
    missing = [question.id for question in questions if question.problem]
    assert missing == ["MOT/MOT_4", "MOT/MOT_5"] and "v_2.mp4': no such file under" in by_id["MOT/MOT_4"].problem
    counts = {len(question.options) for question in questions}
    assert counts == {1, 2, 3, 4, 5, 6}
    video, text = by_id["ActivityNet/ActivityNet_3"].conversation.turns[0].parts
    assert isinstance(video, VideoPart) and video.fps == 2.0
    assert str(text).startswith("What happens in 3? Please respond with only")
    assert by_id["MSRVTT/MSRVTT_5"].groups == {"set": "MSRVTT"}
    third = by_id["TVQA/TVQA_2"]
    assert third.truths == ("C",)
    assert task.score(third, "Answer: C", MINDIE) == (0.0, "A", {})
    assert task.score(third, "Answer: C", QWEN2_VL) == (1.0, "C", {})
    guide = find_task("videobench:TVQA").questions(data["videobench"], MINDIE_GUIDE)[0].conversation.turns[0].parts[0]
    assert isinstance(guide, VideoPart) and guide.fps == 0.5


def test_sets_of_videobench_are_chosen_by_name(data: dict[str, Path]) -> None:
    task = find_task("videobench:TVQA,MOT")
    questions = task.questions(data["videobench"] / "Eval_QA", MINDIE)
    assert [question.groups["set"] for question in questions] == ["TVQA"] * 14 + ["MOT"] * 14
    assert task.name == "videobench:TVQA,MOT"
    with pytest.raises(ConfigError, match="videobench has no set 'TQVA'; did you mean 'TVQA'"):
        find_task("videobench:TQVA")
    with pytest.raises(DataError, match=r"NBA_QA_new\.json: no such file"):
        find_task("videobench:NBA").questions(data["videobench"], MINDIE)


def test_videobench_needs_its_answers(tmp_path: Path) -> None:
    folder = miniatures.videobench(tmp_path / "v", 2)
    answers = folder / "Eval_QA" / "answer" / "ANSWER.json"
    content = json.loads(answers.read_text())
    del content["MOT"]["MOT_1"]
    answers.write_text(json.dumps(content))
    problems = {question.id: question.problem for question in asked("videobench", folder)}
    assert problems.pop("MOT/MOT_1") == "its answer is not in ANSWER.json" and not any(problems.values())
    shutil.rmtree(answers.parent)
    with pytest.raises(DataError, match="Video-Bench's answers, which are separate from its questions"):
        find_task("videobench").questions(folder, MINDIE)
    (folder / "Eval_QA" / "MOT_QA_new.json").write_text('{"MOT_0": {"question": "q"}}')
    with pytest.raises(DataError, match="'MOT_0': expected an object with question and choices"):
        find_task("videobench").questions(folder, MINDIE)


# -- a user's own ----------------------------------------------------------------------------------------------------


def own_task(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    task_file, path = miniatures.custom(tmp_path / "own")
    task = find_task(str(task_file))
    assert (task.name, task.groups, set(task.profiles)) == ("receipts", ("shop",), set(PROFILES))
    question = task.questions(path, VLMEVALKIT)[3]
    picture, text = question.conversation.turns[0].parts
    assert isinstance(picture, ImagePart) and picture.source == path.parent / "photos" / "3.png"
    assert text == "What is total 3? (shop south)\nAnswer with a number."
    assert (question.id, question.truths, question.groups) == ("r3", ("35",), {"shop": "south"})
    assert task.score(question, "36", VLMEVALKIT).value == 1


def test_options_of_ones_own(tmp_path: Path) -> None:
    """A list in one column or several columns; answers as letters or as texts; pictures in a TSV file."""
    records = [
        {"question": "Which?", "choices": ["cat", "dog"], "answer": answer} for answer in ("dog", "A", "bird")
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    one, two, three = asked(own_task(tmp_path, "name: own\ncolumns: {options: choices}"), path)
    assert (one.truths, two.truths, one.kind, three.problem) == (
        ("B",),
        ("A",),
        "choice",
        "its answer is 'bird', its options are A, B",
    )
    assert one.conversation.turns[0].parts[-1] == QWEN2_VL.choice("Which?", {"A": "cat", "B": "dog"}, "")
    row = {
        "n": 5,
        "photo": miniatures.picture_cell("red"),
        "question": "Which?",
        "first": "cat",
        "second": "dog",
        "answer": "B",
    }
    table = miniatures.write_tsv(tmp_path / "own.tsv", [row])
    columns = "{image: photo, id: n, options: [first, second]}"
    (question,) = asked(
        own_task(tmp_path, f'name: own\nprompt: "{{question}}\\n{{options}}Letter?"\ncolumns: {columns}'), table
    )
    picture, text = question.conversation.turns[0].parts
    assert isinstance(picture, ImagePart) and picture.source == miniatures.picture("red")
    assert (question.id, text) == ("5", "Which?\nA. cat\nB. dog\nLetter?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: own\nmetrics: anls", "no field 'metrics'; did you mean 'metric'"),
        ("name: own\ncolumns: {qestion: q}", "no field 'qestion'; did you mean 'question'"),
        ("name: own\nmetric: bleu", "metric: .*'anls'.*; found 'bleu'"),
        ("columns: {}", "name: Field required"),
        ("- 1", r"own.yaml: expected fields \(name, columns"),
        ("name: [", "own.yaml: cannot be read as YAML"),
        ('name: own\nprompt: "{question"', "own.yaml: prompt: .*; write a literal brace twice"),
        ('name: own\nprompt: "{question.x}"', "own.yaml: prompt: {question.x} is not a column's name"),
    ],
)
def test_a_task_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_task(own_task(tmp_path, text))


def test_columns_that_the_data_lack_are_named(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "q", "answer": "a", "shop": "b"}\n')
    for text, message in {
        "name: own\ncolumns: {question: q}": "has no column 'q' for own",
        'name: own\nprompt: "{shp}"': "has no column 'shp' for own; did you mean 'shop'",
        "name: own\ngroups: [shp]": "did you mean 'shop'",
    }.items():
        with pytest.raises(DataError, match=message):
            find_task(own_task(tmp_path, text)).questions(path, QWEN2_VL)
    path.write_text('{"question": "q", "answer": "a", "n": 1}\n' * 2)
    with pytest.raises(DataError, match="its id '1' is that of"):
        find_task(own_task(tmp_path, "name: own\ncolumns: {id: n}")).questions(path, QWEN2_VL)


def test_an_unknown_task_has_a_nearest_name() -> None:
    with pytest.raises(ConfigError, match="no task 'ai2d_tset'; did you mean 'ai2d_test'"):
        find_task("ai2d_tset")
    with pytest.raises(ConfigError, match=r"own\.yaml: no such file"):
        find_task("nowhere/own.yaml")


def test_the_examples_of_the_docs_work(data: dict[str, Path], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation_tasks.md").read_text()
    (task_file,) = re.findall(r"```yml\n(.*?)```", text, re.DOTALL)
    _, path = miniatures.custom(tmp_path / "own")
    question = find_task(own_task(tmp_path, task_file)).questions(path, QWEN2_VL)[3]
    assert question.cluster and question.groups == {"shop": "south"} and not question.problem
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert len(names["INFOVQA"].questions(data["docvqa_val"], QWEN2_VL)) == 40
    assert {name for name in TASKS if f"| `{name}` |" in text} == set(TASKS)
    assert {name for name in PROFILES if f"| `{name}` |" in text} == set(PROFILES)
