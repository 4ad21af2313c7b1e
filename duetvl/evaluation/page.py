"""report.html: one page that needs nothing else, with every question, its picture and what became of it.

Whatever comes from data or models is in the page as JSON, which the page's script shows as text and never as HTML.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from PIL import Image

from duetvl.core.errors import DuetvlError
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.data.media.images import load_image
from duetvl.data.media.video import FrameRule, plan_frames, read_frames
from duetvl.data.media.video_index import read_index
from duetvl.evaluation.compare import Comparison, verdict
from duetvl.evaluation.question import Question
from duetvl.evaluation.report import Report, tallies
from duetvl.evaluation.scoring import VERDICTS, Marked
from duetvl.storage.files import write_text

PAGE: Final = "report.html"
_SIDE: Final = 288  # pixels of the longer side of a thumbnail
_ROOM: Final = 24 * 2**20  # characters of all thumbnails: a page that a browser opens at once
_FRAMES: Final = 4  # of a video, beside each other
_IN_SCRIPT: Final = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}

Ask = Callable[[int], Question]


def write_page(report: Report, directory: Path, question: Ask) -> None:
    """Write the page of a run. `question` gives a question with its pictures, by its index."""
    pictures = _Pictures(question)
    chosen = pictures.of(report.marked)
    content = {
        "title": report.name,
        "runs": [_run(report.run, report)],
        "comparison": None,
        "questions": [_question([one], chosen.get(one.index)) for one in report.marked],
        "pictures": pictures.uris,
        "left_out": pictures.left_out,
    }
    _write(content, directory / PAGE)


def write_comparison_page(
    comparison: Comparison, runs: Sequence[Mapping[str, Any]], directory: Path, question: Ask | None
) -> None:
    """Write the page of two runs. `runs` are their run.json; without `question` there are no pictures."""
    pictures = _Pictures(question)
    ordered = [*(pair[0] for pair in comparison.different), *(pair[0] for pair in comparison.pairs)]
    chosen = pictures.of(ordered)
    content = {
        "title": f"{runs[0]['settings']['task']}: two runs",
        "runs": [_run(run) | {"name": name} for run, name in zip(runs, comparison.names, strict=True)],
        "comparison": _comparison(comparison),
        "questions": [_question(pair, chosen.get(pair[0].index)) for pair in comparison.pairs],
        "pictures": pictures.uris,
        "left_out": pictures.left_out,
    }
    _write(content, directory / PAGE)


def _write(content: Mapping[str, Any], target: Path) -> None:
    text = json.dumps(content, ensure_ascii=False)
    for character, escaped in _IN_SCRIPT.items():
        text = text.replace(character, escaped)
    template = files("duetvl.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split("/*DATA*/")
    write_text(target, f"{before}{text}{after}".encode("utf-8", "replace").decode())


def _run(run: Mapping[str, Any], report: Report | None = None) -> dict[str, Any]:
    """The head of the page: scores and settings of one run."""
    head = {
        "name": str(run["about"].get("model") or run["about"].get("server") or ""),
        "settings": list(_settings(run)),
    }
    if report is None:
        return head | {"tallies": [], "published": None, "judge": None, "remarks": []}
    return head | {
        "tallies": [{"name": name, **asdict(one)} for name, one in tallies(report.summary)],
        "published": report.published,
        "judge": report.judge,
        "remarks": list(report.remarks),
    }


def _settings(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in {**run["about"], **run["settings"]}.items():
        if value is not None and value != [] and value != {}:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _comparison(comparison: Comparison) -> dict[str, Any]:
    groups = [
        (f"{field}: {value}", one) for field, values in comparison.groups.items() for value, one in values.items()
    ]
    return {
        "verdict": verdict(comparison.whole),
        "rows": [{"name": name, **asdict(one)} for name, one in [("all", comparison.whole), *groups]],
        "left_out": comparison.left_out,
        "warnings": list(comparison.warnings),
    }


def _question(sides: Sequence[Marked], picture: int | None) -> dict[str, Any]:
    one = sides[0]
    return {
        "id": one.id, "prompt": one.prompt, "truths": list(dict.fromkeys(one.truths)), "options": dict(one.options),
        "groups": dict(one.groups), "notes": list(one.notes), "picture": picture,
        "answers": [
            {
                "text": side.answer, "parsed": side.parsed, "value": side.value, "verdict": side.verdict,
                "truncated": side.truncated, "judged": side.judged, "problem": side.problem,
            }
            for side in sides
        ],
    }  # fmt: skip


class _Pictures:
    """Thumbnails for as many questions as there is room for: first of those that are worth looking at."""

    def __init__(self, question: Ask | None):
        self._question = question
        self.uris: list[str] = []
        self.left_out = 0
        self._room = _ROOM
        self._places: dict[str, int | None] = {}  # of a cluster: several questions share a picture

    def of(self, marked: Sequence[Marked]) -> dict[int, int]:
        """The place of its picture in `uris`, by a question's index."""
        if self._question is None:
            return {}
        order = sorted(marked, key=lambda one: -VERDICTS.index(one.verdict))
        places = {one.index: self._place(one, self._question) for one in order}
        return {index: place for index, place in places.items() if place is not None}

    def _place(self, one: Marked, question: Ask) -> int | None:
        name = one.cluster or f"question {one.index}"
        if name not in self._places:
            if self._room <= 0:
                self.left_out += 1
                return None
            self._places[name] = self._add(thumbnail(question(one.index)))
        return self._places[name]

    def _add(self, uri: str) -> int | None:
        if not uri:
            return None
        self._room -= len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1


def thumbnail(question: Question) -> str:
    """The first picture of a question, or frames of its video, as a data URI; empty where there is none to see."""
    parts = (part for turn in question.conversation.turns for part in turn.parts)
    medium = next((part for part in parts if isinstance(part, ImagePart | VideoPart)), None)
    if medium is None:
        return ""
    try:
        image = load_image(medium.source) if isinstance(medium, ImagePart) else _frames(medium)
    except DuetvlError:  # what is wrong with it is the problem of its question, and told there
        return ""
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=62, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _frames(video: VideoPart) -> Image.Image:
    """Some frames of a video in a square."""
    rule = FrameRule(min_frames=2, max_frames=_FRAMES)
    shown = VideoPart(video.source, frames=_FRAMES)
    frames = list(read_frames(video.source, plan_frames(read_index(video.source), rule, shown)))[:_FRAMES]
    width, height = frames[0].size
    whole = Image.new("RGB", (2 * width, height * (1 + (len(frames) > 2))), "white")
    for place, frame in enumerate(frames):
        whole.paste(frame, (place % 2 * width, place // 2 * height))
    return whole
