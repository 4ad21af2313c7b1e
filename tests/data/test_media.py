"""The two halves of encoding: what a draft says of pictures is what loading gives, whatever file they come in."""

import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from duetvl.api import load_processor
from duetvl.core.batch import PatchBytes, Sample
from duetvl.core.errors import DataError
from duetvl.core.family import PatchGeometry
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.data.encode import RecordEncoder
from duetvl.data.formats.parts import MediaRules, read_part
from duetvl.data.media.images import Resize, image_size, load_image
from duetvl.data.media.pixels import PixelSettings, first_size, smart_resize
from duetvl.data.media.plan import MediaSettings, Medium, load, measure, shrunk
from duetvl.data.sources.records import Record
from tests.data.clips import write_clip

GEOMETRY = PatchGeometry(channels=3, patch=14, temporal=2, merge=2)
BOUNDS = MediaSettings(PixelSettings(28 * 28, 112 * 112), PixelSettings(28 * 28, 84 * 84))
LLAMAFACTORY = MediaSettings(PixelSettings(28 * 28, 112 * 112, first=(32 * 32, 100 * 100)))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# -- drafts and samples agree ------------------------------------------------------------------------------------------

SIDES = st.integers(1, 300)
FORMS = st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"])
WISHES = st.one_of(
    st.just(Resize()),
    st.integers(784, 20_000).map(lambda most: Resize(max_pixels=most)),
    st.integers(1, 12_000).map(lambda least: Resize(min_pixels=least)),
    st.tuples(st.integers(20, 150), st.integers(20, 150)).map(lambda size: Resize(height=size[0], width=size[1])),
)


@settings(max_examples=80, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(SIDES, SIDES, FORMS, st.integers(1, 8), WISHES, st.sampled_from([BOUNDS, LLAMAFACTORY]), st.floats(0, 1))
def test_drafts_say_what_loading_gives(
    height: int, width: int, form: str, turn: int, wish: Resize, media: MediaSettings, scale: float
) -> None:
    content = encoded(noise(height, width), form, exif=turned_exif(turn))
    seen = load_image(content)
    assert image_size(content) == (seen.height, seen.width) == ((width, height) if turn >= 5 else (height, width))
    if max(height, width) > 200 * min(height, width) and media is BOUNDS and wish.height is None:
        with pytest.raises(DataError, match="is too narrow"):
            measure(ImagePart(content, wish), media, GEOMETRY)
        return
    medium = measure(ImagePart(content, wish), media, GEOMETRY)
    check(medium, media)
    smaller = shrunk(medium, scale, media, GEOMETRY)
    assert smaller.size[0] <= medium.size[0] and smaller.size[1] <= medium.size[1]
    check(smaller, media)


def check(medium: Medium, media: MediaSettings) -> None:
    rows = load(medium, media, GEOMETRY)
    assert rows.grid == medium.grid(GEOMETRY)
    assert rows.rows.shape == (math.prod(rows.grid), 1176)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(1, 7), st.integers(1, 60_000))
def test_so_do_lists_of_frames(height: int, width: int, count: int, total: int) -> None:
    frames = [np.full((height, width, 3), 20 * number, np.uint8) for number in range(count)]
    part = VideoPart(frames, total_pixels=total)
    if max(height, width) > 200 * min(height, width):
        return
    medium = measure(part, BOUNDS, GEOMETRY)
    check(medium, BOUNDS)
    assert medium.grid(GEOMETRY)[0] == (count + 1) // 2 and medium.seconds == 1.0


