"""What a recipe says of pictures, videos and lengths reaches the encoder."""

from dataclasses import replace
from typing import Any

import pytest

from duetvl.core.errors import ConfigError
from duetvl.data.media.pixels import PixelSettings
from duetvl.data.media.plan import TOTAL_PIXELS, MediaSettings
from duetvl.data.media.video import FrameRule
from duetvl.training.media_bounds import media_settings
from duetvl.training.recipe.data_section import DataSection

OWN = MediaSettings(PixelSettings(3136, 12_845_056), PixelSettings(3136, 602_112))


def settings(**fields: Any) -> MediaSettings:
    return media_settings(OWN, DataSection(train="a.jsonl", **fields))


def test_the_defaults_lie_within_what_the_directory_says() -> None:
    assert OWN.frames == FrameRule("qwen", 2.0, 4, 768) and OWN.total_pixels == TOTAL_PIXELS == 90_316_800
    usual = MediaSettings(
        PixelSettings(3136, 589_824), PixelSettings(3136, 65_536), FrameRule("qwen", 2.0, 4, 128), 2_408_448
    )
    assert settings() == usual
    small = MediaSettings(PixelSettings(3136, 12_544), PixelSettings(3136, 6272), OWN.frames, 100_000)
    assert media_settings(small, DataSection(train="a")) == replace(small, frames=usual.frames)
    large = replace(OWN, image=PixelSettings(1_003_520, 12_845_056))  # its fewest pixels are more than the default
    assert media_settings(large, DataSection(train="a")).image == large.image


def test_a_frame_size_of_the_recipe_is_not_reduced_for_long_videos() -> None:
    assert settings(video_max_pixels=602_112).total_pixels == TOTAL_PIXELS
    assert settings(resize="llamafactory").total_pixels == TOTAL_PIXELS
    assert settings(video_max_pixels=602_112, video_total_pixels=78_400).total_pixels == 78_400


def test_every_field_acts() -> None:
    found = settings(
        min_pixels=784, max_pixels=7840, video_min_pixels=1568, video_max_pixels=15_680, video_total_pixels=100_000,
        video_fps=1.5, video_min_frames=2, video_max_frames=64, video_frames="llamafactory",
    )  # fmt: skip
    assert (found.image.min_pixels, found.image.max_pixels, found.image.first) == (784, 7840, None)
    assert (found.video.min_pixels, found.video.max_pixels, found.video.first) == (1568, 15_680, None)
    assert found.frames == FrameRule("llamafactory", 1.5, 2, 64) and found.total_pixels == 100_000


def test_llamafactorys_resize_has_its_own_bounds() -> None:
    found = settings(resize="llamafactory")
    assert found.image.first == (1024, 589_824) and found.video.first == (256, 65_536)
    assert (found.image.max_pixels, found.video.max_pixels) == (12_845_056, 602_112)
    given = settings(resize="llamafactory", max_pixels=262_144, video_max_pixels=16_384)
    assert given.image.first == (1024, 262_144) and given.video.first == (256, 16_384)
    assert given.image.max_pixels == 12_845_056


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"max_pixels": 1000}, "data.min_pixels and data.max_pixels"),
        ({"video_max_pixels": 1000}, "data.video_min_pixels and data.video_max_pixels"),
        ({"resize": "llamafactory", "max_pixels": 900}, "data.min_pixels and data.max_pixels"),
    ],
)
def test_bounds_that_leave_no_size(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        settings(**fields)
