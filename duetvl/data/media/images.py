"""Pictures: opened from wherever they are, measured by their header, decoded to RGB.

Two things are done on purpose otherwise than in transformers: transparency is laid on white, as qwen-vl-utils does,
and EXIF orientation is applied whatever form the picture comes in.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from duetvl.core.errors import DataError
from duetvl.data.media import jpeg, png
from duetvl.data.media.kinds import LONGEST_HEAD, what_it_is
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.spelling import without_scheme

ImageSource = str | Path | bytes | Blob | np.ndarray | Image.Image
Size = tuple[int, int]  # height, width
_LONGEST_NAME: Final = 240  # characters that a message shows in full
_ORIENTATION: Final = 0x0112  # of the EXIF tags
_WIDTH, _HEIGHT, _PHOTOMETRIC = 256, 257, 262  # of the tags of TIFF
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Resize(NamedTuple):
    """What one message part asks for instead of the settings: bounds of the area, or a size."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    height: int | None = None
    width: int | None = None


NO_WISH: Final = Resize()


def image_size(source: ImageSource) -> Size:
    """Height and width of a picture as `load_image` will show it; nothing is decoded. Raises DataError naming it."""
    with _named(source), _opened(source, pixels=False) as image:
        width, height = _stored_size(image)
        return (width, height) if _orientation(image) >= 5 else (height, width)


def load_image(source: ImageSource, *, alpha_on_white: bool = True) -> Image.Image:
    """An RGB picture from a path, bytes, a data URI, an array (H, W), (H, W, 1 | 3 | 4) or Pillow.

    EXIF orientation is applied, transparency is laid on white (or dropped), 16-bit values keep their upper byte.
    Raises DataError naming the source.
    """
    with _named(source), _opened(source) as image:
        turn = _TURNS.get(_orientation(image))
        size = image.size
        image.load()
        if image.format == "TIFF":  # turned by Pillow, alone of all formats
            size, turn = image.size, None
        if image.size != size:
            raise DataError(f"is of {image.size} pixels, its header says {size}")
        turned = image if turn is None else image.transpose(turn)
        return _as_rgb(turned, alpha_on_white)


def describe(source: object) -> str:
    """A short name of a picture's or video's source for messages."""
    if isinstance(source, str) and source.startswith("data:"):
        return f"data URI {source[:30]}... ({len(source)} characters)"
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, np.ndarray):
        return f"array {source.shape} {source.dtype}"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"picture {source.mode} {source.size}")
    name = str(source)
    return name if len(name) <= _LONGEST_NAME else f"{name[:40]}...{name[-80:]} ({len(name)} characters)"


@contextmanager
def _named(source: object) -> Iterator[None]:
    """Whatever goes wrong with a picture becomes one DataError that names it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{describe(source)}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{describe(source)}: no such file") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{describe(source)}: is too large to decode safely: {error}") from None
    except OSError as error:  # the system's have a number, Pillow's about a damaged file have none
        words = f"cannot be read: {error.strerror}" if error.errno else f"is damaged or unreadable: {error}"
        raise DataError(f"{describe(source)}: {words}") from None
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # each of Pillow's decoders has its own ways to say that a file is damaged
        raise DataError(f"{describe(source)}: is damaged or unreadable: {str(error) or type(error).__name__}") from None


@contextmanager
def _opened(source: ImageSource, *, pixels: bool = True) -> Iterator[Image.Image]:
    """The picture, not decoded yet. A file is closed at the end, a picture that was handed in stays open.

    Without `pixels` it may be one that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        if source.format == "PNG" and "exif" not in source.info:
            source.load()  # its orientation may stand behind the pixels
        _check_mode(source)
        yield source
        return
    if isinstance(source, np.ndarray):
        yield _from_array(source)
        return
    with readable(source) as file, _picture_in(file, pixels) as image:
        _check_mode(image)
        yield image


def _picture_in(file: BinaryIO, pixels: bool) -> Image.Image:
    head = file.read(LONGEST_HEAD)
    file.seek(0)
    try:
        return png.open_png(file, pixels=pixels) if head.startswith(png.SIGNATURE) else Image.open(file)
    except UnidentifiedImageError:
        if head.startswith(jpeg.SIGNATURE):
            with suppress(UnidentifiedImageError):
                return Image.open(jpeg.without_side_data(file))
        what = what_it_is(head)
        raise DataError(f"is not an image: it is {what}" if what else "is not an image") from None


def media_content(source: object) -> Path | io.BytesIO | None:
    """Where a picture's or video's file is, or what is in it; None for what is neither. Raises DataError."""
    if isinstance(source, str) and source.startswith("data:"):
        source = _data_uri_bytes(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise DataError("is not on this machine; download it and give its path")
    if isinstance(source, Blob):
        source = source.read()
    if isinstance(source, bytes):
        if not source:
            raise DataError("is empty (0 bytes)")
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        return None
    path = Path(without_scheme(str(source)))
    if path.exists() and not path.is_dir():
        if not path.is_file():  # reading it could wait for ever
            raise DataError("is not a file but a FIFO, a socket or a device")
        if path.stat().st_size == 0:
            raise DataError("is empty (0 bytes)")
    return path


def readable(source: object) -> BinaryIO:
    """A picture's or video's file, opened. Raises DataError for what is neither, OSError where it cannot be opened."""
    content = media_content(source)
    if content is None:
        raise DataError(
            f"a picture cannot be a {type(source).__name__}; give a path, bytes, a data URI, an array or a Pillow image"
        )
    return content.open("rb") if isinstance(content, Path) else content


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise DataError("has floating-point pixels; convert it to 8 bits first")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before any turn."""
    # New versions of Pillow show the turned size of a TIFF file, old ones do not.
    width, height = _tiff_tag(image, _WIDTH), _tiff_tag(image, _HEIGHT)
    return image.size if width is None else (width, height)


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    """The value of a TIFF file's tag; None where there is none."""
    tags = getattr(image, "tag_v2", None)
    return tags.get(tag) if image.format == "TIFF" and tags is not None else None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a picture that need not be decoded for it."""
    try:
        # The base class' own method: that of PNG decodes the picture to find what may stand behind it.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except (MemoryError, OSError):
        raise
    except Exception:  # tags are damaged in many ways, none of which hurts the picture
        return 1
    return value if value in _TURNS else 1


def _data_uri_bytes(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError("expected data:<type>;base64,<content>")
    try:
        # Line ends are no part of base64, and some programs leave the padding out.
        packed = "".join(body.split())
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
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


def _as_rgb(image: Image.Image, alpha_on_white: bool) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        negative = _tiff_tag(image, _PHOTOMETRIC) == 0  # Pillow turns grey of 8 bits over, not of 16
        image = _from_deep_grey(~values if negative else values, image.info.get("transparency"))
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode == "I":
        image = _from_wide_integers(np.asarray(image))
    if not (alpha_on_white and image.has_transparency_data):
        return image.convert("RGB")
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _from_deep_grey(values: np.ndarray, hole: object) -> Image.Image:
    """Grey of 16 bits, of which one value may be transparent."""
    grey = Image.fromarray(_upper_byte(values))
    if isinstance(hole, int):
        grey.putalpha(Image.fromarray((values != hole).astype(np.uint8) * 255))
    return grey


def _from_wide_integers(values: np.ndarray) -> Image.Image:
    """Mode "I" is how some files of 16 bits, and few of 8, are opened."""
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError("has pixels outside 16 bits")
    wide = values.max() > 0xFF
    return Image.fromarray(_upper_byte(values.astype(np.uint16 if wide else np.uint8)))
