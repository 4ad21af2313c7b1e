"""Draw small pictures of coloured shapes with questions and answers, as a chat data set.

A picture shows one to four shapes of one kind and one colour, each in its own corner. The questions
ask for the colour, the kind and the number, and for a lone shape its corner.
Everything follows from the seed.

    python scripts/demo/pictures.py build/pictures --train 4000 --held-out 100

writes `train.jsonl`, `held_out.jsonl` and the pictures that they name. A training record asks all
questions about its picture in one conversation; a few are text without a picture. A held-out record
asks one question. No picture occurs in both files.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (34, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
# The ground is a board of four light fields, in the order of POSITIONS: where a shape lies can be seen beside it.
FIELDS = ((255, 160, 160), (250, 235, 130), (140, 185, 255), (150, 230, 150))
SHAPES = ("circle", "square", "triangle", "cross")
COUNTS = (1, 2, 3, 4)
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
# Answering at random is right this often, in per cent, as held-out answers are drawn evenly.
CHANCE = {"colour": 100 / 6, "shape": 25.0, "count": 25.0, "position": 25.0}
QUESTIONS = {
    "colour": ("What colour do you see?", "Which colour is it?"),
    "shape": ("What shape do you see?", "Which shape is it?"),
    "count": ("How many shapes do you see?", "How many are there?"),
    "position": ("Where do you see it?", "Where is the shape?"),
}
TASKS = tuple(QUESTIONS)
FACTS = (
    ("How many corners has a triangle?", "3"),
    ("How many corners has a square?", "4"),
)

CELL = 28  # one visual token: a corner of the picture that a shape may occupy
# Width and height are multiples of CELL, so nothing is resized; 140 pixels span two windows of 112.
SIZES = ((56, 56), (140, 56))
SIZE_SHARES = (0.85, 0.15)
# Most training pictures hold one shape: only those have a position to ask for, and it is the
# slowest of the four to learn.
COUNT_SHARES = (0.61, 0.13, 0.13, 0.13)
TEXT_SHARE = 0.02

Box = tuple[int, int, int, int]
Record = dict[str, Any]


@dataclass(frozen=True)
class Scene:
    """What one picture shows: shapes of one kind and colour at the given POSITIONS indices."""

    size: tuple[int, int]
    brightness: float
    kind: str
    colour: str
    corners: tuple[int, ...]
    boxes: tuple[Box, ...]


def has_position(scene: Scene) -> bool:
    """Whether the position may be asked: there is one shape."""
    return len(scene.corners) == 1


def random_scene(rng: np.random.Generator, count: int, size: tuple[int, int] | None = None) -> Scene:
    """A picture's content, with `count` shapes in different corners; a drawn size if none given."""
    size = size or SIZES[rng.choice(len(SIZES), p=SIZE_SHARES)]
    corners = tuple(sorted(int(c) for c in rng.permutation(len(POSITIONS))[:count]))
    return Scene(
        size=size,
        brightness=float(rng.uniform(0.9, 1.0)),
        kind=SHAPES[rng.integers(len(SHAPES))],
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
        corners=corners,
        boxes=tuple(_random_box(rng, size, corner) for corner in corners),
    )


