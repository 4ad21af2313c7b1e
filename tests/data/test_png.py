"""PNG files: their pixels, whatever stands beside them, and transparency in every depth and type of colour."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from duetvl.core.errors import DataError
from duetvl.data.media.images import image_size, load_image

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3))


def chunk(kind: bytes, content: bytes, *, damaged: bool = False) -> bytes:
    checksum = zlib.crc32(kind + content) ^ damaged
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(samples: np.ndarray, colour: int, depth: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A file of samples (H, W, channels), with more chunks before and behind the pixels."""
    height, width = samples.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    bits = (samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    lines = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    body = chunk(b"IDAT", zlib.compress(np.pad(lines, ((0, 0), (1, 0))).tobytes()))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + after + chunk(b"IEND", b"")


def pixels(content: bytes, **options: Any) -> np.ndarray:
    image = load_image(content, **options)
    assert image_size(content) == (image.height, image.width)
    return np.asarray(image)


# -- beside the pixels -------------------------------------------------------------------------------------------------

LARGE = zlib.compress(b"x" * 2_000_000)
BESIDE = {
    "large zTXt": chunk(b"zTXt", b"prompt\0\0" + LARGE),
    "large iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
    "large tEXt": chunk(b"tEXt", b"prompt\0" + b"x" * 2_000_000),
    "many texts": chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"x" * 1_000_000)) * 70,
    "large profile": chunk(b"iCCP", b"icc\0\0" + LARGE),
    "unknown packing": chunk(b"iCCP", b"icc\0\7" + LARGE) + chunk(b"zTXt", b"prompt\0\7" + LARGE),
    "checksum of a text": chunk(b"tEXt", b"a\0b", damaged=True),
    "checksum of tags": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", damaged=True),
    "checksum of a private chunk": chunk(b"prVt", b"b", damaged=True),
    "tags that are none": chunk(b"eXIf", b"nonsense"),
    "large tags": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"0" * 50_000_000)),
    "tags that are no hex": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\nzz"),
    "short chunks": b"".join(chunk(kind, b"") for kind in (b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"iCCP")),
    "animation out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I", 9) * 7),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_pixels_does_not_hurt_them(name: str, place: str) -> None:
    assert np.array_equal(pixels(png(PIXELS, RGB, 8, **{place: BESIDE[name]})), PIXELS)


def turned_tags(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
RAW_PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + turned_tags()).hex().encode()
TURNS = {
    "eXIf": chunk(b"eXIf", turned_tags()),
    "zTXt": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
    "tEXt": chunk(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
    "iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "packed iTXt": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", TURNS)
def test_orientation_is_found_wherever_it_stands(name: str, place: str) -> None:
    content = png(PIXELS, RGB, 8, **{place: BESIDE["large zTXt"] + TURNS[name] + BESIDE["large profile"]})
    assert np.array_equal(pixels(content), np.rot90(PIXELS, -1))


def test_damaged_pixels_stay_an_error() -> None:
    content = bytearray(png(PIXELS, RGB, 8, before=BESIDE["large zTXt"]))
    content[content.index(b"IDAT") + 200] ^= 4
    with pytest.raises(DataError, match="is damaged or unreadable"):
        load_image(bytes(content))
    for damage in (chunk(b"PLTE", b"123", damaged=True), chunk(b"tRNS", b"\0\0\0\0\0\0", damaged=True)):
        with pytest.raises(DataError, match="a PNG picture; its header is damaged"):
            load_image(png(PIXELS, RGB, 8, before=damage))
    with pytest.raises(DataError, match="is damaged or unreadable"):
        load_image(png(PIXELS, RGB, 8).replace(b"IDAT", b"abCd"))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_files_that_end_early(share: float) -> None:
    content = png(PIXELS, RGB, 8, before=chunk(b"tEXt", b"a\0b"))
    with pytest.raises(DataError, match=r"is damaged or unreadable|its header is damaged"):
        load_image(content[: int((len(content) - 16) * share)])  # its last 16 bytes are no pixels


def test_a_length_that_is_no_length_reads_no_more_than_there_is() -> None:
    content = png(PIXELS, RGB, 8)
    place = content.index(b"IDAT") - 4
    assert image_size(content[:place] + b"\x7f\xff\xff\xff" + content[place + 4 :]) == (20, 30)


def test_an_animation_shows_its_first_picture() -> None:
    control = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 30, 20, 0, 0, 1, 10, 0, 0))
    second = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1, 30, 20, 0, 0, 1, 10, 0, 0)) + chunk(b"fdAT", b"damaged")
    content = png(PIXELS, RGB, 8, before=chunk(b"acTL", struct.pack(">II", 2, 0)) + control, after=second)
    assert np.array_equal(pixels(content), PIXELS)


# -- transparency ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", [(0, 0), (3, 4)])
@pytest.mark.parametrize(("colour", "depth"), [*((GREY, depth) for depth in (1, 2, 4, 8, 16)), (RGB, 8), (RGB, 16)])
def test_one_transparent_colour_in_every_depth(colour: int, depth: int, clear: tuple[int, int]) -> None:
    """The whole value counts, not its upper byte, and none of the bits above those of the depth."""
    most = (1 << depth) - 1
    samples = np.random.default_rng(depth).integers(0, most + 1, (9, 13, CHANNELS[colour]))
    samples[0, 1] = samples[0, 0]
    samples[0, 1, -1] ^= 1
    above = 0 if depth == 16 else 0xFF00
    transparent = struct.pack(f">{samples.shape[-1]}H", *(int(value) | above for value in samples[clear]))
    content = png(samples, colour, depth, before=chunk(b"tRNS", transparent))
    eight = np.broadcast_to(samples >> 8 if depth == 16 else samples * 255 // most, (9, 13, 3))
    hidden = (samples == samples[clear]).all(axis=-1, keepdims=True)
    assert np.array_equal(pixels(content), np.where(hidden, 255, eight))
    assert np.array_equal(pixels(content, alpha_on_white=False), eight)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_entries_of_a_palette(depth: int) -> None:
    count = 1 << depth
    palette, alpha = RNG.integers(0, 256, (count, 3)), RNG.choice([0, 255], count)
    samples = RNG.integers(0, count, (9, 13, 1))
    tables = chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"tRNS", alpha.astype(np.uint8).tobytes())
    seen = np.where(alpha[samples] == 0, 255, palette[samples[..., 0]])
    assert np.array_equal(pixels(png(samples, PALETTE, depth, before=tables)), seen)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [GREY_ALPHA, RGB_ALPHA])
def test_alpha_channels(colour: int, depth: int) -> None:
    samples = RNG.integers(0, 1 << depth, (9, 13, CHANNELS[colour]))
    eight = samples >> (depth - 8)
    alpha = eight[..., -1:] / 255
    expected = np.broadcast_to(eight[..., :-1] * alpha + 255 * (1 - alpha), (9, 13, 3))
    assert abs(pixels(png(samples, colour, depth)) - expected).max() <= 1


def test_a_picture_of_16_bits_that_was_opened_already(tmp_path: Any) -> None:
    samples = np.array([[[0], [0], [30000]]])
    path = tmp_path / "a.png"
    path.write_bytes(png(samples, GREY, 16, before=chunk(b"tRNS", b"\0\0")))
    with Image.open(path) as image:
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 255, 117]
