"""Published data sets to records: what is written, what is left out and why, and that nothing is overwritten."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duetvl.cli import main
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.conversation import Conversation, Preference
from duetvl.data.formats.reading import read_record
from duetvl.data.sources.catalog import Records
from duetvl.storage.files import staged_file


def picture(color: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), color, np.uint8)).save(out, kind)
    return out.getvalue()


def llava(identity: str, image: Any, *texts: str) -> dict[str, Any]:
    talk = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]
    return {"id": identity, "conversations": talk, **({} if image is None else {"image": image})}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    images = tmp_path / "train2017"
    images.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (images / name).write_bytes(picture(9))
    talks = [
        llava("1", "1.jpg", "<image>\nWhat is it?", "é 你 box", "Sure?", "Yes."),
        llava("2", ["1.jpg", "2.jpg"], "<image> or <image>?", "Both."),
        llava("3", None, "No picture?", "None."),
        llava("4", "3.jpg", "<image>\nWhat?", "It."),
        llava("5", "1.jpg", "What?", "It."),
        llava("6", "1.jpg", "<image>\nWhat?"),
        llava("7", "data:image/png;base64,AA", "<image>\nWhat?", "It."),
        llava("8", "1.jpg", "<image>\n\ud800?", "It."),
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(talks))
    return path


def test_llava(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chat.jsonl"
    command = ["data", "convert", "llava", "--annotations", str(coco), "--images", str(tmp_path / "train2017")]
    assert main([*command, "-o", str(out)]) == 0
    first, second, third = records(out)
    assert first == {
        "messages": [
            {"role": "user", "content": "<image>\nWhat is it?"},
            {"role": "assistant", "content": "é 你 box"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "images": ["train2017/1.jpg"],
    }
    assert second["images"] == ["train2017/1.jpg", "train2017/2.jpg"] and third["images"] == []
    assert all(isinstance(read_record(record), Conversation) for record in records(out))

    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"wrote 3 records to {out}"
    assert said[1] == "left out 5: 4 bad records, 1 missing pictures"
    assert said[-1] == f"  and 2 more; all are in {tmp_path / 'chat.dropped.txt'}"
    missing, unmarked, unanswered, inline, half = (tmp_path / "chat.dropped.txt").read_text().splitlines()
    assert missing == f"{coco}: record 4: {tmp_path / 'train2017' / '3.jpg'}: no such file"
    assert "record 5: the texts hold 0 <image> markers, but images lists 1" in unmarked
    assert "record 6: the conversation ends with the user's message" in unanswered
    assert "record 7: only records with files of pictures" in inline
    assert "record 8: a text contains half of a character" in half

    before = out.read_bytes()
    assert main([*command, "-o", str(out)]) == 2
    assert "exists already, and nothing is overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat.dropped.txt",
        "chat.jsonl",
        "llava.json",
        "train2017",
    ]


def test_pictures_elsewhere_are_whole_paths(coco: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    out = tmp_path / "sub" / "chat.jsonl"
    arguments = ["--annotations", str(coco), "--images", str(tmp_path / "train2017"), "-o", str(out)]
    assert main(["data", "convert", "llava", *arguments]) == 0
    assert records(out)[0]["images"] == [str(tmp_path / "train2017" / "1.jpg")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--annotations": "absent.json"}, "absent.json: cannot be read: No such file"),
        ({"--images": "absent"}, "absent: no such directory of pictures"),
        ({"-o": "absent/chat.jsonl"}, "there is no directory"),
        ({"--annotations": "bad.json"}, "no record could be converted, 1 were found; the first:"),
        ({"--annotations": "cut.json"}, "not JSON"),
    ],
)
def test_llava_that_cannot_be_converted(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], message: str
) -> None:
    (tmp_path / "bad.json").write_text("[{}]")
    (tmp_path / "cut.json").write_text("[{},")
    paths = {"--annotations": "llava.json", "--images": "train2017", "-o": "chat.jsonl", **change}
    arguments = [text for key, value in paths.items() for text in (key, str(tmp_path / value))]
    assert main(["data", "convert", "llava", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*chat*")) and not list(tmp_path.glob(".*"))


def rlhf_v(question: str | None = "What?", image: Any = None, **columns: Any) -> dict[str, Any]:
    texts = json.dumps({"question": question, "chosen": "good", "rejected": "bad"})
    return {
        "image": {"bytes": picture(1, "JPEG") if image is None else image, "path": "x.jpg"},
        "text": texts,
        **columns,
    }


def parquet_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rlhf_v(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg = picture(1, "JPEG")
    one = parquet_file(
        tmp_path / "1.parquet", [rlhf_v(), rlhf_v("<image>\nWhy?"), rlhf_v(image=jpeg[: len(jpeg) // 2])]
    )
    two = parquet_file(
        tmp_path / "2.parquet",
        [
            {"image": {"bytes": picture(2), "path": None}, "question": "a", "chosen": "b", "rejected": "c"},
            {"image": {"bytes": b"", "path": "y.jpg"}, "question": "a", "chosen": "b", "rejected": "c"},
            {"image": {"bytes": picture(2), "path": None}, "question": "a", "chosen": "b", "rejected": None},
        ],
    )
    out = tmp_path / "pairs"
    command = ["data", "convert", "rlhf-v", "--parquet", str(one), str(two), "-o", str(out)]
    assert main(command) == 0
    first, second, third = records(out / "rlhf-v.jsonl")
    assert first["messages"] == [{"role": "user", "content": "<image>What?"}]
    assert first["chosen"] == {"role": "assistant", "content": "good"}
    assert second["messages"][0]["content"] == "<image>\nWhy?" and third["rejected"]["content"] == "c"
    assert first["images"] == second["images"] != third["images"]  # one picture is one file
    assert len(list((out / "images").iterdir())) == 2
    assert first["images"][0].endswith(".jpg") and third["images"][0].endswith(".png")
    assert (out / first["images"][0]).read_bytes() == jpeg
    assert all(
        isinstance(read_record(record, media_dirs=[out]), Preference) for record in records(out / "rlhf-v.jsonl")
    )
    said = capsys.readouterr().out
    assert f"wrote 3 records to {out / 'rlhf-v.jsonl'}\nleft out 3: 3 bad records" in said
    damaged, empty, lone = (out / "dropped.txt").read_text().splitlines()
    assert "1.parquet: row 3: its picture is damaged or unreadable" in damaged
    assert "2.parquet: row 2: needs the bytes of its picture" in empty
    assert "2.parquet: row 3: a preference pair needs chosen and rejected, found no rejected" in lone
    assert main(command) == 2
    assert "pairs: exists already, and nothing is overwritten" in capsys.readouterr().err


def test_llamafactorys_rlhf_v_becomes_what_the_recipes_name(tmp_path: Path) -> None:
    """`-o data/rlhf-v.json`: a list of records, and pictures that are found from it."""
    row = {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
        "images": [{"bytes": picture(1), "path": None}],
    }
    file = parquet_file(tmp_path / "1.parquet", [row, {**row, "conversations": [{"from": "human", "value": "No?"}]}])
    out = tmp_path / "data" / "rlhf-v.json"
    out.parent.mkdir()
    command = ["data", "convert", "rlhf-v", "--parquet", str(file), "-o", str(out)]
    assert main(command) == 0
    assert json.loads(out.read_text()) == [
        {
            "messages": [{"role": "user", "content": "<image>What?"}],
            "chosen": {"role": "assistant", "content": "good"},
            "rejected": {"role": "assistant", "content": "bad"},
            "images": [f"rlhf-v/{name.name}" for name in (out.parent / "rlhf-v").iterdir()],
        }
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["rlhf-v", "rlhf-v.dropped.txt", "rlhf-v.json"]
    assert "1.parquet: row 2: the texts hold 0 <image> markers" in (out.parent / "rlhf-v.dropped.txt").read_text()
    (record,) = Records([out])
    assert (record.media_dirs[0] / record.values["images"][0]).is_file()
    assert main(command) == 2  # nothing is overwritten


def test_a_json_file_of_llava_is_a_list(coco: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    arguments = ["--annotations", str(coco), "--images", str(tmp_path / "train2017"), "-o", str(out)]
    assert main(["data", "convert", "llava", *arguments]) == 0
    found = json.loads(out.read_text())
    read = list(Records([out]))
    assert [record.values for record in read] == found and len(found) == 3
    assert all((record.media_dirs[0] / name).is_file() for record in read for name in record.values["images"])


def test_rlhf_v_with_nothing_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = parquet_file(tmp_path / "1.parquet", [rlhf_v(None)])
    assert main(["data", "convert", "rlhf-v", "--parquet", str(file), "-o", str(tmp_path / "pairs")]) == 2
    assert "no record could be converted, 1 were found" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["1.parquet"]
    missing = tmp_path / "2.parquet"
    argv = ["data", "convert", "rlhf-v", "--parquet", str(file), str(missing), "-o", str(tmp_path / "pairs")]
    assert main(argv) == 2
    assert capsys.readouterr().err == f"error: {missing}: no such file\n"


def test_a_staged_file_never_replaces_another(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"

    def write(error: Exception | None = None) -> None:
        with staged_file(target) as out:
            out.write("mine")
            if error is not None:
                raise error
            target.write_text("theirs")  # somebody was faster

    with pytest.raises(DataError, match="bad"):
        write(DataError("bad"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="exists already"):
        write()
    assert target.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]
