"""LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from duetvl.core.errors import DataError
from duetvl.data.conversation import Conversation, ImagePart, Preference
from duetvl.data.formats.dataset_info import SourceInfo, read_dataset_info
from duetvl.data.formats.reading import read_record


def info(directory: Path, **entry: Any) -> SourceInfo:
    (directory / "a.json").write_text("[]")
    path = directory / "dataset_info.json"
    path.write_text(json.dumps({"mine": {"file_name": "a.json", **entry}, "other": {"file_name": "b.json"}}))
    return read_dataset_info(path, "mine")


def read(found: SourceInfo, record: dict[str, Any]) -> list[tuple[Any, ...]]:
    conversation = read_record(record, form=found.format, columns=found.columns, tags=found.tags)
    assert isinstance(conversation, Conversation)
    return [(turn.role, *turn.parts) for turn in conversation.turns]


def test_messages_with_pictures(tmp_path: Path) -> None:
    """The entry that LLaMA-Factory ships for its demo."""
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    found = info(tmp_path, formatting="sharegpt", columns=columns, tags=tags, num_samples=7)
    assert found.files == (tmp_path / "a.json",) and found.num_samples == 7
    record = {
        "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
        "images": ["x.png"],
        "system": "not named, so not used",
    }
    (_, picture, text), answer = read(found, record)
    assert isinstance(picture, ImagePart) and text == "a" and answer == ("assistant", "b")


def test_alpaca_is_the_usual_formatting(tmp_path: Path) -> None:
    record = {"instruction": "a", "input": "b", "output": "c", "history": [["x", "y"]], "system": "S"}
    assert read(info(tmp_path), record) == [("user", "a\nb"), ("assistant", "c")]
    columns = {"prompt": "instruction", "response": "output", "history": "history", "system": "system", "tools": None}
    expected = [("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "a"), ("assistant", "c")]
    assert read(info(tmp_path, columns=columns), record) == expected


def test_sharegpt_without_columns(tmp_path: Path) -> None:
    found = info(tmp_path, formatting="sharegpt")
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read(found, {"conversations": talk, "images": ["x.png"]}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("formatting", ["sharegpt", "alpaca"])
def test_ranking(tmp_path: Path, formatting: str) -> None:
    task = formatting == "alpaca"
    own = {"prompt": "q"} if task else {"messages": "conversations"}
    found = info(tmp_path, formatting=formatting, ranking=True, columns={**own, "chosen": "good", "rejected": "bad"})
    prompt = {"q": "a"} if task else {"conversations": [{"from": "human", "value": "a"}]}
    answers = (
        {"good": "x", "bad": "y"}
        if task
        else {k: {"from": "gpt", "value": v} for k, v in (("good", "x"), ("bad", "y"))}
    )
    pair = read_record({**prompt, **answers}, form=found.format, columns=found.columns, tags=found.tags)
    assert isinstance(pair, Preference)
    assert (pair.prompt.turns[0].parts, pair.chosen.parts, pair.rejected.parts) == (("a",), ("x",), ("y",))


def test_a_directory_is_its_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", ".hidden"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text("")
    assert [file.name for file in info(tmp_path, file_name="set").files] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": None, "hf_hub_url": "a/b"}, "hf_hub_url 'a/b' is not a local file"),
        ({"file_name": None, "script_url": "a"}, "download it and give it as file_name"),
        ({"file_name": None}, "has no file_name"),
        ({"file_name": "c.json"}, "c.json: no such file"),
        ({"file_name": "empty"}, "contains no files"),
        ({"formatting": "sharegtp"}, "formatting is 'sharegtp'; did you mean 'sharegpt'?"),
        ({"ranking": "yes"}, "ranking is 'yes', expected true or false"),
        ({"columns": {"promt": "a"}}, "columns has no 'promt'; did you mean 'prompt'?"),
        ({"columns": {"prompt": 3}}, "columns.prompt must be a text, found 3"),
        ({"columns": {"kto_tag": "label"}}, "kto_tag: answers with a like"),
        ({"columns": []}, None),
        ({"tags": "x"}, "tags must be an object, found str"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_entries_that_cannot_be_used(tmp_path: Path, entry: dict[str, Any], message: str | None) -> None:
    (tmp_path / "empty").mkdir()
    if message is None:  # an empty value is none
        assert info(tmp_path, **entry).format == "alpaca"
        return
    with pytest.raises(DataError) as caught:
        info(tmp_path, **entry)
    assert message in str(caught.value) and "dataset_info.json:mine" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object of data sets, found list"),
        ('{"mien": {}}', "has no data set 'mine'; did you mean 'mien'?"),
        ('{"mine": []}', "expected an object, found list"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "dataset_info.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_dataset_info(path, "mine")
    assert message in str(caught.value) and str(path) in str(caught.value)
