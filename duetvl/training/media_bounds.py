"""How large pictures and videos are in training: what the recipe says, what the model directory says, and defaults.

A model directory describes what the model can take: 16,384 tokens for a picture, 115,200 for a video. Few machines can
train that, and one photo would exceed the longest sample. So training has defaults of its own, within what the
directory allows; inference, serving and evaluation keep the directory's bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.data.media.pixels import PixelSettings
from duetvl.data.media.plan import MediaSettings
from duetvl.data.media.video import FrameRule
from duetvl.training.recipe.data_section import MAX_PIXELS, VIDEO_MAX_PIXELS, VIDEO_TOTAL_PIXELS, DataSection

Bounds = tuple[int, int]
# LLaMA-Factory's image_min_pixels and image_max_pixels, video_min_pixels and video_max_pixels.
LF_IMAGE: Final[Bounds] = (32 * 32, 768 * 768)
LF_VIDEO: Final[Bounds] = (16 * 16, 256 * 256)


def media_settings(own: MediaSettings, data: DataSection) -> MediaSettings:
    """The settings of a recipe's pictures and videos; `own` are those of the model directory.

    A bound that the recipe gives counts as it is. With `resize: llamafactory` the recipe's bounds, or LLaMA-Factory's
    defaults, are those of its own resize, and the processor's keep what the directory says, as there. Raises
    ConfigError for bounds that leave no size.
    """
    image, video = (data.min_pixels, data.max_pixels), (data.video_min_pixels, data.video_max_pixels)
    if data.resize == "llamafactory":
        pictures = replace(own.image, first=_bounds("pixels", image, LF_IMAGE))
        frames = replace(own.video, first=_bounds("video_pixels", video, LF_VIDEO))
    else:
        pictures = _within("pixels", image, own.image, MAX_PIXELS)
        frames = _within("video_pixels", video, own.video, VIDEO_MAX_PIXELS)
    rule = FrameRule(data.video_frames, data.video_fps, data.video_min_frames, data.video_max_frames)
    return MediaSettings(pictures, frames, rule, _total(own, data))


def _total(own: MediaSettings, data: DataSection) -> int:
    """Most pixels of a video. The default is for the default size of frames: one that the recipe gives is kept."""
    if data.video_total_pixels is not None:
        return data.video_total_pixels
    if data.video_max_pixels is not None or data.resize == "llamafactory":
        return own.total_pixels
    return min(own.total_pixels, VIDEO_TOTAL_PIXELS)


def _within(name: str, asked: tuple[int | None, int | None], own: PixelSettings, usual: int) -> PixelSettings:
    """The directory's settings with the recipe's bounds, or with the usual upper one where the directory allows it."""
    most = min(own.max_pixels, usual) if usual >= own.min_pixels else own.max_pixels
    low, high = _bounds(name, asked, (own.min_pixels, most))
    return replace(own, min_pixels=low, max_pixels=high)


def _bounds(name: str, asked: tuple[int | None, int | None], defaults: Bounds) -> Bounds:
    low, high = (default if one is None else one for one, default in zip(asked, defaults, strict=True))
    if low > high:
        least, most = (f"data.{name.replace('pixels', end)}" for end in ("min_pixels", "max_pixels"))
        raise ConfigError(
            f"data: pictures of at least {low} and at most {high} pixels are asked for, one of which is the model "
            f"directory's own or a default; give {least} and {most} together"
        )
    return low, high
