"""Pictures and videos of messages: measured by their headers, decoded later at exactly the size that was planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from PIL import Image

from duetvl.core.errors import DataError
from duetvl.core.family import PatchGeometry
from duetvl.data.conversation import ImagePart, VideoPart
from duetvl.data.media.images import ImageSource, Resize, Size, describe, image_size, load_image
from duetvl.data.media.pixels import PatchRows, PixelSettings, model_size, patch_rows, resized
from duetvl.data.media.video import FrameRule, VideoPlan, plan_frames, read_frames
from duetvl.data.media.video_index import read_index
from duetvl.data.sources.blob import Blob

# Of a whole video, two frames counted as one: 90% of 128,000 tokens, as in qwen-vl-utils.
TOTAL_PIXELS: Final = 128_000 * 28 * 28 * 9 // 10


@dataclass(frozen=True)
class MediaSettings:
    """How pictures and videos are resized. `video` bounds each frame, `total_pixels` all pairs of frames.

    decode_seconds: in which the frames of a video file are to be counted, and again to be decoded; None for no bound.
    """

    image: PixelSettings = field(default_factory=PixelSettings)
    video: PixelSettings = field(default_factory=PixelSettings)
    frames: FrameRule = field(default_factory=FrameRule)
    total_pixels: int = TOTAL_PIXELS
    decode_seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Medium:
    """A picture or video, and the size at which it enters the model.

    original is its size as it is seen, before any resize; `frames` 1 of a picture. `seconds` that one temporal patch
    of a video spans; None of a picture. `plan` says what is taken of a video file.
    """

    part: ImagePart | VideoPart
    original: Size
    size: Size
    frames: int = 1
    seconds: float | None = None
    plan: VideoPlan | None = None

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return isinstance(self.part, VideoPart)

    def grid(self, geometry: PatchGeometry) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        height, width = self.size
        return -(-self.frames // geometry.temporal), height // geometry.patch, width // geometry.patch


def measure(part: ImagePart | VideoPart, settings: MediaSettings, geometry: PatchGeometry) -> Medium:
    """A medium's size, from its header. Raises DataError naming its source."""
    if isinstance(part, ImagePart):
        return sized(Medium(part, image_size(part.source), (0, 0)), settings, geometry)
    given = part.second_per_grid
    frames = _frame_sources(part)
    if frames is not None:
        _check_count(part, len(frames))
        seconds = geometry.temporal / (part.fps or settings.frames.fps)
        medium = Medium(part, _frame_size(frames), (0, 0), len(frames), given or seconds)
    else:
        index = read_index(part.source, settings.decode_seconds)
        with _named(part):
            plan = plan_frames(index, settings.frames, part)
        medium = Medium(part, index.size, (0, 0), len(plan.picks), given or plan.seconds * geometry.temporal, plan)
    return sized(medium, settings, geometry)


def sized(medium: Medium, settings: MediaSettings, geometry: PatchGeometry, most: int | None = None) -> Medium:
    """The medium at the size that these settings give it; `most` pixels of area count instead of their bound."""
    own = settings.video if medium.is_video else settings.image
    wish = _bounds(medium, settings, geometry)
    if most is not None:
        wish = wish._replace(max_pixels=most)
    with _named(medium.part):
        return replace(medium, size=model_size(medium.original, own, geometry, wish))


def shrunk(medium: Medium, scale: float, settings: MediaSettings, geometry: PatchGeometry) -> Medium:
    """The medium at `scale` (at most 1) times its area, or at the smallest area that its settings allow."""
    height, width = medium.size
    least, most, *_ = _bounds(medium, settings, geometry)
    assert least is not None and most is not None
    # A narrow picture may be larger than it should, where its short side can get no shorter, and then even larger than
    # it was, as its sides are rounded otherwise.
    smaller = sized(medium, settings, geometry, most=max(least, min(most, int(height * width * scale))))
    return smaller if smaller.size[0] * smaller.size[1] < height * width else medium


def load(medium: Medium, settings: MediaSettings, geometry: PatchGeometry) -> PatchRows:
    """Decoded pixels as patch rows, of exactly the grid that the medium says. Raises DataError naming its source."""
    own = settings.video if medium.is_video else settings.image
    frames = (_checked(image, medium, own) for image in _pictures(medium, settings))
    return patch_rows(frames, medium.frames, medium.size, own, geometry)


def _bounds(medium: Medium, settings: MediaSettings, geometry: PatchGeometry) -> Resize:
    """The part's wish with its bounds filled in; those of a frame follow qwen-vl-utils."""
    wish = medium.part.wish
    own = settings.video if medium.is_video else settings.image
    least = own.min_pixels if wish.min_pixels is None else wish.min_pixels
    most = own.max_pixels
    if isinstance(medium.part, VideoPart):
        total = medium.part.total_pixels or settings.total_pixels
        pairs = -(-medium.frames // geometry.temporal)
        most = max(min(most, total // pairs), int(least * 1.05))
        most = most if wish.max_pixels is None else min(most, wish.max_pixels)
    elif wish.max_pixels is not None:
        most = wish.max_pixels
    return wish._replace(min_pixels=least, max_pixels=most)


def _frame_sources(part: VideoPart) -> Sequence[ImageSource] | None:
    """The frames of a video that is given as a list of them; None for a file."""
    source = part.source
    return None if isinstance(source, str | Path | bytes | Blob) else source


def _check_count(part: VideoPart, count: int) -> None:
    """Raises DataError where other frames of a list are asked for than all of them."""
    too_many = part.max_frames is not None and count > part.max_frames
    if part.frames not in (None, count) or too_many or (part.start, part.end) != (None, None):
        raise DataError(
            f"all frames of a list are taken, here {count}; nframes, max_frames, video_start and video_end choose "
            "those of a file: leave them out, or list other frames"
        )


def _frame_size(frames: Sequence[ImageSource]) -> Size:
    """The size that all frames of a list have."""
    if len(frames) == 0:
        raise DataError("a video has no frames")
    sizes = [image_size(frame) for frame in frames]
    for frame, (height, width) in zip(frames, sizes, strict=True):
        if (height, width) != sizes[0]:
            raise DataError(
                f"{describe(frame)}: a frame of {width} x {height} pixels in a video of {sizes[0][1]} x {sizes[0][0]}"
            )
    return sizes[0]


def _pictures(medium: Medium, settings: MediaSettings) -> Iterator[Image.Image]:
    part, own = medium.part, settings.video if medium.is_video else settings.image
    if medium.plan is not None:
        yield from read_frames(part.source, medium.plan, settings.decode_seconds)
        return
    sources = _frame_sources(part) if isinstance(part, VideoPart) else (part.source,)
    for source in sources or ():
        yield load_image(source, alpha_on_white=own.first is None)


def _checked(image: Image.Image, medium: Medium, own: PixelSettings) -> Image.Image:
    if (image.height, image.width) != medium.original and medium.plan is None:
        raise DataError(
            f"{describe(medium.part.source)}: is of {image.width} x {image.height} pixels, "
            f"{medium.original[1]} x {medium.original[0]} when it was planned; did the file change?"
        )
    return resized(image, medium.size, own)


@contextmanager
def _named(part: ImagePart | VideoPart) -> Iterator[None]:
    """Puts a medium's name before an error about its size."""
    try:
        yield
    except DataError as error:
        frames = _frame_sources(part) if isinstance(part, VideoPart) else None
        raise DataError(f"{describe(frames[0] if frames else part.source)}: {error}") from None
