"""Every kind of file: found, read at any place, scanned from any place; every error names file and line."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duetvl.core.errors import DataError
from duetvl.data.formats.reading import read_record
from duetvl.data.loading.stream import StreamSource
from duetvl.data.media.images import load_image
from duetvl.data.sources import json_files
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.catalog import Records, RecordSource, open_source, resolve
from duetvl.data.sources.records import Reading

TALK = [{"role": "user", "content": "é\t<image>"}, {"role": "assistant", "content": "b"}]


def picture(colour: tuple[int, int, int] = (9, 9, 9), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_jsonl(path: Path, count: int = 9) -> Path:
    path.write_text("\n".join(json.dumps({"n": n, "text": "ü" * (n % 4)}, ensure_ascii=False) for n in range(count)))
    return path


def write_tsv(path: Path, rows: list[str], names: str = "index\tquestion\timage") -> Path:
    path.write_bytes("\n".join([names, *rows, ""]).encode())
    return path


def write_parquet(path: Path, count: int = 10, group: int = 4) -> Path:
    parquet = importable("pyarrow.parquet")
    import pyarrow

    pictures = [{"bytes": picture((n, 0, 0)), "path": f"{n}.png"} for n in range(count)]
    table = pyarrow.table({"n": list(range(count)), "messages": [TALK] * count, "images": [[p] for p in pictures]})
    parquet.write_table(table, path, row_group_size=group)
    return path


def importable(name: str):
    try:
        return __import__(name, fromlist=["x"])
    except ImportError as error:  # pyarrow 26 needs numpy 2
        pytest.skip(str(error))


KINDS = {
    "lines.jsonl": write_jsonl,
    "list.json": lambda path: path.write_text(json.dumps([{"n": n, "é": "ö"} for n in range(9)], ensure_ascii=False)),
    "table.tsv": lambda path: write_tsv(path, [f'{n}\t"a\n""b"" {n}"\t' for n in range(9)]),
    "shard.tar": lambda path: write_tar(
        path,
        {f"d/{n}.{kind}": body for n in range(9) for kind, body in (("txt", b"a"), ("png", picture()))},
    ),
    "table.parquet": write_parquet,
}


@pytest.fixture(params=list(KINDS))
def file(request, tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "SHARD_BYTES", 40)
    KINDS[request.param](tmp_path / request.param)
    return open_source(tmp_path / request.param)[0]


def test_shards_hold_every_record_once_and_go_on_behind_any(file):
    places = file.places().at.tolist()
    found = [[at for at, _ in file.scan(*shard)] for shard in file.shards()]
    assert [at for shard in found for at in shard] == places
    for shard, inside in zip(file.shards(), found, strict=True):
        for number, at in enumerate(inside):
            assert [place for place, _ in file.scan(*shard, after=at)] == inside[number + 1 :]


def test_a_record_is_read_at_its_place_in_any_order(file):
    places = file.places()
    numbers = range(1, 1 + len(places.at)) if places.numbers is None else places.numbers.tolist()
    one_way = [file.read(int(at), number) for at, number in zip(places.at, numbers, strict=True)]
    other_way = [file.read(int(at), number) for at, number in zip(places.at[::-1], [*numbers][::-1], strict=True)]
    assert [r.values for r in one_way] == [r.values for r in other_way[::-1]]
    assert len({r.id for r in one_way}) == len(one_way) >= 9
    assert all(str(file.path) in r.where for r in one_way)


def test_what_is_open_once_travels_without_its_index(file):
    import pickle

    assert len(pickle.dumps(file)) < 1000


# -- TSV --------------------------------------------------------------------------------------------------------------


def test_quoted_fields_hold_tabs_quotes_and_line_ends(tmp_path):
    rows = ['1\t"a\tb\n""c"""\tx', '2\td"e\t', '3\t""\t"y"']
    found = list(Records([write_tsv(tmp_path / "a.tsv", rows)]))
    assert [(r.number, list(r.values.values())) for r in found] == [
        (2, ["1", 'a\tb\n"c"', "x"]), (4, ["2", 'd"e', ""]), (5, ["3", "", "y"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["1\ta"], r"a\.tsv:2: has 2 fields, but the header has 3"),
        (["1\ta\tb", '2\t"a\tb'], r"a\.tsv:3: a field starts with a double quote that is never closed"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, expected):
    with pytest.raises(DataError, match=expected):
        list(Records([write_tsv(tmp_path / "a.tsv", rows)]))


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_rows_are_conversations_with_pictures(tmp_path):
    record = Records([write_parquet(tmp_path / "a.parquet")])[7]
    assert (record.id, record.values["n"]) == ("a.parquet:8", 7)
    part = read_record(record.values).turns[0].parts[1]
    assert load_image(part.source).getpixel((0, 0)) == (7, 0, 0)


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file, or cut off"):
        Records([file])


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet: reading Parquet needs pyarrow; pip install 'duetvl\[parquet\]'"):
        Records([tmp_path / "a.parquet"])


# -- tar --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_key_are_a_record(tmp_path, form):
    long = "directory/" * 9 + "x" * 90
    members = {
        "a/1.json": json.dumps({"messages": TALK}).encode(),
        "a/1.png": picture((1, 0, 0)),
        f"{long}.json": json.dumps({"messages": TALK, "images": ["right.jpg"]}).encode(),
        f"{long}.left.jpg": picture(kind="JPEG"),
        f"{long}.right.jpg": picture((200, 0, 0), "JPEG"),
    }
    members[f"{long}.json"] = members[f"{long}.json"].replace(b"right.jpg", b"right.jpg")
    records = Records([write_tar(tmp_path / "s.tar", members, form)])
    assert [r.id for r in records] == ["s.tar:a/1", f"s.tar:{long}"]
    found = [read_record(r.values).turns[0].parts[1].source for r in records]
    assert all(isinstance(source, Blob) for source in found)
    assert [load_image(source).getpixel((0, 0))[0] for source in found] == pytest.approx([1, 200], abs=3)


def test_a_text_answers_its_pictures(tmp_path):
    members = {"1.jpg": picture(kind="JPEG"), "1.txt": b" a cat\n", "2.mp4": b"0", "2.caption": b"a dog"}
    first, second = Records([write_tar(tmp_path / "s.tar", members)])
    assert first.values["messages"] == [
        {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a cat"},
    ]  # fmt: skip
    assert str(second.values["videos"][0]) == f"{tmp_path}/s.tar: 2.mp4"


def test_damaged_shards_are_named(tmp_path):
    whole = write_tar(tmp_path / "s.tar", {"1.txt": b"a", "1.png": picture() * 20}).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"s\.tar: ends inside of 1\.png; the file is cut off"):
        Records([tmp_path / "s.tar"])
    (tmp_path / "s.tar").write_bytes(b"\x1f\x8b" + b"0" * 2000)
    with pytest.raises(DataError, match=r"s\.tar: not a tar file, or damaged: .*compressed"):
        Records([tmp_path / "s.tar"])
    with pytest.raises(DataError, match=r"s\.tar: 1: needs a \.json, or a \.txt and .*; found \.png"):
        Records([write_tar(tmp_path / "s.tar", {"1.png": b""})])[0]
    with pytest.raises(DataError, match=r"s\.tar: 1\.png: is damaged|s\.tar: 1\.png: is not an image"):
        load_image(Records([write_tar(tmp_path / "s.tar", {"1.png": b"x", "1.txt": b""})])[0].values["images"][0])
    gone = Blob(str(tmp_path / "s.tar"), 100_000, 99, "1.png")
    with pytest.raises(DataError, match="lies beyond the end of the file, which is cut off"):
        gone.read()


def asked(content: Any, **beside: Any) -> bytes:
    """A JSON member with one question."""
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    return json.dumps({"messages": talk, **beside}).encode()


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (asked("<image>", images=["1.png"]), lambda v: v["images"][0]),
        (asked("<image>", images=["./1.png"]), lambda v: v["images"][0]),
        (asked("<image>", images=["train2017/1.png"]), lambda v: v["images"][0]),
        (asked("<image>", images=["C:\\data\\1.png"]), lambda v: v["images"][0]),
        (asked("<image>", image="png"), lambda v: v["image"]),
        (asked("<image>", images=[{"path": "1.png", "bytes": None}]), lambda v: v["images"][0]["path"]),
        (asked("<video>", videos=[["1.png"]]), lambda v: v["videos"][0][0]),
        (asked([{"type": "image", "image": "1.png"}]), lambda v: v["messages"][0]["content"][0]["image"]),
        (asked([{"type": "image", "value": "1.png"}]), lambda v: v["messages"][0]["content"][0]["value"]),
        (asked([{"type": "image_url", "image_url": {"url": "1.png"}}]),
         lambda v: v["messages"][0]["content"][0]["image_url"]["url"]),
        (asked([{"type": "image"}, {"type": "text", "text": "1.png"}]), lambda v: v["images"][0]),
    ],
)  # fmt: skip
def test_a_member_takes_the_place_of_its_name_once(tmp_path: Path, document: bytes, place: Any) -> None:
    record = Records([write_tar(tmp_path / "s.tar", {"1.json": document, "1.png": picture()})])[0]
    assert str(place(record.values)) == f"{tmp_path}/s.tar: 1.png"
    conversation = read_record(record.values)
    assert len([part for part in conversation.turns[0].parts if not isinstance(part, str)]) == 1


