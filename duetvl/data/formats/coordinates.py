"""Coordinates that stand in texts: those in a known form, and whatever looks like coordinates and is in none.

Where a data set says in which unit its coordinates are, all of them have to be rescaled. So a text is taken apart
completely: nothing that may be a coordinate is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from duetvl.core.errors import DataError, shown

Form = Literal["mark", "quad", "list", "plain"]


class Written(NamedTuple):
    """Coordinates as they stand in a text: x, y, x, y, ..., in which form, and the text itself for messages.

    `corners` are pairs of a corner and the one opposite; otherwise any points.
    """

    values: tuple[float, ...]
    form: Form
    corners: bool
    text: str


_NUMBER: Final = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_QUOTE: Final = r"\\{0,8}[\"']"  # JSON within JSON has backslashes before its quotes
_ITEM: Final = rf"\s*(?:{_QUOTE}\s*)?{_NUMBER}(?:\s*{_QUOTE})?\s*"
_PAIR: Final = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_KNOWN: Final = re.compile(
    rf"<\|(?P<mark>box|quad)_start\|>\s*{_PAIR}(?:\s*,?\s*{_PAIR})*\s*<\|(?P=mark)_end\|>"
    rf"|(?P<list>\[{_ITEM}(?:,{_ITEM})+\])"
    rf"|(?<=data-)(?:bbox|polygon)\s*=\s*{_QUOTE}\s*(?P<plain>{_NUMBER}(?:[\s,]+{_NUMBER})+)"
    rf"|{_QUOTE}(?P<key>[\w .-]{{1,64}}){_QUOTE}\s*:"
)
_NUMBERS: Final = re.compile(_NUMBER)
_BETWEEN: Final = "[], \t\r\n\"'\\"  # what may stand between a key and the lists that are its value
_STRAY: Final = re.compile(r"[\[\]{]|(?<![\w.])\.?\d")

_BOXES: Final = {"bbox_2d", "bbox", "bboxes", "bboxes_2d", "box", "boxes", "bounding_box", "bounding_boxes"}
_POINTS: Final = {
    "point_2d", "point", "points", "points_2d", "coordinate", "coordinate2", "coordinates", "start_point", "end_point",
    "quad", "quadrilateral", "poly", "polygon", "polygons", "segmentation",
}  # fmt: skip

_LOOSE: Final = rf"\s*(?:{_QUOTE})?{_NUMBER}(?:%|\s*(?:px|pixels)\b)?(?:{_QUOTE})?\s*"
_SEPARATOR: Final = r"(?:[,，;；、|]|(?<=\s))"  # noqa: RUF001
_X: Final = r"(?:x|left|cx)(?:_?(?:min|0|1))?"
_Y: Final = r"(?:y|top|cy)(?:_?(?:min|0|1))?"
_GIVEN: Final = rf"(?:{_QUOTE})?\s*[:=]\s*(?:{_QUOTE})?{_NUMBER}"
_PLACE: Final = r"\b(?:box|bbox|points?|position|location|coordinates?|coords?|corner|cent(?:er|re))"
_SEVERAL: Final = r"(?!\d{1,3}(?:,\d{3})+(?!\d))"  # what follows is not one number with separators, as 1,234,567
_FOUR: Final = rf"{_NUMBER}(?:[ \t]+{_NUMBER}){{3,4}}"
_LOOKS: Final = re.compile(
    # Numbers in brackets, up to the closing one or something else behind a comma: not "(2021, 33 MP)".
    rf"[\[({{（［【]{_LOOSE}(?:{_SEPARATOR}{_LOOSE})+(?:[\])}}）］】,，;；、|]|\Z)"  # noqa: RUF001
    r"|<\|(?:box|quad)_(?:start|end)\|>"
    rf"|<(?:box|bbox|quad|poly|polygon|points?)\b[^<>]{{0,40}}(?:>\s*{_NUMBER}|\d)|<(?:loc|patch_index)_?\d+>"
    rf"|<\s*{_NUMBER}\s*>\s*,?\s*<\s*{_NUMBER}\s*>"
    rf"|(?:bbox|point_2d|box_2d|coordinate|{_QUOTE}(?:box|point|quad|poly))\w*(?:{_QUOTE})?\s*[:=]"
    rf"[\s\[({{]*(?:{_QUOTE}\w{{1,12}}(?:{_QUOTE})\s*:\s*)?(?:{_QUOTE})?\s*{_NUMBER}"
    rf"|{_PLACE}\s*(?:[:=]\s*{_NUMBER}(?:\s*,\s*|\s+)|{_SEVERAL}{_NUMBER}\s*,\s*){_NUMBER}"
    rf"|(?:坐标|位置)[^\d\n]{{0,4}}{_NUMBER}\s*[,，、\s]\s*{_NUMBER}"  # noqa: RUF001
    rf"|(?<![\d.]){_SEVERAL}{_NUMBER}(?:\s*[,，]\s*{_NUMBER}){{3,}}"  # noqa: RUF001
    rf"|(?<![\d.]){_SEVERAL}{_NUMBER},\s*{_NUMBER}\s*(?:to|and|-+>?|–|→|~)\s*{_NUMBER},\s*{_NUMBER}"  # noqa: RUF001
    rf"|\A\s*{_FOUR}(?:[ \t]*\n\s*{_FOUR})*\s*\Z"
    rf"|\b{_X}{_GIVEN}[\s\S]{{0,60}}?\b{_Y}{_GIVEN}|\b{_Y}{_GIVEN}[\s\S]{{0,60}}?\b{_X}{_GIVEN}",
    re.IGNORECASE,
)


def find_coordinates(text: str, *, strict: bool) -> Iterator[str | Written]:
    """The text in pieces, coordinates among them.

    Known are `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` and `<|quad_start|>` with any number of pairs, lists of numbers
    under keys such as "bbox_2d" and "point_2d" however they are nested, `data-bbox="x1 y1 x2 y2"`, and with `strict`
    bare lists [x1, y1, x2, y2]. Raises DataError for what looks like coordinates otherwise: with `strict` anywhere,
    else under such a key alone.
    """
    done = 0
    for start, stop, found in _known(text, strict):
        yield from _rest(text[done:start], strict)
        yield found
        done = stop
    yield from _rest(text[done:], strict)


def _known(text: str, strict: bool) -> Iterator[tuple[int, int, Written]]:
    key, key_start, depth, last = "", 0, 0, 0  # the key whose value this is, and how deep in its lists
    for match in (*_KNOWN.finditer(text), None):
        gap = text[last : len(text) if match is None else match.start()]
        depth = _depth(gap, depth, text[key_start:last]) if key in _BOXES | _POINTS else 0
        if match is None:
            return
        if gap.strip(_BETWEEN):
            key = ""
        last = match.end()
        if match["key"]:
            key, key_start, depth = match["key"].strip().lower(), match.start(), 0
            continue
        if match["list"] and key not in _BOXES | _POINTS and not strict:
            continue
        start = match.start("plain") if match["plain"] else match.start()
        yield start, last, _understood(match, key, text[key_start if key else match.start() : last])


def _depth(gap: str, depth: int, before: str) -> int:
    """How many lists are open behind a gap between lists of numbers. Raises DataError for a number in one of them."""
    for found in _STRAY.finditer(gap):
        if found[0] == "{":
            return 0
        if found[0] not in "[]" and depth:
            raise _unknown(before[-60:] + gap[: found.end()])
        depth += {"[": 1, "]": -1}.get(found[0], 0)
        if depth <= 0:
            return 0
    return depth


def _understood(match: re.Match[str], key: str, piece: str) -> Written:
    numbers = tuple(float(number) for number in _NUMBERS.findall(match["plain"] or match[0]))
    count = len(numbers)
    form: Form
    if match["mark"] == "quad":
        good, form, corners = count % 8 == 0, "quad", False
    elif match["mark"]:
        good, form, corners = count == 2 or count % 4 == 0, "mark", count > 2
    elif match["plain"]:
        good, form, corners = count % 2 == 0, "plain", count == 4
    elif key:
        good = count % 2 == 0 and (key in _POINTS or (key in _BOXES and count in (2, 4)))
        form, corners = "list", key in _BOXES and count == 4
    else:
        good, form, corners = count == 4, "list", True
    if not good:
        raise _unknown(piece)
    return Written(numbers, form, corners, piece)


def _rest(text: str, strict: bool) -> Iterator[str]:
    found = _LOOKS.search(text) if strict else None
    if found is not None:
        raise _unknown(text[found.start() : found.end() + 30])
    if text:
        yield text


def _unknown(piece: str) -> DataError:
    return DataError(
        f"{shown(piece)} looks like coordinates and is in no known form, so it cannot be rescaled as `boxes` asks; "
        f'write boxes as "bbox_2d": [x1, y1, x2, y2] and points as "point_2d": [x, y], or put the record into a data '
        f"set whose `boxes` is as_written"
    )
