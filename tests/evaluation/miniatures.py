"""Small benchmarks in the formats of the true ones, with what is peculiar to them; each has at least 40 questions.

Every function writes one into a directory and returns what `duetvl eval --data` takes. What is asked can be seen: each
picture is of one colour. Truths: `truth_of` answers as a perfect model would.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from clips import write_clip
from PIL import Image

from duetvl.evaluation.question import Question

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40),
    "black": (10, 10, 10), "white": (250, 250, 250), "orange": (250, 140, 20), "grey": (128, 128, 128),
}  # fmt: skip
NAMES = list(COLOURS)
LETTERS = "ABCD"


def picture(colour: str, *, size: tuple[int, int] = (64, 48), kind: str = "JPEG") -> bytes:
    """The file of a picture (width, height) of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(file, kind)
    return file.getvalue()


def picture_cell(colour: str, **options: Any) -> str:
    """The same as a TSV file has it."""
    return base64.b64encode(picture(colour, **options)).decode()


def write_tsv(path: Path, rows: list[dict[str, Any]], *, start: str = "", end: str = "\n") -> Path:
    """Rows as pandas writes them: a cell in quotes where it has a quote, a tab or a line end; None is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name) for name in names] for row in rows)]
    path.write_bytes((start + "".join("\t".join(map(_cell, line)) + end for line in lines)).encode())
    return path


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in '"\t\n\r') else text


def truth_of(question: Question) -> str:
    """A right answer: the letter, or the truth that most people gave."""
    return max(question.truths, key=question.truths.count)


def four_options(colour: int, right: int) -> dict[str, str]:
    """Four colours by their letters; number `right` of them is that of number `colour`."""
    others = [NAMES[(colour + step) % 8] for step in (1, 2, 3)]
    return dict(zip(LETTERS, [*others[:right], NAMES[colour % 8], *others[right:]], strict=True))


def ai2d(folder: Path, count: int = 48) -> Path:
    """AI2D_TEST.tsv: of four questions three have their picture in the first one's row; cells with quotes and tabs."""
    words = ('Which "colour"\tis it?', "What is shown?\nLook well.", "Colour?", "Which colour?", "And this one?")
    rows = []
    for number in range(count):
        first, shown, right = number - number % 4, number // 4, (number + number // 4) % 4
        image = picture_cell(NAMES[shown % 8], size=(64 + shown, 48)) if number == first else 1000 + first
        rows.append(
            {
                "index": 1000 + number, "image": image, "question": words[number % 5], **four_options(shown, right),
                "answer": LETTERS[right], "category": ("shapes", "charts")[shown % 2],
            }
        )  # fmt: skip
    return write_tsv(folder / "AI2D_TEST.tsv", rows, end="\r\n")