def test_columns_name_the_list_of_members(tmp_path: Path) -> None:
    for document in (asked("<image>", pics=["1.png"]), asked("<image>")):
        path = write_tar(tmp_path / "s.tar", {"1.json": document, "1.png": picture()})
        record = Records([RecordSource(str(path), Reading(columns={"images": "pics"}))])[0]
        assert str(record.values["pics"][0]) == f"{path}: 1.png" and "images" not in record.values


def test_a_name_of_no_member_is_an_error(tmp_path: Path) -> None:
    """Even where there is such a file beside the shard: the member would be left out in silence."""
    (tmp_path / "2.png").write_bytes(picture())
    path = write_tar(tmp_path / "s.tar", {"1.json": asked("<image>", images=["2.png"]), "1.png": picture()})
    with pytest.raises(DataError, match=r"images names \['2.png'\], which is none of its members \(1.json, 1.png\)"):
        _ = Records([path])[0]


def test_a_json_that_is_no_record_leaves_the_text_its_answer(tmp_path: Path) -> None:
    """img2dataset writes a picture, its caption, and what it knows of the picture."""
    about = json.dumps({"url": "http://x", "caption": "a cat", "width": 28}).encode()
    members = {"1.jpg": picture(), "1.txt": b"a cat", "1.json": about}
    record = Records([write_tar(tmp_path / "s.tar", members)])[0]
    assert record.values["messages"][1]["content"] == "a cat" and len(record.values["images"]) == 1