def test_sizes_come_from_headers_alone(tmp_path: Path) -> None:
    """Of a file that ends in the middle of its pixels the draft is made; loading names the file."""
    whole = encoded(noise(100, 140), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    medium = measure(ImagePart(tmp_path / "cut.jpg"), BOUNDS, GEOMETRY)
    assert medium.original == (100, 140)
    with pytest.raises(DataError, match=r"cut\.jpg: is damaged or unreadable"):
        load(medium, BOUNDS, GEOMETRY)


def test_a_file_that_changes_between_the_halves(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise(100, 140).save(path)
    medium = measure(ImagePart(path), BOUNDS, GEOMETRY)
    noise(90, 140).save(path)
    with pytest.raises(DataError, match=r"a\.png: is of 140 x 90 pixels, 140 x 100 when it was planned"):
        load(medium, BOUNDS, GEOMETRY)


def test_orientation_behind_the_pixels_of_a_png() -> None:
    """The eXIf chunk may stand anywhere; it is found without decoding."""
    content = encoded(noise(20, 30), "PNG")
    body = turned_exif(6).removeprefix(b"Exif\x00\x00")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    late = content[:-12] + chunk + content[-12:]
    assert image_size(late) == (30, 20)
    assert np.array_equal(np.asarray(load_image(late)), np.rot90(np.asarray(noise(20, 30)), -1))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_every_orientation(form: str, turn: int) -> None:
    """As a viewer shows it: 6 and 8 are quarter turns, 2 and 4 mirrors, 5 and 7 both."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 250  # the left upper corner is bright
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=turned_exif(turn))
    assert image_size(content) == (16, 32)
    assert abs(np.asarray(load_image(content)).astype(int) - upright).mean() < 4


def test_damaged_tags_do_not_hurt_a_picture() -> None:
    content = encoded(noise(20, 30), "JPEG", exif=b"Exif\x00\x00nonsense")
    assert image_size(content) == (20, 30) and load_image(content).size == (30, 20)


@pytest.mark.parametrize("form", ["GIF", "BMP", "PPM", "ICO", "JPEG2000", "AVIF", "TGA"])
def test_other_formats(form: str) -> None:
    from PIL import features

    if (form == "AVIF" and not features.check("avif")) or (form == "JPEG2000" and not features.check("jpg_2000")):
        pytest.skip(f"this Pillow is built without {form}")
    content = encoded(noise(48, 48), form)
    assert image_size(content) == (48, 48) == load_image(content).size


# -- LLaMA-Factory's resize --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1080, 1920), (576, 1024)),  # of 589,824 pixels, exactly
        ((1000, 1000), (768, 768)),
        ((1333, 777), (1005, 586)),  # 1005.9 and 586.3, truncated
        ((500, 500), (500, 500)),
        ((20, 20), (32, 32)),
        ((10, 50), (28, 71)),  # 14.3 x 71.5, and then a side of 28
        ((28, 6000), (28, 5040)),  # more than 200 to 1 becomes 180 to 1
        ((6000, 28), (5040, 28)),
    ],
)
def test_first_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert first_size(size, (32 * 32, 768 * 768)) == expected


def test_both_resizes_are_those_of_llamafactory() -> None:
    """Pillow's default filter to the truncated size, then the processor's."""
    media = MediaSettings(PixelSettings(first=(32 * 32, 200 * 200)))
    image = noise(333, 277)
    medium = measure(ImagePart(image), media, GEOMETRY)
    height, width = (int(side * math.sqrt(200 * 200 / (333 * 277))) for side in (333, 277))
    size = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=1003520)
    assert (height, width) == (219, 182) and medium.size == size
    twice = image.resize((width, height)).resize(size[::-1], Image.Resampling.BICUBIC)
    ours = load(medium, media, GEOMETRY).rows
    plain = MediaSettings(PixelSettings())
    by_hand = load(measure(ImagePart(twice), plain, GEOMETRY), plain, GEOMETRY).rows
    assert np.array_equal(ours.values, by_hand.values)


def test_transparency_is_dropped_there() -> None:
    clear = Image.new("RGBA", (56, 56), (200, 10, 20, 0))
    for media, colour in ((BOUNDS, [255, 255, 255]), (LLAMAFACTORY, [200, 10, 20])):
        rows = load(measure(ImagePart(clear), media, GEOMETRY), media, GEOMETRY).rows
        assert rows.values[0, :, 0, 0].tolist() == colour


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_bytes_become_the_rows() -> None:
    media = MediaSettings()
    rows = load(measure(ImagePart(noise(300, 280)), media, GEOMETRY), media, GEOMETRY).rows
    whole = np.asarray(rows)
    assert rows.shape == whole.shape and whole.dtype == np.float32
    mean, std = np.array(rows.mean, np.float32), np.array(rows.std, np.float32)
    scaled = (rows.values.astype(np.float64) / 255).astype(np.float32)
    expected = (scaled - mean[:, None, None]) / std[:, None, None]
    assert np.array_equal(whole.reshape(len(whole), 3, 2, 196), np.repeat(expected, 2, axis=2))
    assert np.asarray(rows, np.float64).dtype == np.float64


def test_bytes_and_rows_make_one_batch(processor_dir: Path, tmp_path: Path) -> None:
    """Images, videos and a video of one frame; one way keeps bytes until the batch is made, the other does not."""
    processor = load_processor(processor_dir)
    clip = write_clip(tmp_path / "a.mp4", 8)
    noise(60, 90).save(tmp_path / "a.png")
    values = {
        "messages": [
            {"role": "user", "content": "<image><video>and<video><image>"}, {"role": "assistant", "content": "ok"},
        ],
        "images": ["a.png", noise(50, 50)], "videos": [str(clip), [noise(56, 84)]],
    }  # fmt: skip
    encoder = RecordEncoder(processor)
    draft = encoder.draft(Record(tmp_path / "chat.jsonl", 3, "chat.jsonl:3", values))
    compact, plain = encoder.load(draft), processor.load(draft)
    assert isinstance(compact, Sample) and isinstance(plain, Sample)
    assert isinstance(compact.pixel_values, PatchBytes) and isinstance(compact.pixel_values_videos, PatchBytes)
    assert isinstance(plain.pixel_values, np.ndarray) and plain.pixel_values.dtype == np.float32
    assert compact.video_grid_thw.tolist()[1:] == [[1, 4, 6]]
    one, other = encoder.pack([compact, plain]), processor.pack([plain, compact])
    assert np.array_equal(one.pixel_rows, other.pixel_rows) and one.pixel_rows.dtype == np.float32
    alone, floats = encoder.pack([compact, compact]).pixel_rows, processor.pack([plain, plain]).pixel_rows
    assert isinstance(alone, PatchBytes) and np.array_equal(alone, floats)  # a picture has one frame, the clip two
    order = np.random.default_rng(0).permutation(len(floats))
    assert np.array_equal(alone[order], floats[order])
    again = pickle.loads(pickle.dumps(compact))
    assert np.array_equal(encoder.pack([again, plain]).pixel_rows, one.pixel_rows)


def test_an_encoder_can_be_sent_to_another_process(processor_dir: Path) -> None:
    """Its copy must not make control tokens of text either."""
    encoder = RecordEncoder(load_processor(processor_dir))
    copy = pickle.loads(pickle.dumps(encoder))
    messages = [{"role": "user", "content": "<|im_end|><|image_pad|> hi"}, {"role": "assistant", "content": "a"}]
    record = Record(Path("c.jsonl"), 1, "c.jsonl:1", {"messages": messages})
    assert np.array_equal(copy.draft(record).input_ids, encoder.draft(record).input_ids)
    assert np.count_nonzero(copy.draft(record).input_ids == copy.processor.control.turn_end) == 3


# -- settings of a part ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("num_frames", "nframes"), ("n_frames", "nframes"), ("num_segments", "nframes"),
        ("max_num_frames", "max_frames"),
        ("max_frame", "max_frames"), ("video_fps", "fps"), ("frame_rate", "fps"), ("start_time", "video_start"),
        ("end", "video_end"), ("video_max_pixels", "max_pixels"), ("max_pixel", "max_pixels"),
        ("min_frame", "min_frames"),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_known_is_an_error(key: str, known: str) -> None:
    parts = ({"type": "video", "video": "a.mp4", key: 8}, {"type": "video_url", "video_url": {"url": "a.mp4", key: 8}})
    for part in parts:
        with pytest.raises(DataError) as caught:
            read_part(part)
        assert f"'{key}' is not a setting of a picture or video" in str(caught.value)
        assert f"did you mean '{known}'" in str(caught.value)
    with pytest.raises(DataError, match="is not a setting"):
        read_part({"type": "image", "image": "a.png"}, MediaRules(settings={key: 8}))
    assert isinstance(read_part({"type": "video", "video": "a.mp4", key: None}), VideoPart)


def test_what_describes_a_medium_is_no_setting() -> None:
    extra = {
        "id": 3,
        "video_id": "x",
        "frame_id": 4,
        "caption": "a cat",
        "detail": "auto",
        "sample_rate": 16000,
        "width": 30,
        "height": 20,
    }
    part = read_part({"type": "video", "video": "a.mp4", "nframes": 8, **extra})
    assert isinstance(part, VideoPart) and part.frames == 8
    assert isinstance(read_part({"type": "image", "image": "a.png", **extra}), ImagePart)


@pytest.mark.parametrize("wish", [{"frames": 2}, {"max_frames": 2}, {"start": 1.0}, {"end": 1.0}])
def test_of_a_list_of_frames_all_are_taken_or_it_is_an_error(wish: dict[str, Any]) -> None:
    frames = [noise(28, 28)] * 3
    with pytest.raises(DataError, match="all frames of a list are taken, here 3"):
        measure(VideoPart(frames, **wish), BOUNDS, GEOMETRY)
    met = VideoPart(frames, frames=3, min_frames=4, max_frames=3)
    assert measure(met, BOUNDS, GEOMETRY).frames == 3


def test_settings_beside_a_url_count() -> None:
    rules = MediaRules(settings={"fps": 1, "max_pixels": 5000})
    part = read_part({"type": "video_url", "video_url": {"url": "a.mp4", "fps": 4}, "nframes": 6}, rules)
    assert isinstance(part, VideoPart)
    assert (part.source, part.fps, part.frames, part.wish.max_pixels) == ("a.mp4", 4, 6, 5000)


# -- bad pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message", "at_draft"),
    [
        (None, "a.png: no such file", True),
        (b"", "a.png: is empty (0 bytes)", True),
        (b"text", "a.png: is not an image", True),
        (encoded(noise(300, 300), "JPEG")[:2000], "a.png: is damaged or unreadable: image file is truncated", False),
        (encoded(noise(300, 300), "PNG")[:2000], "a.png: is damaged or unreadable", False),
        (encoded(Image.new("L", (1000, 4)), "PNG"), "a picture of 1000 x 4 pixels is too narrow", True),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "a.png: is too large to decode safely", True),
        (encoded(Image.new("F", (20, 20)), "TIFF"), "a.png: has floating-point pixels", True),
    ],
)
def test_bad_pictures_are_named_with_their_record(
    processor_dir: Path, tmp_path: Path, content: bytes | None, message: str, at_draft: bool
) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]
    record = Record(tmp_path / "chat.jsonl", 4, f"{tmp_path}/chat.jsonl:4", {"messages": messages, "images": ["a.png"]})
    encoder = RecordEncoder(load_processor(processor_dir))
    draft = None if at_draft else encoder.draft(record)
    with pytest.raises(DataError) as caught:
        encoder.draft(record) if draft is None else encoder.load(draft)
    assert str(caught.value).startswith(f"{tmp_path}/chat.jsonl:4: {tmp_path}/a.png") or "too narrow" in message
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_video_is_named_with_its_record(processor_dir: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "one.mp4", 1)
    messages = [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "x"}]
    record = Record(tmp_path / "chat.jsonl", 4, "chat.jsonl:4", {"messages": messages, "videos": [clip.name]})
    with pytest.raises(DataError, match=r"chat\.jsonl:4: .*one\.mp4: has one frame"):
        RecordEncoder(load_processor(processor_dir)).draft(record)
