"""data.json to the section `data`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.report import Report, Values
from duetvl.migrate.tables import DATA, PIXEL_DEFAULTS, SMALLEST_PICTURE, USUAL_TAGS

_PRE: Final = "dataset_param.preprocess_parameters."
_BASIC: Final = "dataset_param.basic_parameters."
_ATTR: Final = "dataset_param.attr."
_COLUMNS: Final = {
    "messages": ("messages", "conversations"), "system": ("system",), "images": ("images",), "videos": ("videos",),
    "chosen": ("chosen",), "rejected": ("rejected",), "prompt": ("instruction",), "query": ("input",),
    "response": ("output",), "history": ("history",), "tools": ("tools",),
}  # fmt: skip


def data_section(data: Values, report: Report) -> dict[str, Any]:
    """What data.json says of records and pictures."""
    streaming = data.switch(f"{_BASIC}streaming")
    made: dict[str, Any] = {
        **_sources(data, report),
        "image_root": ".",
        **_pictures(data, report),
        "train_on_prompt": data.switch(f"{_BASIC}train_on_prompt"),
        "mask_history": data.switch(f"{_BASIC}mask_history"),
        "streaming": streaming,
        "shuffle": _shuffle(data, report),
        "on_bad_sample": "skip",
    }
    report.add("changed", "paths of media", "data.image_root: . - they start from the working directory")
    report.add("changed", "records that cannot be used", "data.on_bad_sample: skip - as there, but counted and named")
    for name in ("train_on_prompt", "mask_history", "streaming"):
        report.add("used", name, f"data.{name}: {str(made[name]).lower()}")
    return {key: value for key, value in made.items() if value is not False or key == "shuffle"}


def _sources(data: Values, report: Report) -> dict[str, Any]:
    """The data sets to train on and to evaluate, with how their records are laid out."""
    shared = _layout(data, report)
    train = _files(data, "dataset")
    if not train:
        raise ConfigError(f"{DATA.title}: {_BASIC}dataset is missing: the files to train on, separated by commas")
    most = data.whole(f"{_BASIC}max_samples")
    if most is not None and len(train) > 1:
        report.add("changed", "max_samples", f"{most} of each of the {len(train)} files")
    extra = {} if most is None else {"max_samples": most}
    report.add("used", "dataset", f"data.train: {', '.join(train)}")
    made: dict[str, Any] = {"train": [{"path": path, **shared, **extra} for path in train]}
    val, rate = _files(data, "val_dataset"), data.number(f"{_BASIC}val_rate")
    if val:
        made["val"] = [{"path": path, **shared} for path in val]
        report.add("used", "val_dataset", f"data.val: {', '.join(val)}")
        if rate:
            report.add("contradiction", "val_rate", f"{rate:g}, but val_dataset is given, which is taken")
    elif rate:
        made["val_rate"] = float(rate)
        report.add("used", "val_rate", f"data.val_rate: {rate:g}")
    few = data.whole(f"{_BASIC}val_max_samples")
    if few is not None:
        made["val_max_samples"] = few
        report.add("used", "val_max_samples", f"data.val_max_samples: {few}")
    return made


def _files(data: Values, key: str) -> list[str]:
    """Names separated by commas; one without a directory lies in dataset_dir, as there."""
    names = [name.strip() for name in (data.text(_BASIC + key) or "").split(",") if name.strip()]
    directory = data.text(f"{_BASIC}dataset_dir") or "data"
    return [name if "/" in name else str(PurePosixPath(directory) / name) for name in names]


def _layout(data: Values, report: Report) -> dict[str, Any]:
    """`format`, `columns` and `tags` of the records; usual names are found without being named."""
    formatting = data.text(f"{_ATTR}formatting") or "sharegpt"
    if formatting not in ("sharegpt", "alpaca"):
        raise ConfigError(f"{DATA.title}: {_ATTR}formatting is {formatting!r}, expected sharegpt or alpaca")
    columns = _named(data, _COLUMNS)
    tags = _named(data, USUAL_TAGS)
    made: dict[str, Any] = {"format": "preference" if data.switch(f"{_ATTR}ranking") else formatting}
    report.add(
        "used", "attr", f"data.train: format {made['format']}, columns {columns or 'usual'}, tags {tags or 'usual'}"
    )
    return {**made, **({"columns": columns} if columns else {}), **({"tags": tags} if tags else {})}


def _named(data: Values, usual: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    given = {name: data.text(_ATTR + name) for name in usual}
    return {name: value for name, value in given.items() if value and value not in usual[name]}


def _pictures(data: Values, report: Report) -> dict[str, Any]:
    """Bounds on pixels and frames; what the file leaves out has MindSpeed-MM's defaults."""
    given = {name: data.number(_PRE + name, usual) for name, usual in PIXEL_DEFAULTS.items()}
    given = {name: PIXEL_DEFAULTS[name] if value is None else value for name, value in given.items()}
    least = {
        name: min(max(int(given[name]), SMALLEST_PICTURE), int(given[name.replace("min", "max")]))
        for name in ("image_min_pixels", "video_min_pixels")
    }
    made: dict[str, Any] = {
        "min_pixels": least["image_min_pixels"],
        "max_pixels": int(given["image_max_pixels"]),
        "video_min_pixels": least["video_min_pixels"],
        "video_max_pixels": int(given["video_max_pixels"]),
        "video_fps": float(given["video_fps"]),
        "video_max_frames": int(given["video_maxlen"]),
        "video_frames": "llamafactory",
    }
    made["video_min_frames"] = min(4, made["video_max_frames"])
    for name, value in given.items():
        absent = "" if _PRE + name in data else " (its default)"
        field = "video_max_frames" if name == "video_maxlen" else re.sub("^image_", "", name)
        if name in least and least[name] != value:
            report.add("changed", name, f"data.{field}: {least[name]} - the processor enlarges smaller ones to that")
        else:
            report.add("used", name, f"data.{field}: {made[field]}{absent}")
    report.add("changed", "resize", "pictures are resized once, by the published processor; MindSpeed-MM resizes "
               "before it as well (`data.resize: llamafactory` does so)")  # fmt: skip
    return made


def _shuffle(data: Values, report: Report) -> bool:
    sampler = data.text("dataloader_param.sampler_type") or "BaseRandomBatchSampler"
    shuffle = data.switch("dataloader_param.shuffle", True)
    if "Random" in sampler and not shuffle:
        report.add("contradiction", "shuffle", f"false, but {sampler} shuffles; data.shuffle: true")
    shuffle = shuffle or "Random" in sampler
    report.add("used", "shuffle", f"data.shuffle: {str(shuffle).lower()}, in duetvl's own order")
    return shuffle