def chartqa(folder: Path, count: int = 40) -> Path:
    """ChartQA_TEST.tsv: half human, half augmented; numbers, percentages, years and words; two questions a chart."""
    answers = ["14", "0.57", "5%", "2019", "Yes", "['21', '22']", "-3", "Inspired"]
    rows = [
        {
            "index": number, "image": picture_cell(NAMES[number // 2 % 8], size=(60 + number // 2, 40)),
            "question": f"What is the value of bar {number}?", "answer": answers[number % len(answers)],
            "split": "test_human" if number < count // 2 else "test_augmented",
        }
        for number in range(count)
    ]  # fmt: skip
    return write_tsv(folder / "ChartQA_TEST.tsv", rows)


def docvqa(folder: Path, count: int = 40) -> Path:
    """DocVQA_VAL.tsv with a byte order mark: several truths each, three questions a page, pages by reference."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        first = number - number % 3
        image = picture_cell(NAMES[number // 3 % 8], size=(90 + number, 120)) if number == first else first
        truths = [f"J. Smith {number}", f"john smith {number}"]
        question = f"Who signed letter {number}?"
        rows.append({"index": number, "image": image, "question": question, "answer": repr(truths)})
    return write_tsv(folder / "DocVQA_VAL.tsv", rows, start="\ufeff")


def mmmu(folder: Path, count: int = 42) -> Path:
    """MMMU_DEV_VAL.tsv: two splits, one to three pictures in the text, options with pictures, every sixth is open."""
    rows = []
    for number in range(count):
        many, split = 1 + number % 3, ("dev", "validation")[number % 2]
        pictures = [picture_cell(NAMES[(number + step) % 8], size=(56 + number, 56)) for step in range(many)]
        paths = [f"{number}_{step}.jpg" for step in range(many)]
        options = four_options(number, number % 4) | ({"B": "<image 3>"} if many == 3 else {})
        is_open = number % 6 == 5
        rows.append(
            {
                "index": f"{split}_Art_{number}",
                "question": "".join(f"See <image {step + 1}>. " for step in range(many)) + f"Question {number}?",
                **(dict.fromkeys(LETTERS) if is_open else options),
                "answer": ["5.2", "['24/7', '24 7']", "oak tree"][number // 6 % 3] if is_open else LETTERS[number % 4],
                "split": split,
                "image": pictures[0] if many == 1 else repr(pictures),
                "image_path": paths[0] if many == 1 else repr(paths),
                "l2-category": ("Art & Design", "Science")[number % 2],
                "category": ("Art", "Music", "Physics", "Biology")[number % 4],
            }
        )
    return write_tsv(folder / "MMMU_DEV_VAL.tsv", rows)


def textvqa(folder: Path, count: int = 40) -> Path:
    """textvqa_val.jsonl, its annotations, and pictures under another path than the file names; two questions each."""
    (folder / "train_images").mkdir(parents=True)
    questions, annotations = [], []
    for number in range(count):
        name = f"train_images/{number // 2:04}.jpg"
        (folder / name).write_bytes(picture(NAMES[number // 2 % 8]))
        truth = ["Dakota", "coca-cola", "7:45", "$1,000", "stop"][number % 5]
        people = [truth] * (10 - number % 4) + ["unanswerable", "nothing", "a sign"][: number % 4]
        key = 34602 + number
        questions.append(
            {
                "image": f"data/textvqa/{name}",
                "question": f"what is written on sign {number}?",
                "question_id": key,
                "answer": truth,
            }
        )
        answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(people, 1)]
        annotations.append({"image_id": name[13:17], "question_id": key, "answers": answers})
    (folder / "textvqa_val_annotations.json").write_text(json.dumps({"annotations": annotations}))
    path = folder / "textvqa_val.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def videobench(folder: Path, per_set: int = 14) -> Path:
    """Four sets of Video-Bench: one to six options, a number as video_id, two questions a video, one video missing."""
    (folder / "Eval_QA" / "answer").mkdir(parents=True)
    answers: dict[str, Any] = {}
    for place, (name, options) in enumerate({"ActivityNet": 4, "MOT": 6, "MSRVTT": 3, "TVQA": 5}.items()):
        (folder / "Eval_video" / name).mkdir(parents=True)
        entries = {}
        for number in range(per_set):
            video = f"./Eval_video/{name}/v_{number // 2}.mp4"
            if number % 2 == 0 and (name, number) != ("MOT", 4):
                write_clip(folder / video, frames=4 + place, rate=2)
            wanted = {("ActivityNet", 3): 1, ("MSRVTT", 2): 2, ("MSRVTT", 5): 5}.get((name, number), options)
            choices = {letter: f"{NAMES[n]} thing {number}" for n, letter in enumerate("ABCDEF"[:wanted])}
            video_id: Any = number // 2 if name == "MSRVTT" else f"v_{number // 2}"
            entries[f"{name}_{number}"] = {
                "vid_path": video, "question": f"What happens in {number}?", "choices": choices, "video_id": video_id
            }  # fmt: skip
            answers.setdefault(name, {})[f"{name}_{number}"] = {"answer": "ABCDEF"[number % wanted]}
        (folder / "Eval_QA" / f"{name}_QA_new.json").write_text(json.dumps(entries))
    (folder / "Eval_QA" / "answer" / "ANSWER.json").write_text(json.dumps(answers))
    return folder


CUSTOM_TASK = """
name: receipts
columns: {question: query, answer: total, image: photo, id: number}
prompt: "{query} (shop {shop})\\nAnswer with a number."
metric: relaxed_accuracy
groups: [shop]
"""


def custom(folder: Path, count: int = 40) -> tuple[Path, Path]:
    """A user's own: the task's YAML and its JSONL, with pictures beside it."""
    (folder / "photos").mkdir(parents=True)
    for number, colour in enumerate(NAMES):
        (folder / "photos" / f"{number}.png").write_bytes(picture(colour, kind="PNG"))
    records = [
        {"number": f"r{number}", "query": f"What is total {number}?", "total": number * 10 + 5,
         "photo": f"photos/{number % 8}.png", "shop": "north" if number % 3 else "south"}
        for number in range(count)
    ]  # fmt: skip
    (folder / "receipts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "receipts.yaml").write_text(CUSTOM_TASK)
    return folder / "receipts.yaml", folder / "receipts.jsonl"


ALL = {
    "ai2d_test": ai2d, "chartqa_test": chartqa, "docvqa_val": docvqa, "mmmu_dev_val": mmmu, "textvqa_val": textvqa,
    "videobench": videobench,
}  # fmt: skip
"""Task name -> what writes it into a directory that is there."""
