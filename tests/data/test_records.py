"""Records are found and read, and every error names file and line."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from duetvl.core.errors import DataError
from duetvl.data.formats.reading import read_record
from duetvl.data.sources.catalog import Records, RecordSource, resolve


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


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_one_record_over_several_lines(tmp_path, bom):
    file = tmp_path / "a.json"
    file.write_bytes(bom + json.dumps(record("é"), indent=1, ensure_ascii=False).encode() + b"\n")
    records = Records([file])
    assert texts(records) == ["é"] and records[0].where == f"{file}: record 1"


def test_an_object_around_the_records_is_named(tmp_path):
    for indent, where in ((1, "a.json: record 1: "), (None, "a.json:1: ")):
        (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [record("a"), record("b")]}, indent=indent))
        (found,) = Records([tmp_path / "a.json"])
        assert f"{found.where}: ".endswith(where)
        with pytest.raises(DataError, match="'data' holds a list of 2 objects: if these are the records, write that"):
            read_record(found.values)


def test_objects_over_several_lines_each_are_refused(tmp_path):
    text = json.dumps(record("a"), indent=1)
    (tmp_path / "a.json").write_text(f"{text}\n{text}\n")
    with pytest.raises(DataError, match=r"a\.json: has objects that span several lines; write one per line"):
        Records([tmp_path / "a.json"])
    (tmp_path / "a.json").write_bytes(b'{"cut": \n' + line("a"))  # a damaged line is one
    assert len(Records([tmp_path / "a.json"])) == 2


def test_files_put_together_by_cat_may_have_marks_of_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"".join(b"\xef\xbb\xbf" + line(text) for text in "ab"))
    assert texts(Records([tmp_path / "a.jsonl"])) == ["a", "b"]


@pytest.mark.parametrize(("named", "there"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_data_files_may_be_spelt_otherwise(tmp_path, named, there):
    (tmp_path / there).mkdir()
    (tmp_path / there / f"{there}.jsonl").write_bytes(line("a"))
    (tmp_path / there / "dataset_info.json").write_text(json.dumps({"x": {"file_name": f"{named}.jsonl"}}))
    for path in (f"{named}.jsonl", "*.jsonl", f"{named}*"):
        assert texts(Records([tmp_path / named / path])) == ["a"]
    assert texts(Records([resolve(RecordSource(f"{tmp_path}/{named}/dataset_info.json:x"))])) == ["a"]


def test_hidden_files_of_a_directory_are_left_out(tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".hidden.json"):
        (tmp_path / name).write_bytes(line(name))
    assert texts(Records([tmp_path])) == ["a.jsonl"]


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "s.tar"])
def test_a_key_given_twice_is_an_error_where_its_values_differ(tmp_path, name):
    """Whichever is taken, the other is lost in silence."""
    same, other = ((line("a")[:-2] + b', "images": [], "images": ' + value + b"}") for value in (b"[]", b'["a.png"]'))
    if name == "s.tar":
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in (("0.json", same), ("1.json", other)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        (tmp_path / name).write_bytes(b"[" + same + b"," + other + b"]" if name == "a.json" else same + b"\n" + other)
    records = Records([tmp_path / name])
    assert records[0].values["images"] == []
    with pytest.raises(DataError, match=r"the key 'images' is given twice, with different values; keep one$"):
        records[1]


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
