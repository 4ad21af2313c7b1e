"""Pictures and frames to patch rows, with the numbers of transformers' image processor.

The reference is the slow `Qwen2VLImageProcessor` (Pillow) of transformers 4.57.6: rows and grids
equal its own bit for bit (largest difference 0). The fast one resizes with torchvision and
differs from both by a grey level or two where a picture is resized, and in the last bits elsewhere.

Two things are done on purpose otherwise than there: transparency is composited on white, as
qwen-vl-utils does, and EXIF orientation is applied whatever form the picture comes in.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from duetvl.core.errors import ConfigError, DataError
from duetvl.core.family import PatchGeometry

ImageSource = str | Path | bytes | np.ndarray | Image.Image
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_WIDEST_RATIO: Final = 200  # of a picture's sides, as in transformers


@dataclass(frozen=True)
class PixelSettings:
    """How large a picture or frame may be, in pixels of its area, and how its values are scaled."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
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


class Resize(NamedTuple):
    """What one message part asks for instead of the settings: bounds of the area, or a size."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    height: int | None = None
    width: int | None = None


NO_WISH: Final = Resize()


class PatchRows(NamedTuple):
    """Rows (P, C * temporal * patch * patch) float32 of a picture or video, and its grid."""

    rows: np.ndarray
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


def target_size(
    height: int, width: int, settings: PixelSettings, geometry: PatchGeometry, wish: Resize
) -> tuple[int, int]:
    """The size at which a picture of this height and width enters the model."""
    if (wish.height is None) != (wish.width is None):
        raise DataError("resized_height and resized_width go together; only one is given")
    return smart_resize(
        height if wish.height is None else wish.height,
        width if wish.width is None else wish.width,
        factor=geometry.factor,
        min_pixels=_first(wish.min_pixels, settings.min_pixels),
        max_pixels=_first(wish.max_pixels, settings.max_pixels),
    )


def image_patches(
    source: ImageSource, settings: PixelSettings, geometry: PatchGeometry, wish: Resize = NO_WISH
) -> PatchRows:
    """Patch rows of one picture; it counts as `temporal` equal frames.

    Raises DataError naming the source.
    """
    image = load_image(source)
    try:
        size = target_size(image.height, image.width, settings, geometry, wish)
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from None
    pixels = _resized(image, size, settings.resample)
    return _patch_rows(pixels[None], settings, geometry)


def video_patches(
    frames: Sequence[ImageSource],
    settings: PixelSettings,
    geometry: PatchGeometry,
    wish: Resize = NO_WISH,
) -> PatchRows:
    """Patch rows of a video given as its frames, all of one size; an odd last frame is repeated.

    Raises DataError naming the frame.
    """
    if len(frames) == 0:
        raise DataError("a video has no frames")
    images = [load_image(frame) for frame in frames]
    for frame, image in zip(frames, images, strict=True):
        if image.size != images[0].size:
            raise DataError(
                f"{describe(frame)}: a frame of {image.width} x {image.height} pixels in a video "
                f"of {images[0].width} x {images[0].height}"
            )
    try:
        size = target_size(images[0].height, images[0].width, settings, geometry, wish)
    except DataError as error:
        raise DataError(f"{describe(frames[0])}: {error}") from None
    pixels = np.stack([_resized(image, size, settings.resample) for image in images])
    missing = -len(pixels) % geometry.temporal
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)])
    return _patch_rows(pixels, settings, geometry)


def load_image(source: ImageSource) -> Image.Image:
    """An RGB picture from a path, bytes, a data URI, an array (H, W), (H, W, 1 | 3 | 4) or Pillow.

    EXIF orientation is applied, transparency is laid on white, 16-bit values keep their upper byte.
    Raises DataError naming the source.
    """
    try:
        image = _opened(source)
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image))
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{describe(source)}: no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"{describe(source)}: is not an image") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{describe(source)}: is too large to decode safely: {error}") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise DataError(f"{describe(source)}: is damaged or unreadable: {error}") from None


def describe(source: object) -> str:
    """A short name of a picture's source for messages."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URI {source[:30]}... ({len(source)} characters)"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.shape} {source.dtype}"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"picture {source.mode} {source.size}")
    return str(source)


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _from_bytes(source)
    if isinstance(source, str) and source.startswith("data:"):
        return _from_bytes(_data_uri_bytes(source))
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError("is not on this machine; download it and give its path")
    if isinstance(source, str | Path):
        path = Path(str(source).removeprefix("file://"))
        if path.is_file() and path.stat().st_size == 0:
            raise DataError("is empty (0 bytes)")
        return Image.open(path)
    raise DataError(
        f"a picture cannot be a {type(source).__name__}; give a path, bytes, a data URI, an array or a Pillow image"
    )


