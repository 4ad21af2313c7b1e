"""Video files: which frames are taken, and that these are the ones that come back, whatever the file is like."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duetvl.core.errors import DataError
from duetvl.core.family import PatchGeometry
from duetvl.data.conversation import VideoPart
from duetvl.data.media.pixels import PixelSettings
from duetvl.data.media.plan import MediaSettings, load, measure
from duetvl.data.media.video import FrameRule, VideoPlan, plan_frames, read_frames
from duetvl.data.media.video_index import VideoHeader, VideoIndex, read_index
from tests.data.clips import level, levels, picture, trim, write_clip, write_with_still

GEOMETRY = PatchGeometry(channels=3, patch=14, temporal=2, merge=2)
QWEN, LLAMAFACTORY = FrameRule(), FrameRule("llamafactory", max_frames=128)


def index_of(frames: int, fps: float, header: VideoHeader | None = None) -> VideoIndex:
    """A video of a constant frame rate."""
    base = 1 / Fraction(fps).limit_denominator(1000)
    keys = np.ones(frames, bool)
    return VideoIndex((48, 64), np.arange(frames), keys, base, frames * base, timed=True, header=header)


def numbers(plan: VideoPlan) -> list[int]:
    return [pick.number for pick in plan.picks]


def planned(path: Path, rule: FrameRule = QWEN, **wishes: Any) -> VideoPlan:
    return plan_frames(read_index(path), rule, VideoPart(path, **wishes))


def shown(path: Path, plan: VideoPlan) -> list[int]:
    return levels(list(read_frames(path, plan)))


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "fps", "wishes", "expected"),
    [
        # 9.72 s: 19.44 frames, 18 is the even number below
        (243, 25, {}, [0, 14, 28, 43, 57, 71, 85, 100, 114, 128, 142, 157, 171, 185, 199, 214, 228, 242]),
        (20, 10, {}, [0, 6, 13, 19]),  # 4 of 2 s
        (10, 10, {}, [0, 3, 6, 9]),  # at least 4
        (3, 10, {}, [0, 2]),  # of 3 only 2
        (7, 1, {}, [0, 1, 2, 4, 5, 6]),  # not more than there are; halves to even: 2.4 and 3.6
        (2, 30, {}, [0, 1]),
        (100, 10, {"fps": 0.5}, [0, 33, 66, 99]),  # 5 frames, the even number below
        (100, 10, {"fps": 0.5, "min_frames": 5}, [0, 20, 40, 59, 79, 99]),  # 5 becomes 6
        (100, 10, {"max_frames": 5}, [0, 33, 66, 99]),  # 5 becomes 4
        (100, 10, {"frames": 5}, [0, 33, 66, 99]),  # 2.5 pairs: halves to even
        (100, 10, {"frames": 7}, [0, 14, 28, 42, 57, 71, 85, 99]),  # 3.5 pairs
        (100, 10, {"start": 2.0, "end": 3.95}, [20, 26, 33, 39]),
        (100, 10, {"start": 9.0}, [90, 93, 96, 99]),
        (100, 10, {"end": 0.5}, [0, 2, 3, 5]),
    ],
)
def test_qwen_rule(frames: int, fps: float, wishes: dict[str, Any], expected: list[int]) -> None:
    plan = plan_frames(index_of(frames, fps), QWEN, VideoPart("x", **wishes))
    assert numbers(plan) == expected


@pytest.mark.parametrize(
    ("frames", "fps", "rule", "expected"),
    [
        # truncated, where the other rule rounds
        (
            243, 25, LLAMAFACTORY,
            [0, 13, 26, 40, 53, 67, 80, 94, 107, 121, 134, 147, 161, 174, 188, 201, 215, 228, 242],
        ),
        (20, 10, LLAMAFACTORY, [0, 6, 12, 19]),
        (10, 10, LLAMAFACTORY, [0, 9]),  # there is no least number of frames
        (4, 10, LLAMAFACTORY, [0]),
        (1, 10, LLAMAFACTORY, [0]),
        (100, 10, FrameRule("llamafactory", max_frames=5), [0, 24, 49, 74, 99]),  # odd numbers stay
        (3, 1, FrameRule("llamafactory", fps=4), [0, 1, 2]),
    ],
)  # fmt: skip
def test_llamafactory_rule(frames: int, fps: float, rule: FrameRule, expected: list[int]) -> None:
    assert numbers(plan_frames(index_of(frames, fps), rule, VideoPart("x"))) == expected


@pytest.mark.parametrize(
    ("header", "fps", "expected", "seconds"),
    [
        ((146, 6.08833), 0.4927, [0, 145], 3.044165),  # 2.9997 frames; by its packets it lasts 6.08942 s, which is 3
        ((60, 4.0), 2, [0, 8, 16, 25, 33], 0.5),  # the index lists 60, of which 40 are shown: 42, 50 and 59 are missed
        ((0, None), 2, [0, 1, 2, 3, 4, 5, 6, 7], 0.5),  # as of Matroska: the first ones, taken for those asked for
        ((0, 5.0), 2, [0, 1, 2, 3, 4, 5, 6, 7], 5 / 8),  # as of a transport stream
        ((12, 5.0), 1, [0, 2, 5, 8, 11], 1.0),  # of a fragmented file the header counts the first fragment's
        ((0, None), 20, [0, 1, 2, 3, 4, 5, 6, 7], 1 / 20),
    ],
)
def test_llamafactory_goes_by_the_header(
    header: tuple[int, float | None], fps: float, expected: list[int], seconds: float
) -> None:
    frames = header[0] if header[0] == 146 else 40
    index = index_of(frames, 24, VideoHeader(*header))
    plan = plan_frames(index, FrameRule("llamafactory", fps=fps, max_frames=8), VideoPart("x"))
    assert numbers(plan) == expected and plan.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("fps", [0.4, 2.0, 7.3])
@pytest.mark.parametrize("name", ["whole.mp4", "trimmed.mp4", "gap.avi", "a.mkv", "a.ts", "fragments.mp4"])
def test_llamafactory_takes_what_its_own_code_takes(tmp_path: Path, name: str, fps: float) -> None:
    """The formula on the header's numbers, then the frames of these numbers among those that the decoder gives."""
    import av

    late = [100 * number + (1500 if number > 15 else 0) for number in range(30)]
    options: dict[str, Any] = {
        "a.mkv": {"codec": "libx264"}, "a.ts": {"codec": "libx264"}, "gap.avi": {"times": late},
        "fragments.mp4": {"options": {"container_options": {"movflags": "frag_keyframe"}}},
    }.get(name, {})  # fmt: skip
    clip = write_clip(tmp_path / name, 30, **options)
    if name == "trimmed.mp4":
        trim(clip, 0.7, 1.9)
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        seconds = None if stream.duration is None else float(stream.duration * stream.time_base)
        count = min(stream.frames, 10, max(1, int((seconds or 0) * fps))) if stream.frames else 10
        wanted = np.linspace(0, (stream.frames or count) - 1, count).astype(int).tolist()
        decoded = list(container.decode(stream))
        frames = [np.asarray(frame.to_image()) for number, frame in enumerate(decoded) if number in wanted]
    plan = planned(clip, FrameRule("llamafactory", fps=fps, max_frames=10))
    ours = [np.asarray(frame) for frame in read_frames(clip, plan)]
    assert len(ours) == len(frames) and all(np.array_equal(*pair) for pair in zip(ours, frames, strict=True))
    assert plan.seconds == pytest.approx(1 / fps if seconds is None else seconds / count)