def talks(*names: str) -> dict[str, bytes]:
    """JSON members, each with a conversation that ends with its own name."""
    return {
        name: json.dumps({"messages": [TALK[0], {"role": "assistant", "content": name}]}).encode() for name in names
    }


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (talks("chat.0.json", "chat.1.json", "chat.2.json"), {"chat.0": 0, "chat.1": 0, "chat.2": 0}),
        ({"v1.0_0.jpg": b"x", **talks("v1.0_0.json"), "v1.0_1.jpg": b"x", **talks("v1.0_1.json")},
         {"v1.0_0": 1, "v1.0_1": 1}),
        ({"v1.0.jpg": b"x", "v1.0.txt": b"a", "v1.1.jpg": b"x", "v1.1.txt": b"b"}, {"v1.0": 1, "v1.1": 1}),
        ({"v1.0_0.jpg": b"x", "v1.0_0.txt": b"a"}, {"v1.0_0": 1}),
        ({"a.left.jpg": b"x", "a.right.jpg": b"x", **talks("a.json"), **talks("b.json")}, {"a": 2, "b": 0}),
        ({**talks("a.json"), "a.left.jpg": b"x", "a.right.jpg": b"x"}, {"a": 2}),
        ({"v1.0.jpg": b"x", **talks("v1.0.json"), "v1.1.jpg": b"x"}, {"v1.0": 1, "v1.1": None}),
        ({"v1.0.jpg": b"x", "v1.1.jpg": b"x", "v1.1.txt": b"a"}, {"v1.0": None, "v1.1": 1}),
        ({"v1.0.jpg": b"x", "v1.0.txt": b"a", "v1.1.jpg": b"x", "v1.1.txt": b"b", "v1.2.jpg": b"x"},
         {"v1.0": 1, "v1.1": 1, "v1.2": None}),
        ({**talks("a.meta.json"), "a.left.jpg": b"x", "a.right.jpg": b"x"}, {"a": 2}),
        ({"._a.jpg": b"mac", "a.jpg": b"x", "._a.json": b"mac", **talks("a.json"), ".DS_Store": b""}, {"a": 1}),
    ],
)  # fmt: skip
def test_names_with_dots_keep_their_records(
    tmp_path: Path, members: dict[str, bytes], expected: dict[str, int | None]
) -> None:
    """Names and numbers of pictures; None is a record that lacks its text."""
    path = write_tar(tmp_path / "s.tar", members)
    records = Records([path])
    found: dict[str, int | None] = {}
    for k in range(len(records)):
        try:
            found[records[k].name] = len(records[k].values.get("images", ()))
        except DataError as error:
            found[str(error).split(": ")[1]] = None
    assert found == expected
    places = records.files[0].places().at.tolist()
    for k, at in enumerate(places):  # from any place on
        assert [p for p, _ in records.files[0].scan(0, path.stat().st_size, at)] == places[k + 1 :]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "a.txt", "a.jpg", "a.txt"], "a.txt and a.txt cannot both belong to one record"),
        (["a.jpg", "a.jpg", "a.txt"], "a.jpg and a.jpg cannot both"),
        (["a.jpg", "a.q1.json", "a.q2.json"], "a.q1.json and a.q2.json cannot both"),
        (["a.jpg", "a.txt", "a.caption"], "a.txt and a.caption cannot both"),
        (["a.txt"], "needs a .json, or a .txt and its pictures or videos; found .txt"),
    ],
)
def test_members_that_collide_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(DataError) as caught:
        list(Records([tmp_path / "s.tar"]))
    assert str(caught.value).startswith(f"{tmp_path}/s.tar: a: {message}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a.jpg is a link to b.jpg"),
        (tarfile.LNKTYPE, "a.jpg is a link to b.jpg"),
        (tarfile.FIFOTYPE, "a.jpg is no plain file"),
    ],
)
def test_members_that_are_no_files_are_named(tmp_path: Path, kind: bytes, message: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = kind, "b.jpg"
        tar.addfile(link)
        text = tarfile.TarInfo("a.json")
        text.size = 2
        tar.addfile(text, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match=message):
        list(Records([tmp_path / "s.tar"]))


def test_a_shard_that_was_never_closed_is_read_with_a_warning(tmp_path: Path) -> None:
    """As a writer that was killed leaves it; nothing in it tells it from one that was cut off there."""
    path = write_tar(tmp_path / "s.tar", talks("a.json", "b.json", "c.json"))
    whole = path.read_bytes()
    size = tarfile.TarFile(path).getmembers()[1].size
    for length, names in ((1024, ["a"]), (2048, ["a", "b"]), (1024 + 512 + size, ["a", "b"])):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=r"s\.tar: ends after a complete member but without"):
            assert [record.name for record in Records([path])] == names