def _from_bytes(content: bytes) -> Image.Image:
    if not content:
        raise DataError("is empty (0 bytes)")
    return Image.open(io.BytesIO(content))


def _data_uri_bytes(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError("expected data:<type>;base64,<content>")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise DataError(f"is not base64: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    """uint8 or uint16, (H, W) or (H, W, 1 | 3 | 4)."""
    plain = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if plain.ndim != 2 and not (plain.ndim == 3 and plain.shape[-1] in (3, 4)):
        raise DataError("expected an array (H, W) or (H, W, 1 | 3 | 4)")
    if plain.dtype not in (np.uint8, np.uint16):
        raise DataError("expected uint8 or uint16 values")
    if plain.size == 0:
        raise DataError("has no pixels")
    return Image.fromarray(np.ascontiguousarray(_upper_byte(plain)))


def _upper_byte(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else (values >> 8).astype(np.uint8)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_upper_byte(np.asarray(image).astype(np.uint16)))
    elif image.mode == "I":
        image = _from_wide_integers(np.asarray(image))
    elif image.mode == "F":
        raise DataError("has floating-point pixels; convert it to 8 bits first")
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _from_wide_integers(values: np.ndarray) -> Image.Image:
    """Mode "I" is how some files of 16 bits, and few of 8, are opened."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError("has pixels outside 16 bits")
    wide = values.max() > 0xFF
    return Image.fromarray(_upper_byte(values.astype(np.uint16 if wide else np.uint8)))


def _resized(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    """(H, W, C) uint8"""
    height, width = size
    if image.size == (width, height):
        return np.asarray(image)
    return np.asarray(image.resize((width, height), Image.Resampling(resample)))


def _patch_rows(frames: np.ndarray, settings: PixelSettings, geometry: PatchGeometry) -> PatchRows:
    """Rows of frames (T, H, W, C) uint8; a single one is used for all frames of its patch.

    Rows lie by time, then by blocks of merge x merge patches; in a row lie channel, frame, height
    and width. Bytes are put in order before they grow to floats.
    """
    count, height, width, channels = frames.shape
    side, merge = geometry.patch, geometry.merge
    inside = min(count, geometry.temporal)
    grid = (count // inside, height // side, width // side)
    blocks = frames.reshape(grid[0], inside, grid[1] // merge, merge, side, grid[2] // merge, merge, side, channels)
    values = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels, inside, side * side)
    rows = np.empty((len(values), channels, geometry.temporal, side * side), np.float32)
    table = _value_table(settings.mean, settings.std, settings.rescale)
    for channel in range(channels):
        rows[:, channel] = table[channel][values[:, channel]]
    return PatchRows(rows.reshape(len(rows), -1), grid)


@lru_cache(maxsize=16)
def _value_table(mean: tuple[float, ...], std: tuple[float, ...], rescale: float) -> np.ndarray:
    """What each byte becomes, (C, 256) float32, in transformers' order of rounding."""
    scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    shift, scale = (np.array(values, np.float32)[:, None] for values in (mean, std))
    return (scaled - shift) / scale


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
