"""Boxes and points: found in records, and written as text once the sizes of pictures are known.

Qwen2-VL was taught thousandths of a picture's sides, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`; Qwen2.5-VL pixels of
the picture as it enters the model, after resizing, `[x1, y1, x2, y2]`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, Final, Literal

from duetvl.core.errors import DataError, shown
from duetvl.core.family import Grounding
from duetvl.data.conversation import BoxPart, Conversation, ImagePart, Part, RefPart, Turn

Unit = Literal["pixels", "norm1000"]
Size = tuple[int, int]  # height, width

_NUMBER: Final = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT: Final = rf"\({_NUMBER},{_NUMBER}\)"
_MARKUP: Final = rf"<\|box_start\|>\s*{_POINT}(?:\s*,\s*{_POINT})?\s*<\|box_end\|>"
_BOX_KEY: Final = rf"(?<=bbox_2d[\"'])\s*:\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_POINT_KEY: Final = rf"(?<=point_2d[\"'])\s*:\s*\[{_NUMBER},{_NUMBER}\]"
_WRITTEN: Final = re.compile(f"{_MARKUP}|{_BOX_KEY}|{_POINT_KEY}")
_SLACK: Final = 0.01  # a box may reach this part of a side beyond the picture: labels are rounded


def read_objects(objects: Any, images: int) -> tuple[list[RefPart], list[BoxPart] | None]:
    """ms-swift's {"ref": [...], "bbox": [...], "bbox_type": "real" | "norm1", "image_id": [...]} beside messages.

    Without objects there are no boxes (None), and markers are plain text. Raises DataError.
    """
    if objects is None:
        return [], None
    if not isinstance(objects, Mapping):
        raise DataError(f"objects must hold ref and bbox, found {type(objects).__name__}")
    refs, boxes = objects.get("ref") or [], objects.get("bbox") or []
    if not isinstance(refs, list | tuple) or not all(isinstance(ref, str) for ref in refs):
        raise DataError(f"objects.ref must be a list of texts, found {shown(refs)}")
    if not isinstance(boxes, list | tuple):
        raise DataError(f"objects.bbox must be a list of boxes, found {shown(boxes)}")
    kind = objects.get("bbox_type") or "real"
    if kind not in ("real", "norm1"):
        raise DataError(f"objects.bbox_type is {shown(kind)}, expected real (pixels of the file) or norm1 (0 to 1)")
    owners = objects.get("image_id") or [0] * len(boxes)
    if not isinstance(owners, list | tuple) or len(owners) != len(boxes):
        raise DataError(f"objects.image_id must name a picture for each of {len(boxes)} boxes, found {shown(owners)}")
    for owner in owners:
        if isinstance(owner, bool) or not isinstance(owner, int) or not 0 <= owner < images:
            raise DataError(f"objects.image_id names picture {shown(owner)}, the record has {images} (from 0)")
    unit: Literal["pixels", "norm1"] = "pixels" if kind == "real" else "norm1"
    parts = [BoxPart(owner, _numbers(box), unit) for owner, box in zip(owners, boxes, strict=True)]
    return [RefPart(ref) for ref in refs], parts


def find_boxes(conversation: Conversation, unit: Unit) -> Conversation:
    """The conversation with boxes and points that its texts hold as parts of their own.

    They are `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, with one pair for a point, and the numbers of "bbox_2d" and
    "point_2d" in JSON. Each belongs to the last picture before it. Raises DataError where there is none.
    """
    images = -1
    turns = []
    for turn in conversation.turns:
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, ImagePart):
                images += 1
            if isinstance(part, str) and turn.role != "system":
                parts += _split(part, images, unit)
            else:
                parts.append(part)
        turns.append(replace(turn, parts=tuple(parts)))
    return replace(conversation, turns=tuple(turns))


def write_boxes(conversation: Conversation, sizes: Sequence[tuple[Size, Size]], style: Grounding) -> Conversation:
    """The conversation with its boxes and names of objects as text.

    `sizes[k]` are the (height, width) of picture k in its file (upright: after its EXIF orientation) and in the
    model. `style` "relative" writes thousandths, at most 999; "absolute" pixels in the model. Raises DataError for a
    box that lies outside its picture.
    """
    return replace(conversation, turns=tuple(_write_turn(turn, sizes, style) for turn in conversation.turns))


def _write_turn(turn: Turn, sizes: Sequence[tuple[Size, Size]], style: Grounding) -> Turn:
    if not any(isinstance(part, BoxPart | RefPart) for part in turn.parts):
        return turn
    return replace(turn, parts=tuple(_write_part(part, sizes, style) for part in turn.parts))


def _write_part(part: Part, sizes: Sequence[tuple[Size, Size]], style: Grounding) -> Part:
    if isinstance(part, RefPart):
        return f"<|object_ref_start|>{part.text}<|object_ref_end|>" if style == "relative" else part.text
    if not isinstance(part, BoxPart):
        return part
    if not 0 <= part.image < len(sizes):
        raise DataError(f"box {_shown(part.values)} belongs to picture {part.image + 1}, of {len(sizes)}")
    numbers = _rescaled(part, *sizes[part.image], style)
    if style == "absolute" or part.listed:
        return f"[{', '.join(map(str, numbers))}]"
    pairs = ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    return f"<|box_start|>{pairs}<|box_end|>"


def _rescaled(part: BoxPart, original: Size, model: Size, style: Grounding) -> list[int]:
    """x, y, x, y, ... in what the style counts."""
    height, width = original
    given = {"pixels": (width, height), "norm1": (1, 1), "norm1000": (1000, 1000)}[part.unit]
    wanted = (1000, 1000) if style == "relative" else (model[1], model[0])
    most = (999, 999) if style == "relative" else wanted
    numbers = []
    for at, value in enumerate(part.values):
        share = value / given[at % 2]
        if not -_SLACK <= share <= 1 + _SLACK:
            raise DataError(
                f"box {_shown(part.values)} in {part.unit} lies outside picture {part.image + 1} of {width} x {height} "
                f"pixels; it must be x1, y1, x2, y2 (or x, y) in that unit"
            )
        numbers.append(min(max(round(share * wanted[at % 2]), 0), most[at % 2]))
    return numbers


def _split(text: str, image: int, unit: Unit) -> Iterator[Part]:
    at = 0
    for match in _WRITTEN.finditer(text):
        numbers = tuple(float(group) for group in match.groups() if group is not None)
        if image < 0:
            raise DataError(f"{shown(match.group(0))} has no picture before it whose coordinates these could be")
        listed = not match.group(0).startswith("<")
        start = match.start() + (match.group(0).index("[") if listed else 0)
        if start > at:
            yield text[at:start]
        yield BoxPart(image, _numbers(numbers), unit, listed)
        at = match.end()
    if at < len(text):
        yield text[at:]


def _numbers(box: Any) -> tuple[float, ...]:
    good = isinstance(box, list | tuple) and len(box) in (2, 4) and all(_is_finite(value) for value in box)
    if not good:
        raise DataError(f"a box is [x1, y1, x2, y2] and a point [x, y], found {shown(box)}")
    if len(box) == 4 and not (box[0] <= box[2] and box[1] <= box[3]):
        raise DataError(f"box {_shown(box)} is not x1, y1, x2, y2: a corner lies before the other")
    return tuple(float(value) for value in box)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and isfinite(value)


def _shown(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
