"""Records are found and read, and every error names file and line."""

from __future__ import annotations

import json

import pytest

from duetvl.core.errors import DataError
from duetvl.data.sources.catalog import Records


def record(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def line(text: str) -> bytes:
    return json.dumps(record(text), ensure_ascii=False).encode() + b"\n"


def texts(records: Records) -> list[str]:
    return [r.values["messages"][0]["content"] for r in records]


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + line("é") + b"  \r\n\n" + line("b").replace(b"\n", b"\r\n") + line("c").rstrip())
    records = Records([file])
    assert texts(records) == ["é", "b", "c"]
    assert [r.id for r in records] == ["a.jsonl:2", "a.jsonl:5", "a.jsonl:6"]
    assert records[1].where == f"{file}:5"


def test_a_list_and_several_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record("a"), record("b")], indent=1))
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + line("c") + line("d"))
    records = Records([tmp_path / "a.json", tmp_path / "b.json"])
    assert len(records) == 4
    assert texts(records) == ["a", "b", "c", "d"]
    assert [r.id for r in records] == ["a.json:1", "a.json:2", "b.json:1", "b.json:2"]
    with pytest.raises(IndexError):
        records[4]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (b'{"messages": [\n', "a.jsonl:2: not JSON: Expecting value at column"),
        (b'{"messages": "caf\xe9"}\n', "a.jsonl:2: not UTF-8: "),
        (b"[1]\n", "a.jsonl:2: expected an object, found a list"),
        (b"1" * 5000 + b"\n", "a.jsonl:2: not JSON: "),
        (b"[" * 100_000 + b"\n", "a.jsonl:2: "),
    ],
)
def test_a_bad_line_is_an_error_when_it_is_read(tmp_path, bad, expected):
    (tmp_path / "a.jsonl").write_bytes(line("a") + bad + line("c"))
    records = Records([tmp_path / "a.jsonl"])
    assert records[0].number == 1
    assert records[2].number == 3
    with pytest.raises(DataError) as caught:
        records[1]
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b'[{"messages": [1]}, ', "a.json: not JSON"),
        ("a.json", b'[\n{"messages": [1]},\n\n oops]', "not JSON: Expecting value at line 4, column 2"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n \n", "no records"),
        ("a.json", b"[]", "no records"),
    ],
)
def test_a_bad_file_is_an_error_at_once(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Records([tmp_path / name])
    assert expected in str(caught.value)
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        Records([tmp_path / "none.jsonl"])
    with pytest.raises(DataError, match="a directory without files of records"):
        Records([tmp_path])
    with pytest.raises(DataError, match=r"\*\.jsonl: no file matches this pattern"):
        Records([tmp_path / "*.jsonl"])


def test_a_wrong_record_in_a_list_is_named_by_its_place(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record("a"), 1]))
    with pytest.raises(DataError, match=r"a\.json: record 2: expected an object, found a number"):
        Records([tmp_path / "a.json"])[1]
