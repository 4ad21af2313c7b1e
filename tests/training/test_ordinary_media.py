"""What people have trains with a recipe that says nothing of sizes: a photo of 12 megapixels, a minute of 720p."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import tiny_run
from clips import write_clip
from PIL import Image

from duetvl.core.errors import DataError
from duetvl.training.check import check
from duetvl.training.train import train

PUBLISHED = {"min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "merge_size": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ordinary")
    model = tiny_run.write_model(directory / "model")
    (model / "preprocessor_config.json").write_text(json.dumps(PUBLISHED))
    Image.new("RGB", (4032, 3024), (90, 120, 40)).save(directory / "photo.jpg")
    write_clip(directory / "minute.mp4", frames=120, rate=2, size=(720, 1280))
    return directory


def recipe(home: Path, name: str, *records: dict[str, object], **data: object) -> Path:
    """A recipe of one step over records of this question, in a directory of its own."""
    (home / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sections = {
        "model": {"path": str(home / "model")},
        "data": {"train": str(home / f"{name}.jsonl"), **data},
        "train": {"output_dir": str(home / name), "global_batch": len(records), "steps": 1},
        "log": {"tensorboard": False, "plot": False},
        "backend": {"device": "cpu"},
    }
    (home / f"{name}.json").write_text(json.dumps(sections))
    return home / f"{name}.json"


def asked(images: list[str], videos: list[str] | None = None, text: str = "what is this?") -> dict[str, object]:
    marks = "<image>" * len(images) + "<video>" * len(videos or [])
    messages = [{"role": "user", "content": marks + text}, {"role": "assistant", "content": "a field"}]
    return {"messages": messages, "images": images, "videos": videos or []}


def test_a_photo_and_a_minute_of_video_train_by_default(home: Path) -> None:
    assert train(recipe(home, "default", asked(["photo.jpg"], ["minute.mp4"]))).step == 1


def test_by_default_five_photos_fit(home: Path) -> None:
    lines = list(check(recipe(home, "five", asked(["photo.jpg"] * 5), asked([], ["minute.mp4"]))))
    tokens = next(line for line in lines if ", longest " in line)
    assert int(tokens.split()[-1]) <= 4096


def test_check_proposes_values_with_which_every_sample_trains(home: Path) -> None:
    """For pictures, for videos, and a length; boxes are texts that change with the size of their picture."""
    Image.new("RGB", (448, 448)).save(home / "small.png")
    objects = {"objects": {"ref": ["it"], "bbox": [[0, 0, 448, 448]]}}
    album, boxed = asked(["small.png"] * 9), asked(["small.png"] * 7, text="<ref-object>? <bbox>") | objects
    records = (album, boxed, asked([], ["minute.mp4"] * 2), asked(["small.png"]))
    file = recipe(home, "album", *records, cutoff_len=1400, video_total_pixels=784 * 1000)
    lines = checked(file, 3)
    proposal = next(line for line in lines if "longer than" in line).split(": ")[1]
    smaller, longer = proposal.split("; or ")
    assert [re.sub(r"\d+", "N", text) for text in (smaller, longer)] == [
        "data.max_pixels=N and data.video_total_pixels=N would fit all",
        "data.cutoff_len=N would fit all, with more memory",
    ]
    bounds = smaller.removesuffix(" would fit all").split(" and ")
    assert checked(file, 0, *bounds) and checked(file, 0, longer.split()[0])
    assert train(file, bounds).step == 1


def checked(file: Path, bad: int, *overrides: str) -> list[str]:
    """What is said of a recipe that has so many bad records."""
    lines: list[str] = []
    ends = pytest.raises(DataError, match=rf"would meet {bad} bad records") if bad else nullcontext()
    with ends:
        for line in check(file, overrides):
            lines.append(line)
    return lines
