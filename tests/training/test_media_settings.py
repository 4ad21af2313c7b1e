"""What a recipe says of pictures, videos and lengths reaches the encoder."""

from typing import Any

import pytest

from duetvl.core.errors import ConfigError
from duetvl.data.media.pixels import PixelSettings
from duetvl.data.media.plan import TOTAL_PIXELS, MediaSettings
from duetvl.data.media.video import FrameRule
from duetvl.training.recipe.data_section import DataSection
from duetvl.training.sft import media_settings

OWN = MediaSettings(PixelSettings(3136, 12_845_056), PixelSettings(3136, 602_112))


def settings(**fields: Any) -> MediaSettings:
    return media_settings(OWN, DataSection(train="a.jsonl", **fields))


def test_without_a_word_the_directory_holds() -> None:
    assert settings() == OWN
    assert OWN.frames == FrameRule("qwen", 2.0, 4, 768) and OWN.total_pixels == TOTAL_PIXELS == 90_316_800


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
