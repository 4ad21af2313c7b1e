"""Where the pictures and videos of records are looked for, and what is said where they are not."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duetvl.api import load_processor
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, MediaTally, MissingMedia
from duetvl.data.encode import Processor, RecordEncoder
from duetvl.data.loading.cache import CachedEncoder
from duetvl.data.media.images import load_image
from duetvl.data.media.plan import Medium
from duetvl.data.sources.catalog import Records, RecordSource, resolve
from duetvl.data.sources.records import Reading
from duetvl.data.survey import survey
from duetvl.training.recipe.reading import load_recipe


@pytest.fixture(scope="module")
def processor(processor_dir: Path) -> Processor:
    return load_processor(processor_dir)


def write(path: Path, *pictures: str) -> Path:
    """Records with a picture each."""
    talk = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "x"}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"messages": talk, "images": [name]} for name in pictures], ensure_ascii=False))
    return path


def picture(path: Path, side: int = 28) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(path, "png")


def found(processor: Processor, source: Any) -> list[Draft]:
    encoder = RecordEncoder(processor)
    return [
        encoder.draft(record) for record in Records([resolve(source) if isinstance(source, RecordSource) else source])
    ]


def paths(drafts: list[Draft]) -> list[str]:
    media = [medium for draft in drafts for medium in draft.media]
    assert all(isinstance(medium, Medium) for medium in media)
    return [str(medium.part.source) for medium in media]


def test_beside_the_file_comes_first_then_the_working_directory(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/both.png", "both.png", "data/sub/own.png", "data/coco/far.png"):
        picture(tmp_path / name)
    write(tmp_path / "data/a.json", "both.png", "sub/own.png", "data/coco/far.png", "./data/coco/far.png")
    drafts = found(processor, "data/a.json")
    far = "data/coco/far.png"
    assert paths(drafts) == ["data/both.png", "data/sub/own.png", far, far]
    lines = list(survey(drafts, merge=2).lines())
    assert "media: 2 found in data" in lines and "media: 2 found in ." in lines


def test_the_directory_of_dataset_info_comes_before_the_files_own(processor: Processor, tmp_path: Path) -> None:
    for name in ("both.png", "sub/both.png", "sub/own.png"):
        picture(tmp_path / name)
    write(tmp_path / "sub/a.json", "both.png", "own.png")
    entry = {"file_name": "sub/a.json", "formatting": "openai", "columns": {"messages": "messages", "images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    drafts = found(processor, RecordSource(f"{tmp_path}/dataset_info.json:mine"))
    assert paths(drafts) == [f"{tmp_path}/both.png", f"{tmp_path}/sub/own.png"]


def test_the_recipes_leave_the_place_to_the_rule() -> None:
    """So what `duetvl data convert` writes beside a file is found, and what the guides' files name from the working
    directory on."""
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")):
        data = load_recipe(path).data
        assert data.image_root is None and all(source.image_root is None for source in data.train), path.name


def test_a_root_that_is_given_is_the_only_one(processor: Processor, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "a.json", "a.png")
    with pytest.raises(MissingMedia) as caught:
        found(processor, RecordSource(str(tmp_path / "a.json"), Reading(image_root="/nowhere")))
    where = f"{tmp_path}/a.json: record 1"
    assert str(caught.value) == f"{where}: /nowhere/a.png: no such file; relative paths are looked up in /nowhere"


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("e\u0301te\u0301/caf\u00e9.png", "\u00e9t\u00e9/cafe\u0301.png"),
        ("caf\u00e9/a.png", "cafe\u0301\\a.png"),
    ],
)
def test_names_may_be_composed_otherwise(processor: Processor, tmp_path: Path, on_disk: str, named: str) -> None:
    picture(tmp_path / on_disk)
    assert paths(found(processor, write(tmp_path / "a.json", named))) == [str(tmp_path / on_disk)]


@pytest.mark.parametrize(
    ("named", "there"),
    [
        ("file://{dir}/a%20b.png", "a b.png"),
        ("file://localhost{dir}/a%20b.png", "a b.png"),
        ("file:{dir}/a.png", "a.png"),
        ("FILE://{dir}/caf%C3%A9.png", "caf\u00e9.png"),
        ("file://{dir}/caf%C3%A9.png", "cafe\u0301.png"),
        ("file://{dir}/100%25.png", "100%25.png"),
        ("file://sub/a.png", "sub/a.png"),
        ("a%20b.png", "a%20b.png"),
        ("sub\\a.png", "sub/a.png"),
        ("a\\b.png", "a\\b.png"),
    ],
)
def test_uris_and_names_of_windows(processor: Processor, tmp_path: Path, named: str, there: str) -> None:
    picture(tmp_path / there)
    assert paths(found(processor, write(tmp_path / "a.json", named.format(dir=tmp_path)))) == [str(tmp_path / there)]
    if named.lower().startswith("file:") and "sub" not in named and "caf" not in named:
        assert load_image(named.format(dir=tmp_path)).size == (28, 28)


def test_a_path_that_breaks_its_line_is_told_on_one(processor: Processor, tmp_path: Path) -> None:
    for name in ("a.png\n", "b" * 5000 + ".png", "c/" * 2000 + "d.png"):
        with pytest.raises(DataError) as caught:
            found(processor, write(tmp_path / "a.json", name))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/png;Base64,", ""])
def test_base64_may_be_broken_into_lines(processor: Processor, tmp_path: Path, end: str, head: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (28, 56, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    text = base64.encodebytes((tmp_path / "a.png").read_bytes()).decode().replace("\n", end)
    (draft,) = found(processor, write(tmp_path / "a.json", head + text))
    assert draft.image_grid_thw.tolist() == [[1, 2, 4]]


def test_a_cached_draft_follows_the_place_of_its_picture(processor: Processor, tmp_path: Path) -> None:
    entry = {"file_name": "sub/a.json", "formatting": "openai", "columns": {"messages": "messages", "images": "images"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    write(tmp_path / "sub/a.json", "a.png")
    encoder = CachedEncoder(RecordEncoder(processor), tmp_path / "cache")
    picture(tmp_path / "sub/a.png", 28)
    (record,) = Records([resolve(RecordSource(f"{tmp_path}/dataset_info.json:mine"))])
    assert encoder.draft(record).patches == 4
    picture(tmp_path / "a.png", 56)  # before it
    assert encoder.draft(record).patches == 16


@pytest.mark.parametrize("name", ["a.png", "0a1b2c", "file:0a1b2c", "d/a b.v1"])
def test_a_picture_that_changed_has_another_draft(processor: Processor, tmp_path: Path, name: str) -> None:
    """Whatever its name, with an ending or none."""
    encoder = CachedEncoder(RecordEncoder(processor), tmp_path / "cache")
    for side, patches in ((28, 4), (56, 16)):
        picture(tmp_path / name.removeprefix("file:"), side)
        (record,) = Records([write(tmp_path / "a.json", name)])
        assert encoder.draft(record).patches == patches == encoder.draft(record).patches


def test_nearly_all_missing_is_an_error() -> None:
    none = np.zeros(0, np.int64)
    text = Draft("a", "a", none, none, none.reshape(0, 3), none.reshape(0, 3))
    there = Draft("a", "a", none, none, none.reshape(0, 3), none.reshape(0, 3), media=("picture",))
    tally = MediaTally()
    for outcome in [text] * 50 + [there] + [MissingMedia("a.json:3: x.png: no such file")] * 9:
        tally.add(outcome)
    tally.check(1)
    tally.add(MissingMedia("a.json:4: y.png: no such file"))
    tally.check(11)
    with pytest.raises(DataError, match=r"^10 of 11 records with pictures .* last of them: a\.json:4: y\.png: no such"):
        tally.check(10)
