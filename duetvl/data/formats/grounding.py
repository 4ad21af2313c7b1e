"""Boxes and points: found in records, and written as text once the sizes of pictures are known.

Qwen2-VL was taught thousandths of a picture's sides, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`; Qwen2.5-VL pixels of
the picture as it enters the model, after resizing, `[x1, y1, x2, y2]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, Final, Literal

from duetvl.core.errors import DataError, one_line, shown
from duetvl.core.family import Grounding
from duetvl.data.conversation import BoxPart, Conversation, ImagePart, Part, RefPart, Turn, VideoPart
from duetvl.data.formats.coordinates import find_coordinates

Unit = Literal["pixels", "norm1000"]
Size = tuple[int, int]  # height, width

_SLACK: Final = 0.01  # a box may reach this part of a side beyond the picture: labels are rounded


def read_objects(objects: Any, images: int) -> tuple[list[RefPart], list[BoxPart] | None]:
    """ms-swift's {"ref": [...], "bbox": [...], "bbox_type": "real" | "norm1", "image_id": [...]} beside messages.

    Without objects there are no boxes (None), and markers are plain text. Raises DataError.
    """
    if objects is None:
        return [], None
    if not isinstance(objects, Mapping):
        raise DataError(f"objects must have ref and bbox, found {type(objects).__name__}")
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
    parts = [BoxPart(owner, _numbers(box, unit), unit) for owner, box in zip(owners, boxes, strict=True)]
    return [RefPart(ref) for ref in refs], parts


def find_boxes(conversation: Conversation, unit: Unit) -> Conversation:
    """The conversation with boxes and points that its texts hold as parts of their own, see `find_coordinates`.

    Each belongs to the last picture before it. What is no coordinate without a picture (a bare list of numbers) is
    left alone in a conversation without media. Raises DataError where there is no picture, or where something looks
    like coordinates and is in no known form: none may stay in another unit than the others.
    """
    strict = any(isinstance(part, ImagePart | VideoPart) for turn in conversation.turns for part in turn.parts)
    images = -1
    turns = []
    for turn in conversation.turns:
        parts: list[Part] = []
        for part in turn.parts:
            if isinstance(part, ImagePart):
                images += 1
            if isinstance(part, str) and turn.role != "system":
                parts += _split(part, images, unit, strict)
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
    if part.form == "plain":
        return " ".join(map(str, numbers))
    if part.form == "list" or style == "absolute":
        step = {"mark": 4, "quad": 8}.get(part.form, len(numbers))
        return ", ".join(f"[{', '.join(map(str, numbers[at : at + step]))}]" for at in range(0, len(numbers), step))
    pairs = ",".join(f"({x},{y})" for x, y in zip(numbers[::2], numbers[1::2], strict=True))
    mark = "quad" if part.form == "quad" else "box"
    return f"<|{mark}_start|>{pairs}<|{mark}_end|>"


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


def _split(text: str, image: int, unit: Unit, strict: bool) -> Iterator[Part]:
    for found in find_coordinates(text, strict=strict):
        if isinstance(found, str):
            yield found
        elif image < 0:
            raise DataError(f"{shown(found.text)} has no picture before it that its coordinates could belong to")
        else:
            yield BoxPart(image, _checked(found.values, unit, corners=found.corners), unit, found.form)


def _numbers(box: Any, unit: Literal["pixels", "norm1"]) -> tuple[float, ...]:
    if not (isinstance(box, list | tuple) and len(box) in (2, 4) and all(_is_finite(value) for value in box)):
        raise DataError(f"a box is [x1, y1, x2, y2] and a point [x, y], found {shown(box)}")
    return _checked(tuple(float(value) for value in box), unit, corners=len(box) == 4)


def _checked(values: tuple[float, ...], unit: str, *, corners: bool) -> tuple[float, ...]:
    """Coordinates that can be what they are said to be. Raises DataError."""
    if not all(map(_is_finite, values)):
        raise DataError(f"box {_shown(values)} has numbers beyond any picture")
    if unit != "norm1" and max(values) <= 1 and any(value != int(value) for value in values):
        raise DataError(f"box {_shown(values)} is in parts of the picture's sides (0 to 1), not in {unit}")
    for at in range(0, len(values) if corners else 0, 4):
        x1, y1, x2, y2 = values[at : at + 4]
        if x1 > x2 or y1 > y2:
            raise DataError(
                f"box {_shown(values[at : at + 4])} is not x1, y1, x2, y2: its corners are in the wrong order"
            )
    return values


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and isfinite(value)


def _shown(values: Sequence[float]) -> str:
    return one_line(f"[{', '.join(f'{value:g}' for value in values)}]", 120)
