"""Samples as the model sees them: text with its trained spans marked, grids, positions, and the pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from duetvl.core.batch import IGNORE, Pair, Sample
from duetvl.core.family import Family, PatchGeometry
from duetvl.data.encode import Processor
from duetvl.data.media.pixels import PixelSettings

PLAIN: Final = ("«", "»")  # around what is trained
COLOURED: Final = ("\x1b[32m", "\x1b[0m")
_LONGEST_SIDE: Final = 224  # of a picture in the sheet, in pixels
_MOST_FRAMES: Final = 8  # of a video in the sheet
_GAP: Final = 6


class ShownMedium(NamedTuple):
    """One picture or video of a sample: its kind, its grid and its patch rows."""

    kind: str
    grid: tuple[int, int, int]
    rows: np.ndarray


def text_view(sample: Sample | Pair, processor: Processor, marks: tuple[str, str] = PLAIN) -> str:
    """Several lines about one sample; what is trained stands between the two `marks`."""
    if isinstance(sample, Pair):
        answers = (("chosen", sample.chosen), ("rejected", sample.rejected))
        return "\n".join(f"{name}: {_one(answer, processor, marks)}" for name, answer in answers)
    return _one(sample, processor, marks)


def _one(sample: Sample, processor: Processor, marks: tuple[str, str]) -> str:
    trained = 0 if sample.labels is None else int(np.count_nonzero(sample.labels != IGNORE))
    lines = [f"{sample.id or 'sample'}: {len(sample)} tokens, {trained} trained"]
    lines += _media_lines(sample, processor.family)
    lines += ["positions (time, height, width): " + ", ".join(_stretches(sample, processor.family))]
    return "\n".join([*lines, _marked_text(sample, processor, marks).rstrip("\n")])


def _media_lines(sample: Sample, family: Family) -> Iterator[str]:
    seconds = sample.second_per_grid_ts
    for kind, grids in (("image", sample.image_grid_thw), ("video", sample.video_grid_thw)):
        for number, grid in enumerate(grids):
            time, height, width = (int(size) for size in grid)
            pixels = f"{width * family.geometry.patch} x {height * family.geometry.patch} pixels"
            line = f"{kind} {number + 1}: grid {time} x {height} x {width}, {pixels}"
            if kind == "video":
                line += f", {time * family.geometry.temporal} frames"
                line += f", {seconds[number]:.3f} s per grid" if seconds is not None else ""
            yield f"{line}, {family.placeholder_count(grid)} tokens"


def _stretches(sample: Sample, family: Family) -> Iterator[str]:
    """Positions of each stretch of text, where the three are one, and of each medium."""
    at, _ = family.position_index(
        sample.input_ids, sample.image_grid_thw, sample.video_grid_thw, sample.second_per_grid_ts
    )
    pads = {family.special.image: "image", family.special.video: "video"}
    start = 0
    for kind, run in groupby(pads.get(int(number), "text") for number in sample.input_ids):
        stop = start + len(list(run))
        spans = [_span(axis[start:stop]) for axis in at]
        yield f"{kind} {spans[0]}" if kind == "text" else f"{kind} ({', '.join(spans)})"
        start = stop


def _span(numbers: np.ndarray) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}-{high}"


def _marked_text(sample: Sample, processor: Processor, marks: tuple[str, str]) -> str:
    labels = np.full(len(sample), IGNORE) if sample.labels is None else sample.labels
    text, start = "", 0
    for trained, run in groupby(labels != IGNORE):
        stop = start + len(list(run))
        part = _shortened(sample.input_ids[start:stop], processor)
        text += f"{marks[0]}{part}{marks[1]}" if trained else part
        start = stop
    return text


def _shortened(ids: np.ndarray, processor: Processor) -> str:
    """The text of ids; a run of placeholders is shown by its length."""
    pads, parts = (processor.family.special.image, processor.family.special.video), []
    for pad, run in groupby(ids.tolist(), key=lambda number: number if number in pads else None):
        some = list(run)
        text = processor.decode(some[:1] if pad is not None else some, skip_special_tokens=False)
        parts.append(f"[{len(some)} x {text}]" if pad is not None else text)
    return "".join(parts)


# -- pixels ------------------------------------------------------------------------------------------------------------


def contact_sheet(samples: Sequence[Sample | Pair], processor: Processor) -> Image.Image | None:
    """All pictures of the samples after processing, one row a medium; None where there are none."""
    shelves = []
    for sample in samples:
        for medium in media(sample.chosen if isinstance(sample, Pair) else sample):
            settings = processor.image_settings if medium.kind == "image" else processor.video_settings
            shelves.append([_reduced(frame) for frame in frames(medium, settings, processor.family.geometry)])
    if not shelves:
        return None
    width = max(sum(picture.width + _GAP for picture in shelf) for shelf in shelves) + _GAP
    heights = [max(picture.height for picture in shelf) + _GAP for shelf in shelves]
    sheet = Image.new("RGB", (width, sum(heights) + _GAP), "white")
    top = _GAP
    for shelf, height in zip(shelves, heights, strict=True):
        left = _GAP
        for picture in shelf:
            sheet.paste(picture, (left, top))
            left += picture.width + _GAP
        top += height
    return sheet


def media(sample: Sample) -> Iterator[ShownMedium]:
    """The pictures and videos of a sample, each with its own rows."""
    kinds = (
        ("image", sample.pixel_values, sample.image_grid_thw),
        ("video", sample.pixel_values_videos, sample.video_grid_thw),
    )
    for kind, rows, grids in kinds:
        values, start = np.asarray(rows), 0  # pixels may be bytes yet
        for grid in grids:
            stop = start + int(np.prod(grid))
            yield ShownMedium(kind, (int(grid[0]), int(grid[1]), int(grid[2])), values[start:stop])
            start = stop


def frames(medium: ShownMedium, settings: PixelSettings, geometry: PatchGeometry) -> list[Image.Image]:
    """The pixels that patch rows hold: one picture of an image, at most eight frames, evenly chosen, of a video."""
    time, height, width = medium.grid
    merge, side = geometry.merge, geometry.patch
    shape = (time, height // merge, width // merge, merge, merge, geometry.channels, geometry.temporal, side, side)
    # (time, frame, row block, row, y, column block, column, x, channel)
    ordered = medium.rows.reshape(shape).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    pictures = ordered.reshape(time * geometry.temporal, height * side, width * side, geometry.channels)
    count = 1 if medium.kind == "image" else min(_MOST_FRAMES, len(pictures))
    chosen = pictures[np.linspace(0, len(pictures) - 1, count).round().astype(int)]
    values = (chosen * np.array(settings.std) + np.array(settings.mean)) / settings.rescale
    return [Image.fromarray(picture) for picture in values.round().clip(0, 255).astype(np.uint8)]


def _reduced(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    return small
