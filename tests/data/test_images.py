"""Pictures: equal to transformers' slow processor, every way they come in, plain errors."""

import base64
import io
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from duetvl.core.errors import ConfigError, DataError
from duetvl.core.family import PatchGeometry
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.data.media.images import NO_WISH, ImageSource, Resize, image_size, load_image
from duetvl.data.media.pixels import PixelSettings, smart_resize
from duetvl.data.media.plan import MediaSettings, load, measure
from duetvl.data.media.video_index import read_index

GEOMETRY = PatchGeometry(channels=3, patch=14, temporal=2, merge=2)
SETTINGS = PixelSettings()
SMALL, LARGE = 1_003_520, 12_845_056


class Patches(NamedTuple):
    rows: np.ndarray
    grid: tuple[int, int, int]


def image_patches(
    source: ImageSource, settings: PixelSettings, geometry: PatchGeometry, wish: Resize = NO_WISH
) -> Patches:
    return patches(ImagePart(source, wish), MediaSettings(image=settings), geometry)


def video_patches(frames: list[Any], settings: PixelSettings, geometry: PatchGeometry) -> Patches:
    return patches(VideoPart(frames), MediaSettings(video=settings), geometry)


def patches(part: ImagePart | VideoPart, settings: MediaSettings, geometry: PatchGeometry) -> Patches:
    """Both halves; what the first one says holds for the second."""
    medium = measure(part, settings, geometry)
    rows = load(medium, settings, geometry)
    assert rows.grid == medium.grid(geometry)
    return Patches(np.asarray(rows.rows), rows.grid)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((561, 278), SMALL, (560, 280)),
        ((28, 28), SMALL, (56, 56)),
        ((1080, 1920), SMALL, (728, 1316)),
        ((1080, 1920), LARGE, (1092, 1932)),
        ((4000, 6000), SMALL, (812, 1204)),
        ((4000, 6000), LARGE, (2912, 4368)),
        ((13, 2600), SMALL, (28, 812)),  # transformers; qwen-vl-utils says (28, 2604)
        ((14, 100), SMALL, (28, 168)),  # transformers; qwen-vl-utils says (28, 112)
        ((70, 70), SMALL, (56, 56)),  # halves round to even
        ((42, 126), SMALL, (56, 112)),
    ],
)
def test_smart_resize_literals(size: tuple[int, int], max_pixels: int, expected: tuple[int, int]) -> None:
    assert smart_resize(*size, factor=28, min_pixels=3136, max_pixels=max_pixels) == expected


def test_smart_resize_equals_transformers() -> None:
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    rng = np.random.default_rng(1)
    for height, width in rng.integers(11, 2000, (3000, 2)).tolist():
        ours = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=SMALL)
        assert ours == module.smart_resize(height, width), (height, width)


def test_smart_resize_refuses_narrow_and_empty_pictures() -> None:
    with pytest.raises(DataError, match="at most 200 to 1"):
        smart_resize(10, 2001, factor=28, min_pixels=3136, max_pixels=SMALL)
    assert smart_resize(10, 2000, factor=28, min_pixels=3136, max_pixels=SMALL)
    with pytest.raises(DataError, match="is empty"):
        smart_resize(0, 5, factor=28, min_pixels=3136, max_pixels=SMALL)


@pytest.fixture(scope="module")
def slow_processor() -> Any:
    return pytest.importorskip("transformers").Qwen2VLImageProcessor()


@pytest.mark.parametrize("size", np.random.default_rng(0).integers(10, 260, (200, 2)).tolist(), ids=str)
def test_rows_are_bit_equal_to_the_slow_processor(size: list[int], slow_processor: Any) -> None:
    image = noise(size[0], size[1], sum(size))
    theirs = slow_processor(images=[image], return_tensors="np")
    ours = image_patches(image, SETTINGS, GEOMETRY)
    assert ours.grid == tuple(theirs["image_grid_thw"][0])
    assert ours.rows.dtype == np.float32
    assert np.array_equal(ours.rows, theirs["pixel_values"])