def _random_box(rng: np.random.Generator, size: tuple[int, int], corner: int) -> Box:
    """A box of 20 to 24 pixels a side somewhere inside the corner's cell."""
    side = int(rng.integers(20, 25))
    left = (corner % 2) * (size[0] - CELL) + int(rng.integers(1, CELL - side))
    top = (corner // 2) * (size[1] - CELL) + int(rng.integers(1, CELL - side))
    return left, top, left + side, top + side


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    picture = Image.fromarray(_ground(scene))
    pen = ImageDraw.Draw(picture)
    for box in scene.boxes:
        _draw_shape(pen, scene.kind, COLOURS[scene.colour], box)
    return picture


def _ground(scene: Scene) -> np.ndarray:
    """Four light fields: uint8 of (height, width, 3)."""
    width, height = scene.size
    board = np.array(FIELDS).reshape(2, 2, 3).repeat(height // 2, axis=0).repeat(width // 2, axis=1)
    return (board * scene.brightness).astype(np.uint8)


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, colour: tuple[int, int, int], box: Box) -> None:
    left, top, right, bottom = box
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle(box, fill=colour)
    elif kind == "triangle":
        pen.polygon([((left + right) // 2, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        third = (right - left) // 3
        pen.rectangle((left + third, top, right - third, bottom), fill=colour)
        pen.rectangle((left, top + third, right, bottom - third), fill=colour)


def answer(scene: Scene, task: str) -> str:
    """The right answer to any of the task's questions."""
    if task == "position":
        return POSITIONS[scene.corners[0]]
    return {"colour": scene.colour, "shape": scene.kind, "count": str(len(scene.corners))}[task]


def conversation(rng: np.random.Generator, scene: Scene, tasks: Sequence[str], image: str) -> Record:
    """One record: the picture and the first question in the first turn, then a turn per task."""
    turns = []
    for task in tasks:
        wordings = QUESTIONS[task]
        turns.append((wordings[rng.integers(len(wordings))], answer(scene, task)))
    messages = _messages(turns)
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return {"messages": messages, "task": tasks[0] if len(tasks) == 1 else "all"}


def _messages(turns: Sequence[tuple[str, str]]) -> list[Record]:
    return [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def held_out_records(rng: np.random.Generator, per_task: int) -> Iterator[tuple[Record, Image.Image]]:
    """`per_task` single questions of each task, every picture used once, answers spread evenly."""
    for number in range(per_task):
        for task in TASKS:
            count = 1 if task == "position" else COUNTS[number % len(COUNTS)]
            scene = random_scene(rng, count)
            image = f"held_out/{task}_{number:04d}.png"
            yield conversation(rng, scene, (task,), image), draw(scene)


def training_records(
    rng: np.random.Generator, number: int, seen: set[bytes]
) -> Iterator[tuple[Record, Image.Image | None]]:
    """`number` conversations; scenes that draw a picture of `seen` are drawn again."""
    for index in range(number):
        if rng.random() < TEXT_SHARE:
            yield {"messages": _messages([FACTS[rng.integers(len(FACTS))]]), "task": "text"}, None
            continue
        scene, picture = _unseen(rng, seen)
        tasks = [t for t in TASKS if t != "position" or has_position(scene)]
        order = [tasks[i] for i in rng.permutation(len(tasks))]
        yield conversation(rng, scene, order, f"train/{index:05d}.png"), picture


def _unseen(rng: np.random.Generator, seen: set[bytes]) -> tuple[Scene, Image.Image]:
    while True:
        scene = random_scene(rng, COUNTS[rng.choice(len(COUNTS), p=COUNT_SHARES)])
        picture = draw(scene)
        if picture.tobytes() not in seen:
            return scene, picture


def write_data_set(directory: Path, *, train: int = 4000, held_out: int = 100, seed: int = 0) -> tuple[Path, Path]:
    """Write `train` conversations and `held_out` questions per task; returns both JSONL files.

    The paths of pictures in the records are relative to `directory`.
    """
    rng = np.random.default_rng(seed)
    asked = list(held_out_records(rng, held_out))
    seen = {picture.tobytes() for _, picture in asked}
    held_out_file = _write(directory / "held_out.jsonl", asked)
    train_file = _write(directory / "train.jsonl", training_records(rng, train, seen))
    return train_file, held_out_file


def _write(file: Path, records: Iterable[tuple[Record, Image.Image | None]]) -> Path:
    (file.parent / file.stem).mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        for record, picture in records:
            if picture is not None:
                name = record["messages"][0]["content"][0]["image"]
                picture.save(file.parent / name, compress_level=1)
            lines.write(json.dumps(record) + "\n")
    return file


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training conversations")
    parser.add_argument("--held-out", type=int, default=100, help="held-out questions per task")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    files = write_data_set(given.directory, train=given.train, held_out=given.held_out, seed=given.seed)
    sys.stdout.writelines(f"{file}\n" for file in files)


if __name__ == "__main__":
    main()
