"""Sizes at which pictures and frames enter the model, and their pixels as patch rows.

The reference is the slow `Qwen2VLImageProcessor` (Pillow) of transformers 4.57.6: rows and grids equal its own bit
for bit (largest difference 0). The fast one resizes with torchvision and differs from both by a grey level or two
where a picture is resized, and in the last bits elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from duetvl.core.batch import PatchBytes
from duetvl.core.errors import ConfigError, DataError
from duetvl.core.family import PatchGeometry
from duetvl.data.media.images import NO_WISH, Resize, Size

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_WIDEST_RATIO: Final = 200  # of a picture's sides, as in transformers
_SMALLEST_SIDE: Final = 28  # in LLaMA-Factory, which also brings sides of more than 200 to 1 to 180 to 1
_WIDENED_RATIO: Final = 180


@dataclass(frozen=True)
class PixelSettings:
    """How large a picture or frame may be, in pixels of its area, and how its values are scaled.

    `first` are the bounds (fewest, most) of LLaMA-Factory's own resize, which comes before the processor's there;
    None: a picture is resized once.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    first: tuple[int, int] | None = None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], geometry: PatchGeometry) -> PixelSettings:
        """Read a parsed `preprocessor_config.json` of any version of transformers.

        Raises ConfigError where it contradicts the model's geometry or asks for what is not done.
        """
        size = data.get("size") or {}
        low = _first(data.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"))
        high = _first(data.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"))
        _check_geometry(data, geometry)
        settings = cls(
            min_pixels=int(_first(low, cls.min_pixels)),
            max_pixels=int(_first(high, cls.max_pixels)),
            mean=tuple(_first(data.get("image_mean"), CLIP_MEAN)),
            std=tuple(_first(data.get("image_std"), CLIP_STD)),
            rescale=_first(data.get("rescale_factor"), 1 / 255),
            resample=int(_first(data.get("resample"), Image.Resampling.BICUBIC)),
        )
        if not 0 < settings.min_pixels <= settings.max_pixels:
            raise ConfigError(f"min_pixels {settings.min_pixels} and max_pixels {settings.max_pixels} leave no size")
        return settings

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most pixels, of the first resize where there are two."""
        return (self.min_pixels, self.max_pixels) if self.first is None else self.first

    def at_most(self, pixels: int) -> PixelSettings:
        """The same with another upper bound."""
        if self.first is None:
            return replace(self, max_pixels=pixels)
        return replace(self, first=(self.first[0], pixels))


class PatchRows(NamedTuple):
    """Patch rows of a picture or video, as bytes, and its grid."""

    rows: PatchBytes
    grid: tuple[int, int, int]


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width in multiples of `factor`, of an area in bounds, close to the given ratio.

    Rounds as transformers does, halves to even: 70 becomes 56 with a factor of 28. Raises DataError
    for an empty picture and for sides more than 200 to 1.
    """
    if min(height, width) < 1:
        raise DataError(f"a picture of {width} x {height} pixels is empty")
    if max(height, width) / min(height, width) > _WIDEST_RATIO:
        raise DataError(
            f"a picture of {width} x {height} pixels is too narrow: its sides may be at most {_WIDEST_RATIO} to 1"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def model_size(original: Size, settings: PixelSettings, geometry: PatchGeometry, wish: Resize = NO_WISH) -> Size:
    """Height and width at which a picture of this size enters the model. Raises DataError for an impossible one."""
    if (wish.height is None) != (wish.width is None):
        raise DataError("resized_height and resized_width go together; only one is given")
    height, width = original if settings.first is None else first_size(original, settings.first)
    return smart_resize(
        height if wish.height is None else wish.height,
        width if wish.width is None else wish.width,
        factor=geometry.factor,
        min_pixels=_first(wish.min_pixels, settings.min_pixels),
        max_pixels=_first(wish.max_pixels, settings.max_pixels),
    )


def first_size(original: Size, bounds: tuple[int, int]) -> Size:
    """What LLaMA-Factory's own resize makes of a picture of this size; `bounds` are the fewest and most pixels."""
    return ([original, *_first_sizes(original, bounds)])[-1]


def _first_sizes(size: Size, bounds: tuple[int, int]) -> Iterator[Size]:
    """The sizes that a picture goes through there: area in bounds, sides of 28 at least, not more than 200 to 1."""
    height, width = size
    fewest, most = bounds
    for wrong, area in ((height * width > most, most), (height * width < fewest, fewest)):
        if wrong:
            scale = math.sqrt(area / (height * width))
            # Truncated as there; a side of 0, which ends in an error there, is widened below.
            height, width = max(1, int(height * scale)), max(1, int(width * scale))
            yield height, width
    if min(height, width) < _SMALLEST_SIDE:
        height, width = max(height, _SMALLEST_SIDE), max(width, _SMALLEST_SIDE)
        yield height, width
    if width / height > _WIDEST_RATIO:
        yield height, height * _WIDENED_RATIO
    elif height / width > _WIDEST_RATIO:
        yield width * _WIDENED_RATIO, width


def resized(image: Image.Image, size: Size, settings: PixelSettings) -> Image.Image:
    """A decoded picture at the size of `model_size`."""
    for height, width in () if settings.first is None else _first_sizes((image.height, image.width), settings.first):
        image = image.resize((width, height))  # Pillow's own choice of filter, as there
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling(settings.resample))


def patch_rows(
    frames: Iterable[Image.Image], count: int, size: Size, settings: PixelSettings, geometry: PatchGeometry
) -> PatchRows:
    """Rows of `count` RGB frames of one size; a single one is used for all frames of its patch.

    An odd last frame is repeated. Rows lie by time, then by blocks of merge x merge patches; in a row lie channel,
    frame, height and width. Each frame is put into its place as it comes, so no more than one is held besides.
    """
    side, merge = geometry.patch, geometry.merge
    inside = min(count, geometry.temporal)
    grid = (-(-count // inside), size[0] // side, size[1] // side)
    blocks = (grid[0], grid[1] // merge, grid[2] // merge, merge, merge)
    values = np.empty((math.prod(blocks), geometry.channels, inside, side * side), np.uint8)
    # A line of a patch is moved as one element: `side` bytes that lie together on both sides.
    line = f"V{side}"
    target = values.view(line).reshape(*blocks, geometry.channels, inside, side)
    number = 0
    for number, frame in enumerate(frames, start=1):
        time, place = divmod(number - 1, inside)
        for channel, plane in enumerate(frame.split()):
            lines = np.asarray(plane).view(line).reshape(blocks[1], merge, side, blocks[2], merge)
            target[time, ..., channel, place, :] = lines.transpose(0, 3, 1, 4, 2)
    assert number == count, f"{number} frames, not {count}"
    for place in range(inside - -count % inside, inside):
        target[-1, ..., place, :] = target[-1, ..., place - 1, :]
    return PatchRows(PatchBytes(values, geometry.temporal, settings.mean, settings.std, settings.rescale), grid)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _check_geometry(data: Mapping[str, Any], geometry: PatchGeometry) -> None:
    expected = {
        "patch_size": geometry.patch,
        "temporal_patch_size": geometry.temporal,
        "merge_size": geometry.merge,
    }
    for key, value in expected.items():
        if data.get(key) not in (None, value):
            raise ConfigError(f"{key} is {data[key]!r}, the model's config.json says {value}")
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if data.get(key) is False:
            raise ConfigError(f"{key} false is not implemented")
    for key in ("image_mean", "image_std"):
        if data.get(key) is not None and len(data[key]) != geometry.channels:
            raise ConfigError(f"{key} {data[key]!r} needs {geometry.channels} numbers")