def test_a_shard_cut_inside_of_a_header_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", talks("a.json", "b.json"))
    path.write_bytes(path.read_bytes()[: 1024 + 100])
    with pytest.raises(DataError, match=r"s\.tar: .*truncated"):
        Records([path])


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", talks("a.json", "b.json", "c.json"))
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"?" * 10
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged: bad checksum at byte 1024"):
        Records([path])


def test_shards_put_together_by_cat_keep_all_records(tmp_path: Path) -> None:
    parts = [write_tar(tmp_path / name, talks(f"{name}.json")).read_bytes() for name in ("a", "b")]
    (tmp_path / "s.tar").write_bytes(b"".join(parts))
    assert [r.name for r in Records([tmp_path / "s.tar"])] == ["a", "b"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_below_zero_end(tmp_path: Path, kind: bytes) -> None:
    """They would lead back to where the reader came from."""
    header = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    first = write_tar(tmp_path / "s.tar", talks("0.json")).read_bytes()[:1024]
    (tmp_path / "s.tar").write_bytes(first + header + bytes(1024))
    with pytest.raises(DataError, match=r"is damaged at byte 1024: .*-1024"):
        Records([tmp_path / "s.tar"])


def test_columns_of_one_name_are_named(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", ["1\ta\tb"], names="index\timage\timage")
    with pytest.raises(DataError, match=r"a\.tsv:1: two columns are named 'image'"):
        list(Records([path]))


def test_names_may_be_composed_otherwise(tmp_path: Path) -> None:
    record = json.dumps({"messages": TALK, "images": ["caf\u00e9.jpg"]}).encode()
    path = write_tar(tmp_path / "s.tar", {"cafe\u0301.jpg": picture(), "cafe\u0301.json": record})
    assert isinstance(Records([path])[0].values["images"][0], Blob)


# -- JSON -------------------------------------------------------------------------------------------------------------


def test_a_huge_line_is_an_error_and_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": "' + "x" * 500 + '"}\n{"n": 3}\n')
    records = Records([tmp_path / "a.jsonl"])
    assert [records[i].values["n"] for i in (0, 2)] == [1, 3]
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line has more than 0 MiB"):
        records[1]
    assert [ref.at for ref in StreamSource([open_source(tmp_path / "a.jsonl")]).refs()] == [0, 9, 519]


def test_lines_longer_than_shards_are_had_once_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "SHARD_BYTES", 64)
    content = "".join(json.dumps({"text": "x" * size}) + "\n" for size in (1000, 1, 500, 40, 54, 53, 52))
    (tmp_path / "a.jsonl").write_text(content)
    (file,) = open_source(str(tmp_path / "a.jsonl"))
    found = [at for start, stop in file.shards() for at, _ in file.scan(start, stop)]
    assert found == list(file.places().at) and len(found) == 7
    line = io.BytesIO(b"x" * 100 + b"\n")
    assert json_files._skip_line(line, 10) == 10 and line.tell() == 10


def test_a_file_that_is_cut_off_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": "abc')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON: .*the file may be cut off"):
        Records([tmp_path / "a.jsonl"])[1]


def test_large_elements_of_a_list_are_read_whole(tmp_path):
    values = [{"n": n, "text": "ü" * 100_000} for n in range(3)]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(values, ensure_ascii=False, indent=1))
    assert [r.values for r in Records([tmp_path / "a.json"])] == values


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\na,b\n", "comma-separated values are not supported; save it as .tsv"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("a.tsv", "question\tanswer\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        ("a.json", b"PK\3\4" + bytes(99), "is not a file of records but a ZIP archive"),
        ("a.tsv", b"PK\3\4" + bytes(99), "is not a file of records but a ZIP archive"),
        ("a.jsonl", b"\x1f\x8b123", "is not a file of records but gzip data; unpack it first"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "is not a file of records but a Git LFS pointer"),
        ("a.arrow", b"ARROW1\0\0" + bytes(99), "is not a file of records but a binary file"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/{name}: {message}")):
        Records([tmp_path / name])


def test_texts_that_begin_as_other_files_do_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("BMI\tPK\n21\tx\n")  # a BMP picture begins with BM
    assert [record.values for record in Records([tmp_path / "a.tsv"])] == [{"BMI": "21", "PK": "x"}]


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is not a file but a FIFO"):
        Records([tmp_path / "a.jsonl"])


def test_a_parquet_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    for count in (4, 6):
        records = Records([write_parquet(tmp_path / "a.parquet", count)])
        assert [record.values["n"] for record in records] == list(range(count))


# -- patterns, directories, dataset_info ------------------------------------------------------------------------------


def test_patterns_and_directories(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write_jsonl(tmp_path / name, 2)
    by_pattern, by_directory = Records([f"{tmp_path}/*.jsonl"]), Records([tmp_path])
    for records in (by_pattern, by_directory):
        assert [r.id for r in records] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    odd = write_jsonl(tmp_path / "[x].jsonl", 1)
    assert len(Records([odd])) == 1


def test_an_entry_of_dataset_info(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 4)
    entry = {"file_name": "a.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "num_samples": 2}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    source = resolve(RecordSource(f"{tmp_path}/dataset_info.json:mine", Reading(columns={"images": "pictures"})))
    assert (source.reading.format, source.max_samples) == ("sharegpt", 2)
    assert source.reading.columns["messages"] == "talk"
    assert source.reading.columns["images"] == "pictures"
    assert [str(file.path) for file in open_source(source)] == [f"{tmp_path}/a.jsonl"]
    with pytest.raises(DataError, match=r"has no data set 'mind'; did you mean 'mine'"):
        resolve(RecordSource(f"{tmp_path}/dataset_info.json:mind"))
    with pytest.raises(DataError, match=r"name one of them: .*dataset_info\.json:NAME \(mine\)"):
        resolve(RecordSource(f"{tmp_path}/dataset_info.json"))


def test_a_directory_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root, as in containers, may read everything
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}: cannot be read: Permission denied$"):
        open_source(str(tmp_path))


def test_an_index_is_eight_bytes_a_record(tmp_path):
    places = open_source(write_jsonl(tmp_path / "a.jsonl", 1000))[0].places()
    assert places.at.dtype == np.int64 and places.numbers is None
