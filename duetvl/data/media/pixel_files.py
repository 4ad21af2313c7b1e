"""The pixel settings of a model directory, in the files of any version of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.family import PatchGeometry
from duetvl.data.media.pixels import PixelSettings
from duetvl.storage.files import read_object

FRAME_PIXELS: Final = 768 * 28 * 28


def read_pixel_settings(directory: Path, geometry: PatchGeometry) -> tuple[PixelSettings, PixelSettings]:
    """Settings of pictures and of video frames.

    Directories without settings for videos, as the published ones, use those of pictures for both, but at most 768
    tokens for a frame, as qwen-vl-utils does: their pictures may have 16384. transformers 5 keeps both kinds in one
    file. Raises CheckpointError for what is missing or damaged, ConfigError for what does not fit.
    """
    found = dict(_setting_files(directory))
    if "image" not in found:
        raise CheckpointError(f"{directory}: has no preprocessor_config.json")
    settings = []
    for kind in ("image", "video"):
        name, data = found.get(kind, found["image"])
        try:
            settings.append(PixelSettings.from_dict(data, geometry))
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{directory / name}: {error}") from None
    image, video = settings
    if "video" not in found:
        most = max(video.min_pixels, min(video.max_pixels, FRAME_PIXELS))
        video = replace(video, max_pixels=most)
    return image, video


def _setting_files(directory: Path) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """What each file says: (kind, (file name, content)); a later one replaces an earlier one."""
    merged = _if_there(directory / "processor_config.json") or {}
    for kind in ("image", "video"):
        if merged.get(f"{kind}_processor"):
            yield kind, ("processor_config.json", merged[f"{kind}_processor"])
    names = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
    for kind, name in names.items():
        data = _if_there(directory / name)
        if data is not None:
            yield kind, (name, data)


def _if_there(path: Path) -> dict[str, Any] | None:
    return read_object(path, CheckpointError) if path.is_file() else None
