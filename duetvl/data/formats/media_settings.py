"""Settings that a message part brings for its picture or video: where they stand, and that none is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Final

from duetvl.core.errors import DataError, did_you_mean

SETTINGS: Final = (
    "min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels",
    "fps", "sample_fps", "nframes", "min_frames", "max_frames", "video_start", "video_end",
    "second_per_grid", "second_per_grid_ts",
    "raw_fps",  # of the film that a list's frames are from (qwen-vl-utils): nothing depends on it
)  # fmt: skip
# A key with one of these words asks for something: passing over it would take other frames or pixels in silence.
_WORDS: Final = frozenset(("fps", "frames", "pixels", "resized", "segments", "start", "end"))
_NAMES_ELSEWHERE: Final = {
    "num_frames": "nframes", "n_frames": "nframes", "frames": "nframes", "num_segments": "nframes",
    "max_num_frames": "max_frames", "fps_max_frames": "max_frames", "fps_min_frames": "min_frames",
    "video_fps": "fps", "frame_rate": "fps", "start": "video_start", "start_time": "video_start",
    "end": "video_end", "end_time": "video_end", "video_total_pixels": "total_pixels",
    "image_max_pixels": "max_pixels", "image_min_pixels": "min_pixels",
    "video_max_pixels": "max_pixels", "video_min_pixels": "min_pixels",
}  # fmt: skip


def read_settings(part: Mapping[str, Any], source_keys: Sequence[str], common: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a part and what else it has: its own before those beside a url in an object before the `common`.

    Raises DataError for a key that looks like a setting and is none.
    """
    source = next((part[key] for key in source_keys if part.get(key) is not None), None)
    beside = source if isinstance(source, Mapping) else {}
    given = {
        key: value
        for keys in (common, beside, part)
        for key, value in keys.items()
        if value is not None and key not in source_keys
    }
    for key in given:
        if key not in SETTINGS and _looks_like_a_setting(str(key)[:80]):
            name = str(key)[:80]
            known = did_you_mean(_NAMES_ELSEWHERE.get(name, name), SETTINGS)
            raise DataError(f"{name!r} is not a setting of a picture or video{known}")
    return given


@lru_cache(1024)
def _looks_like_a_setting(key: str) -> bool:
    words = key.lower().replace("-", "_").split("_")
    known = key in _NAMES_ELSEWHERE or not _WORDS.isdisjoint(words)
    return known or bool(get_close_matches(key, SETTINGS, n=1, cutoff=0.9))
