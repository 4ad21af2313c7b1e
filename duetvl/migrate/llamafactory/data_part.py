"""LLaMA-Factory's keys of data and media to the section `data`."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.data.formats.dataset_info import INFO_NAME, read_dataset_info
from duetvl.migrate.llamafactory.keys import Keys
from duetvl.migrate.names import SMALLEST_PICTURE

_BOUNDS: Final = {
    "image_max_pixels": "max_pixels", "image_min_pixels": "min_pixels", "video_max_pixels": "video_max_pixels",
    "video_min_pixels": "video_min_pixels",
}  # fmt: skip


def data_section(keys: Keys) -> dict[str, Any]:
    """What the file says of records, their length and their pictures."""
    section: dict[str, Any] = {"train": _sources(keys, "dataset")}
    if not section["train"]:
        raise ConfigError(f"{keys.table.title}: dataset is missing: names of {INFO_NAME}, separated by commas")
    section |= _evaluated(keys)
    if system := keys.text("default_system"):
        section["system"] = system
        keys.note("default_system", "data.system")
    if media := keys.text("media_dir"):
        section["image_root"] = media
        keys.note("media_dir", f"data.image_root: {media}")
    if keys.get("mix_strategy") != "concat":
        keys.report.lacks(keys.table.title, "mix_strategy", ": data sets are joined; give each a `weight`")
    elif "mix_strategy" in keys:
        keys.note("mix_strategy", "concat: data.train's sets are joined")
    section |= _length(keys) | _media(keys) | _switches(keys)
    if keys.peek("data_seed") is not None:
        section["seed"] = keys.take("data_seed", "data.seed", whole=True)
        keys.report.add("not needed", "seed", "data_seed is given, for the order of samples")
    else:
        section["seed"] = keys.take("seed", "data.seed", whole=True)
    if workers := keys.whole("dataloader_num_workers"):
        section["workers"] = workers
        keys.note("dataloader_num_workers", f"data.workers: {workers}")
    return section


def _sources(keys: Keys, key: str) -> list[Any]:
    """`dataset_dir/dataset_info.json:NAME` for each name, checked where that file is there."""
    names = keys.names(key)
    if not names:
        return []
    directory = keys.text("dataset_dir") or "data"
    if directory == "ONLINE" or directory.startswith("REMOTE:"):
        raise ConfigError(f"{keys.table.title}: dataset_dir is {directory}: data sets are not downloaded; fetch them")
    info = PurePosixPath(directory) / INFO_NAME
    most = keys.whole("max_samples")
    for name in names:
        if Path(info).is_file():
            read_dataset_info(Path(info), name)
    absent = "" if Path(info).is_file() else f"; {info} is not there now, seen from the working directory"
    paths = [f"{info}:{name}" for name in names]
    keys.note(key, f"data.{'val' if key == 'eval_dataset' else 'train'}: {', '.join(paths)}")
    keys.note("dataset_dir", f"{directory}{absent}", changed=bool(absent))
    if not most:
        return paths
    if keys.switch("streaming"):
        raise ConfigError(f"{keys.table.title}: max_samples and streaming are both given; give max_steps instead")
    keys.note("max_samples", f"max_samples: {most} of each set, chosen by data.seed; there the first", changed=True)
    return [{"path": path, "max_samples": most} for path in paths]


def _evaluated(keys: Keys) -> dict[str, Any]:
    """The records that are evaluated: sets of their own, or a share of the training records."""
    val, size = _sources(keys, "eval_dataset"), float(keys.number("val_size"))
    if val and size:
        raise ConfigError(f"{keys.table.title}: eval_dataset and val_size are both given; remove one of them")
    if val:
        return {"val": val}
    if size >= 1:
        keys.report.lacks(
            keys.table.title, "val_size", f": {size:g} records; give it as a share of all records, below 1"
        )
        return {}
    if size:
        keys.note("val_size", f"data.val_rate: {size:g}")
    return {"val_rate": size} if size else {}


def _length(keys: Keys) -> dict[str, Any]:
    cutoff = keys.whole("cutoff_len")
    pack = cutoff * keys.whole("per_device_train_batch_size")
    keys.note("cutoff_len", f"data.cutoff_len: {cutoff}, data.too_long: truncate - never in a picture", changed=True)
    keys.report.add(
        "added", "data.pack_tokens", f"{pack}: cutoff_len x per_device_train_batch_size, packed, not padded"
    )
    return {"cutoff_len": cutoff, "too_long": "truncate", "pack_tokens": pack}


def _media(keys: Keys) -> dict[str, Any]:
    """Bounds on pixels and frames, and LLaMA-Factory's rule of which frames are taken."""
    section: dict[str, Any] = {}
    for key, field in _BOUNDS.items():
        value = keys.whole(key)
        least = "min" in key
        section[field] = min(max(value, SMALLEST_PICTURE), keys.whole(key.replace("min", "max"))) if least else value
        raised = " - the processor enlarges smaller ones to that" if section[field] != value else ""
        keys.note(key, f"data.{field}: {section[field]}{raised}", changed=bool(raised))
    section["video_fps"] = keys.take("video_fps", "data.video_fps")
    section["video_max_frames"] = keys.take("video_maxlen", "data.video_max_frames", whole=True, least=1)
    section |= {"video_frames": "llamafactory"}
    if section["video_max_frames"] < 4:
        section["video_min_frames"] = section["video_max_frames"]
    keys.report.add("added", "data.video_frames", "llamafactory: frames are chosen by its rule")
    keys.report.add("changed", "resize", "pictures are resized once, by the published processor; LLaMA-Factory resizes "
                    "before it as well (`data.resize: llamafactory` does so)")  # fmt: skip
    return section


def _switches(keys: Keys) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key in ("streaming", "train_on_prompt", "mask_history"):
        if keys.switch(key):
            section[key] = True
            keys.note(key, f"data.{key}: true")
    if keys.switch("disable_shuffling"):
        section["shuffle"] = False
        keys.note("disable_shuffling", "data.shuffle: false")
    if keys.switch("streaming"):
        section["shuffle_buffer"] = keys.take("buffer_size", "data.shuffle_buffer", whole=True)
    return section