@pytest.mark.parametrize(
    ("rule", "seconds", "grid"),
    [(QWEN, 2 * 9.72 / 18, (9, 4, 4)), (LLAMAFACTORY, 2 * 9.72 / 19, (10, 4, 4))],
)
def test_seconds_and_grids(tmp_path: Path, rule: FrameRule, seconds: float, grid: tuple[int, int, int]) -> None:
    """What was really sampled, in float: 1.023 s for the second, whose odd last frame is repeated."""
    clip = write_clip(tmp_path / "a.mp4", 243, rate=25)
    settings = MediaSettings(video=PixelSettings(28 * 28, 56 * 56), frames=rule)
    medium = measure(VideoPart(clip), settings, GEOMETRY)
    assert medium.seconds == pytest.approx(seconds, rel=1e-12)
    assert medium.grid(GEOMETRY) == grid
    rows = load(medium, settings, GEOMETRY)
    assert rows.grid == grid and rows.rows.shape == (np.prod(grid), 1176)
    last = np.asarray(rows.rows)[-1].reshape(3, 2, 196)
    assert np.array_equal(last[:, 0], last[:, 1]) == (rule is LLAMAFACTORY)


def test_a_given_time_is_kept(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    assert measure(VideoPart(clip, second_per_grid=0.3), MediaSettings(), GEOMETRY).seconds == 0.3


@pytest.mark.parametrize(
    ("frames", "wishes", "message"),
    [
        (1, {}, "has one frame, and the rule 'qwen' takes at least two; give it as an image"),
        (10, {"frames": 12}, "has 10 frames, 12 of them are asked for"),
        (10, {"frames": 1}, "has 10 frames, 0 of them are asked for"),
        (10, {"start": 5.0}, "has 0 frames between 5 s and its end; it is 1.00 s long"),
        (10, {"start": 0.2, "end": 0.25}, "has 1 frames between 0.2 s and 0.25 s"),
    ],
)
def test_wishes_that_cannot_be_met(frames: int, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        plan_frames(index_of(frames, 10), QWEN, VideoPart("x", **wishes))
    assert message in str(caught.value)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("b.mp4", {"codec": "libx264", "between": 2}),
        ("sound.mp4", {"audio": True}),
        ("a.mkv", {"codec": "libx264"}),
        ("a.webm", {"codec": "libvpx"}),  # no number of frames, no duration of the stream
        ("a.avi", {}),
        ("a.ts", {"codec": "libx264", "between": 1}),
    ],
)
def test_every_container(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    clip = write_clip(tmp_path / name, 30, **options)
    index = read_index(clip)
    assert (len(index), index.size, float(index.duration)) == (30, (48, 64), pytest.approx(3.0, abs=0.002))
    plan = planned(clip)
    assert numbers(plan) == [0, 6, 12, 17, 23, 29]
    assert shown(clip, plan) == [level(number) for number in numbers(plan)]
    assert shown(clip.read_bytes(), plan) == shown(clip, plan)  # type: ignore[arg-type]


def test_a_stream_without_time_stamps(tmp_path: Path) -> None:
    """A bare stream has none; frames are counted, at the rate that its header implies."""
    clip = write_clip(tmp_path / "bare.h264", 20, codec="libx264", between=2, options={"format": "h264"})
    index = read_index(clip)
    assert not index.timed and len(index) == 20 and index.duration == Fraction(20) / 25
    plan = planned(clip)
    assert numbers(plan) == [0, 6, 13, 19]
    assert shown(clip, plan) == [level(number) for number in numbers(plan)]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_changing_frame_rate(tmp_path: Path, name: str) -> None:
    times = [0, 40, 80, 1000, 1040, 3000, 3040, 3080]
    clip = write_clip(tmp_path / name, 8, codec="libx264", times=times, rate=25)
    index = read_index(clip)
    assert [round(float(tick * index.time_base) * 1000) for tick in index.ticks] == times
    assert float(index.duration) == pytest.approx(3.12, abs=0.011)  # the last frame lasts 40 ms
    plan = planned(clip)
    assert numbers(plan) == [0, 1, 3, 4, 6, 7]
    assert shown(clip, plan) == [level(number) for number in numbers(plan)]
    assert plan.seconds == pytest.approx(3.12 / 6, abs=0.002)
    late = planned(clip, start=1.0, end=3.04)
    assert numbers(late) == [3, 4, 5, 6] and shown(clip, late) == [level(number) for number in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    ("start", "seconds", "first", "count"),
    [(2.0, None, 20, 40), (0.0, 3.0, 0, 30), (2.0, 3.0, 20, 30), (1.3, None, 13, 47)],
)
def test_frames_that_an_edit_list_hides(
    tmp_path: Path, start: float, seconds: float | None, first: int, count: int
) -> None:
    """Trimmed without encoding, at either end: the file has 60 frames, and those that players show count."""
    clip = trim(write_clip(tmp_path / "a.mp4", 60, codec="libx264", between=2, gop=24), start, seconds)
    index = read_index(clip)
    assert (len(index), float(index.duration)) == (count, pytest.approx(count / 10))
    plan = planned(clip)
    assert shown(clip, plan) == [level(first + number) for number in numbers(plan)]
    assert plan.seconds == pytest.approx(count / 10 / (count // 10 * 2))
    late = planned(clip, start=2.0, frames=4)  # reached by a leap
    assert shown(clip, late) == [level(first + number) for number in numbers(late)]


def test_a_trimmed_file_that_is_cut_off(tmp_path: Path) -> None:
    options = {"container_options": {"movflags": "faststart"}}
    clip = trim(write_clip(tmp_path / "a.mp4", 60, codec="libx264", options=options), 2.0)
    content = clip.read_bytes()
    assert len(read_index(clip)) == 40
    clip.write_bytes(content[: content.index(b"mdat") + (len(content) - content.index(b"mdat")) * 2 // 3])
    assert "is cut off: its index lists 60" in refused(clip)


def test_frames_that_were_dropped_in_recording(tmp_path: Path) -> None:
    """AVI has a place for each of them, which its header counts."""
    times = [100 * number + (2000 if number >= 10 else 0) for number in range(20)]
    clip = write_clip(tmp_path / "gap.avi", 20, times=times)
    index = read_index(clip)
    assert [round(float(tick * index.time_base) * 1000) for tick in index.ticks] == times
    plan = planned(clip)
    assert shown(clip, plan) == [level(number) for number in numbers(plan)]
    assert "is cut off" in refused(cut(clip, 0.3))


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_a_file_whose_end_was_never_written(tmp_path: Path, name: str) -> None:
    """Of its full size, as a download that reserves the space leaves it."""
    clip = write_clip(tmp_path / name, 200, codec="libx264" if name == "a.mkv" else "mpeg4")
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
    assert "is cut off" in refused(clip)
    clip.write_bytes(content.ljust(len(content) + 3000, b"\0"))  # behind the end it does no harm
    assert len(read_index(clip)) == 200


def test_a_last_frame_that_lasts_long(tmp_path: Path) -> None:
    """Slides and screen recordings: Matroska states the length of the whole, not that of the frame."""
    clip = write_clip(tmp_path / "a.mkv", 20, codec="libx264")
    content = clip.read_bytes()
    place = content.index(b"\x44\x89\x88") + 3
    assert struct.unpack_from(">d", content, place) == (2000.0,)
    clip.write_bytes(content[:place] + struct.pack(">d", 9000.0) + content[place + 8 :])
    plan = planned(clip)
    assert shown(clip, plan) == [level(number) for number in (0, 6, 13, 19)]


def test_a_fragmented_file(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 30, options={"container_options": {"movflags": "frag_keyframe+empty_moov"}})
    assert len(read_index(clip)) == 30
    assert shown(clip, planned(clip)) == [level(number) for number in (0, 6, 12, 17, 23, 29)]
    assert "is cut off" in refused(cut(clip, 0.7))


def test_a_transport_stream_that_begins_between_key_frames(tmp_path: Path) -> None:
    """What cannot be decoded for want of a key frame before it is not shown, and does not count."""
    clip = write_clip(tmp_path / "a.ts", 40, codec="libx264", between=1, gop=12)
    clip.write_bytes(clip.read_bytes()[188 * 8 :])
    index = read_index(clip)
    assert len(index) == 28 and float(index.duration) == pytest.approx(2.8)
    plan = planned(clip)
    assert shown(clip, plan) == [level(12 + number) for number in numbers(plan)]


@pytest.mark.parametrize("name", ["still.mkv", "still.mp4", "cover.mkv", "cover.mp4"])
def test_a_cover_picture_is_not_the_film(tmp_path: Path, name: str) -> None:
    clip = write_with_still(tmp_path / name, attached=name.startswith("cover"))
    index = read_index(clip)
    assert (len(index), index.size) == (20, (48, 64))
    assert shown(clip, planned(clip)) == [level(number) for number in (0, 6, 13, 19)]
    assert read_index(clip).header == read_index(clip.read_bytes()).header


def test_a_stream_of_an_unknown_kind(tmp_path: Path) -> None:
    """It gives way to one that can be decoded, but not to a still."""
    clip = write_with_still(tmp_path / "a.mkv")
    content = clip.read_bytes()
    clip.write_bytes(content.replace(b"V_MJPEG", b"V_OTHER"))
    assert shown(clip, planned(clip)) == [level(number) for number in (0, 6, 13, 19)]
    clip.write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_OTHER/NEW/ONE"))
    with pytest.raises(DataError, match=r"a\.mkv: has a video stream of a kind that FFmpeg cannot decode"):
        planned(clip, LLAMAFACTORY)


def test_a_song_with_a_cover_is_no_video(tmp_path: Path) -> None:
    clip = write_with_still(tmp_path / "a.mp4", frames=0, attached=True)
    assert "has only a cover picture" in refused(clip)


def test_far_frames_are_reached_without_decoding_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "long.mp4", 240, codec="libx264", between=2, gop=24)
    plan = planned(clip, start=20.0, end=20.5)
    assert numbers(plan) == [200, 202, 203, 205]
    from duetvl.data.media import video

    decoded = 0
    real = video.decoded

    def counted(packet: Any) -> Any:
        nonlocal decoded
        for frame in real(packet):
            decoded += 1
            yield frame

    monkeypatch.setattr(video, "decoded", counted)
    assert shown(clip, plan) == [level(number) for number in (200, 202, 203, 205)]
    assert decoded < 30


@pytest.mark.parametrize(("turn", "size"), [(90, (64, 48)), (-90, (64, 48)), (180, (48, 64)), (0, (48, 64))])
def test_rotation(tmp_path: Path, turn: int, size: tuple[int, int]) -> None:
    """Turned counter-clockwise by so many degrees, as players do."""
    clip = write_clip(tmp_path / "a.mp4", 4, turn=turn)
    assert read_index(clip).size == size
    frame = np.asarray(next(read_frames(clip, planned(clip))))
    expected = np.rot90(picture(0), turn // 90)
    assert frame.shape == expected.shape
    assert abs(frame.astype(int) - expected).max() <= 6


def test_frames_are_those_of_pyav(tmp_path: Path) -> None:
    import av

    clip = write_clip(tmp_path / "a.mp4", 4)
    with av.open(str(clip)) as container:
        theirs = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    assert np.array_equal(np.stack([np.asarray(frame) for frame in read_frames(clip, planned(clip))]), np.stack(theirs))


def test_pixels_of_frames_are_bounded(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 40, size=(224, 224))

    def size(**settings: Any) -> tuple[int, int]:
        part = VideoPart(clip, **settings)
        return measure(part, MediaSettings(video=PixelSettings(28 * 28, 168 * 168)), GEOMETRY).size

    assert size() == (168, 168)
    assert size(total_pixels=4 * 84 * 84) == (84, 84)  # 8 frames, two of them counted as one
    assert size(total_pixels=1) == (28, 28)  # never below the least

    medium = measure(VideoPart(clip), MediaSettings(total_pixels=4 * 112 * 112), GEOMETRY)
    assert medium.size == (112, 112)


# -- bad files ---------------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    settings = MediaSettings(video=PixelSettings(28 * 28, 56 * 56))
    with pytest.raises(DataError) as caught:
        load(measure(VideoPart(path), settings, GEOMETRY), settings, GEOMETRY)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_what_is_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("I am a text. " * 100)
    assert "is damaged or not a video: it is text" in refused(tmp_path / "text.mp4")
    (tmp_path / "page.mp4").write_text("<!DOCTYPE html><title>Sign in</title>" + " " * 500)
    assert "is damaged or not a video: it is a web page (HTML); download" in refused(tmp_path / "page.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert "is empty (0 bytes)" in refused(tmp_path / "empty.mp4")
    assert "no such file" in refused(tmp_path / "absent.mp4")
    assert "is damaged or not a video" in refused(tmp_path)
    with pytest.raises(DataError, match=r"http://x/a\.mp4: is not on this machine"):
        read_index("http://x/a.mp4")
    with pytest.raises(DataError, match="a video cannot be a int"):
        read_index(5)


def test_a_file_of_sound_alone(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    assert "has no video stream" in refused(tmp_path / "a.wav")


def test_one_frame(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "one.mp4", 1)
    assert "has one frame" in refused(clip)
    settings = MediaSettings(frames=LLAMAFACTORY, video=PixelSettings(28 * 28, 56 * 56))
    medium = measure(VideoPart(clip), settings, GEOMETRY)
    assert medium.grid(GEOMETRY) == load(medium, settings, GEOMETRY).grid == (1, 4, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("index_behind.mp4", {}, "is damaged or not a video"),
        ("index_in_front.mp4", {"container_options": {"movflags": "faststart"}}, "is cut off: its index lists 30"),
        ("a.mkv", {"codec": "libx264"}, "is cut off: "),
        ("a.avi", {}, "is cut off: its index lists 30"),
    ],
)
def test_cut_files(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    codec = options.pop("codec", "mpeg4")
    clip = write_clip(tmp_path / name, 30, codec=codec, size=(240, 320), options=options or None)
    assert message in refused(cut(clip, 0.5))


def damaged(path: Path, start: float, stop: float) -> Path:
    """The file with a stretch of its coded pictures overwritten; its index stays."""
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 8
    end = content.index(b"moov")
    content[begin + int((end - begin) * start) : begin + int((end - begin) * stop)] = bytes(
        int((end - begin) * stop) - int((end - begin) * start)
    )
    path.write_bytes(content)
    return path


def test_a_frame_that_cannot_be_decoded_is_replaced_by_its_neighbour(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 30, gop=1)
    plan = planned(clip)  # frames 0 6 12 17 23 29
    share = 12 / 30
    damaged(clip, share + 0.008, share + 0.025)
    found = shown(clip, plan)
    assert found[:2] + found[3:] == [level(number) for number in (0, 6, 17, 23, 29)]
    assert found[2] in (level(11), level(12), level(13))


def test_a_damaged_tail(tmp_path: Path) -> None:
    clip = damaged(write_clip(tmp_path / "a.mp4", 60, gop=1), 0.5, 1.0)
    assert "is damaged: nothing can be decoded near frame" in refused(clip)