def test_a_large_picture_is_bit_equal_too(slow_processor: Any) -> None:
    image = noise(1100, 1300)
    theirs = slow_processor(images=[image], return_tensors="np")
    assert np.array_equal(image_patches(image, SETTINGS, GEOMETRY).rows, theirs["pixel_values"])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_videos_are_bit_equal_to_the_slow_processor(count: int) -> None:
    transformers = pytest.importorskip("transformers")
    frames = [noise(90, 130, seed) for seed in range(count)]
    processor = transformers.Qwen2VLImageProcessor()
    theirs, grid = processor._preprocess(
        frames, do_resize=True, size=processor.size, resample=3, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, image_mean=processor.image_mean,
        image_std=processor.image_std, patch_size=14, temporal_patch_size=2, merge_size=2,
    )  # fmt: skip
    ours = video_patches(frames, SETTINGS, GEOMETRY)
    assert ours.grid == grid == (-(-count // 2), 6, 10)
    assert np.array_equal(ours.rows, theirs)


def test_a_still_image_is_two_equal_frames() -> None:
    image = noise(56, 56)
    rows = image_patches(image, SETTINGS, GEOMETRY).rows.reshape(-1, 3, 2, 196)
    assert np.array_equal(rows[:, :, 0], rows[:, :, 1])
    assert np.array_equal(video_patches([image, image], SETTINGS, GEOMETRY).rows, rows.reshape(-1, 1176))


def test_rows_lie_in_merge_blocks() -> None:
    """Each patch is painted with its number: the rows of one block of 2 x 2 lie together."""
    numbers = np.arange(16, dtype=np.uint8).reshape(4, 4)
    pixels = np.repeat(np.kron(numbers, np.ones((14, 14), np.uint8))[..., None], 3, axis=2)
    plain = PixelSettings(mean=(0, 0, 0), std=(1, 1, 1), rescale=1)
    rows = image_patches(pixels, plain, GEOMETRY).rows
    assert rows[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_a_frame_of_another_size_is_refused() -> None:
    with pytest.raises(DataError, match="a frame of 60 x 56 pixels in a video of 56 x 56"):
        video_patches([noise(56, 56), noise(56, 60)], SETTINGS, GEOMETRY)
    with pytest.raises(DataError, match="has no frames"):
        video_patches([], SETTINGS, GEOMETRY)


def test_wishes_of_a_part() -> None:
    image = noise(280, 280)
    bounded = image_patches(image, SETTINGS, GEOMETRY, Resize(max_pixels=112 * 112))
    assert bounded.grid == (1, 8, 8)
    enlarged = image_patches(image, SETTINGS, GEOMETRY, Resize(min_pixels=560 * 560))
    assert enlarged.grid == (1, 40, 40)
    sized = image_patches(image, SETTINGS, GEOMETRY, Resize(height=60, width=115))
    assert sized.grid == (1, 4, 8)
    with pytest.raises(DataError, match="go together"):
        image_patches(image, SETTINGS, GEOMETRY, Resize(height=60))


def test_sources_are_equal(tmp_path: Path) -> None:
    image = noise(40, 60)
    content = png(image)
    (tmp_path / "a.png").write_bytes(content)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    path = tmp_path / "a.png"
    for source in (path, str(path), f"file://{path}", content, uri, image, np.asarray(image)):
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_grey_pictures_and_palettes() -> None:
    grey = noise(8, 9).convert("L")
    expected = np.asarray(grey.convert("RGB"))
    for source in (grey, np.asarray(grey), np.asarray(grey)[..., None]):
        assert np.array_equal(np.asarray(load_image(source)), expected)
    palette = noise(8, 9).quantize(16)
    assert np.array_equal(np.asarray(load_image(png(palette))), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    red, green, _ = np.asarray(load_image(half))[0, 0]
    assert abs(int(red) - 227) <= 1 and abs(int(green) - 127) <= 1
    assert load_image(Image.new("LA", (4, 4), (10, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.asarray(clear)).getpixel((0, 0)) == (255, 255, 255)
    for premultiplied in ("La", "RGBa"):
        assert load_image(Image.new(premultiplied, (4, 4))).getpixel((0, 0)) == (255, 255, 255)
        assert load_image(Image.new(premultiplied, (4, 4)), alpha_on_white=False).mode == "RGB"
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9] * 256)
    assert load_image(png(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    turned = load_image(png(image, exif=exif))
    assert turned.size == (20, 30)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_sixteen_bits_keep_their_upper_byte() -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    for source in (values, png(Image.fromarray(values)), Image.fromarray(values.astype(np.int32))):
        assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 0, 1, 255]
    eight = Image.fromarray(np.array([[0, 7, 255]], np.int32))
    assert np.asarray(load_image(eight))[0, :, 0].tolist() == [0, 7, 255]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.png", "absent.png: no such file"),
        (b"", "0 bytes: is empty"),
        (b"hello, I am a text", "18 bytes: is not an image"),
        ("data:image/png;base64,@@@", "is not base64"),
        ("data:image/png,abc", "expected data:<type>;base64,<content>"),
        ("https://example.com/a.png", "https://example.com/a.png: is not on this machine"),
        (np.zeros((4, 4, 3), np.float32), "expected uint8 or uint16"),
        (np.zeros((3, 40, 40), np.uint8), "expected an array (H, W)"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (Image.new("F", (4, 4)), "floating-point pixels"),
        (17, "a picture cannot be a int"),
    ],
)
def test_what_is_not_an_image(source: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_image(source)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is a HEIC or HEIF picture; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "it is a HEIC or HEIF picture"),
        (b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", "it is a JPEG XL picture"),
        (b"\n<!DOCTYPE HTML><title>Not found", "it is a web page (HTML); download the file itself"),
        (b"\xef\xbb\xbf<html lang=en>", "it is a web page (HTML)"),
        (b'<?xml version="1.0"?><Error>', "it is XML"),
        (b"<svg xmlns=", "it is an SVG drawing"),
        (b'{"error": "rate limit"}', "it is JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "it is a Git LFS pointer and not the file itself"),
        (b"/9j/4AAQSkZJRgABAQ", "it is a picture as base64 text"),
        (b"%PDF-1.7", "it is a PDF document"),
        (b"PK\3\4", "it is a ZIP archive"),
        (b"\x1f\x8b\x08", "it is gzip data"),
        (b"\0\0\0\x20ftypisom", "it is an MP4 or QuickTime video; give it as a video"),
        (b"\x1aE\xdf\xa3", "it is a Matroska or WebM video"),
        (b"RIFF\0\0\0\0AVI LIST", "it is an AVI video"),
        (bytes(2000), "it is nothing but zero bytes"),
        (b"GIF89a", "it is a GIF picture; its header is damaged"),
    ],
)
def test_other_files_under_a_picture_s_name(head: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(head)
    for read in (load_image, image_size):
        with pytest.raises(DataError) as caught:
            read(path)
        assert f"{path}: is not an image: {kind}" in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_not_a_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (load_image, image_size, read_index):
        with pytest.raises(DataError, match=r"a\.png: is not a file but a FIFO, a socket or a device"):
            read(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_base64_in_lines_and_without_padding(end: str) -> None:
    image = noise(40, 61)
    lines = base64.encodebytes(png(image)).decode().replace("\n", end)
    for body in (lines, end + lines + end, lines.rstrip().rstrip("=")):
        assert np.array_equal(np.asarray(load_image("data:image/png;base64," + body)), np.asarray(image))


def test_a_name_is_bounded_in_messages() -> None:
    for source in ("x" * 5000, "data:image/png;base64," + "@" * 5000):
        with pytest.raises(DataError) as caught:
            load_image(source)
        assert len(str(caught.value)) < 400


def test_grey_of_16_bits_whose_zero_is_white() -> None:
    values = np.array([[0, 256, 65535]], np.uint16)
    for white_is_zero, expected in ((False, [0, 1, 255]), (True, [255, 254, 0])):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF", tiffinfo={262: 0 if white_is_zero else 1})
        assert np.asarray(load_image(file.getvalue()))[0, :, 0].tolist() == expected


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


@pytest.mark.parametrize(
    "beside",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"ICC_PROFILE\0\2\3part of it"),
        segment(0xE2, b"MPF\0nonsense"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff\xff"),
        segment(0xFE, b"x" * 60_000) * 30,
    ],
)
@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_what_stands_beside_the_pixels_of_a_jpeg_does_not_hurt_them(beside: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    noise(40, 60).save(file, "JPEG", exif=exif)
    whole = file.getvalue()
    content = whole[:2] + beside + whole[2:]
    assert image_size(content) == (60, 40)
    assert np.array_equal(np.asarray(load_image(content)), np.asarray(load_image(whole)))
    with pytest.raises(DataError, match="is damaged or unreadable"):
        load_image(content[: len(content) * 2 // 3 + len(beside) // 3])


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = png(noise(200, 200))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png: is damaged or unreadable"):
        load_image(tmp_path / "cut.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.png: is empty \(0 bytes\)"):
        load_image(tmp_path / "empty.png")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="is too large to decode safely"):
        load_image(whole)


def test_errors_of_size_name_the_source(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 4)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"thin\.png: a picture of 3000 x 4 pixels is too narrow"):
        image_patches(tmp_path / "thin.png", SETTINGS, GEOMETRY)


@pytest.mark.parametrize(
    ("data", "bounds"),
    [
        ({}, (3136, SMALL)),
        ({"min_pixels": 784, "max_pixels": 7840}, (784, 7840)),
        ({"size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
        ({"size": {"min_pixels": 784, "max_pixels": 7840}}, (784, 7840)),
        ({"max_pixels": 9000, "size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 9000)),
        ({"min_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 7840}}, (784, 7840)),
    ],
)
def test_settings_of_every_version(data: dict[str, Any], bounds: tuple[int, int]) -> None:
    settings = PixelSettings.from_dict(data, GEOMETRY)
    assert (settings.min_pixels, settings.max_pixels) == bounds


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"patch_size": 16}, "patch_size is 16, the model's config.json says 14"),
        ({"merge_size": 1}, "merge_size is 1"),
        ({"do_normalize": False}, "do_normalize false is not implemented"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"min_pixels": 9000, "max_pixels": 8000}, "leave no size"),
    ],
)
def test_settings_that_do_not_fit(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        PixelSettings.from_dict(data, GEOMETRY)
