"""data.json to the section `data`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.migrate.names import PIXEL_DEFAULTS, SMALLEST_PICTURE, USUAL_TAGS
from duetvl.migrate.report import Report, Values
from duetvl.migrate.tables import DATA
from duetvl.training.recipe.text import show

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
        **_sources(data, streaming, report),
        **_pictures(data, report),
        "train_on_prompt": data.switch(f"{_BASIC}train_on_prompt"),
        "mask_history": data.switch(f"{_BASIC}mask_history"),
        "streaming": streaming,
        "shuffle": _shuffle(data, report),
        "on_bad_sample": "skip",
    }
    report.add("added", "data.on_bad_sample", "skip: records that cannot be used are left out as there, and named")
    _tell_of_media(data, report)
    for name in ("train_on_prompt", "mask_history", "streaming"):
        report.add("used", name, f"data.{name}: {str(made[name]).lower()}")
    return {key: value for key, value in made.items() if value is not False or key == "shuffle"}


def _sources(data: Values, streaming: bool, report: Report) -> dict[str, Any]:
    """The data sets to train on and to evaluate, with how their records are laid out."""
    shared = _layout(data, report)
    train = _files(data, "dataset")
    if not train:
        raise ConfigError(f"{DATA.title}: {_BASIC}dataset is missing: the files to train on, separated by commas")
    report.add("used", "dataset", f"data.train: {', '.join(train)}")
    made: dict[str, Any] = {"train": [{"path": path, **shared} for path in train], **_most(data, streaming, report)}
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
    if few and val:
        made["val_max_samples"] = few
        said = f"data.val_max_samples: {few} - chosen by data.seed; there they are the first"
        report.add("changed", "val_max_samples", said)
    elif few:
        report.add("not needed", "val_max_samples", "without val_dataset it is not read there either")
    return made


def _most(data: Values, streaming: bool, report: Report) -> dict[str, Any]:
    """`data.max_samples`: the first records of all files together, as there; 0 and null are no bound."""
    most = data.whole(f"{_BASIC}max_samples")
    if most and streaming:
        report.add("not needed", "max_samples", "is not read with streaming there either")
    elif most:
        report.add("used", "max_samples", f"data.max_samples: {most}, the first of all files together")
        return {"max_samples": most}
    return {}


def _tell_of_media(data: Values, report: Report) -> None:
    """Paths of media start from dataset_dir there, and from the working directory where nothing is there."""
    directory = data.text(f"{_BASIC}dataset_dir") or "data"
    files = [PurePosixPath(path) for key in ("dataset", "val_dataset") for path in _files(data, key)]
    rule = "media are looked for beside the data file and then in the working directory"
    if all(file.parent == PurePosixPath(directory) for file in files):
        report.add("used", "dataset_dir", f"{directory}: {rule}, as there")
    else:
        said = f"{directory}, where the data files do not lie: {rule}; data.image_root: {directory} looks there alone"
        report.add("changed", "dataset_dir", said)


def _files(data: Values, key: str) -> list[str]:
    """Names separated by commas; they start from the working directory, as there."""
    return [name.strip() for name in (data.text(_BASIC + key) or "").split(",") if name.strip()]


def _layout(data: Values, report: Report) -> dict[str, Any]:
    """`format`, `columns` and `tags` of the records; usual names are found without being named."""
    formatting = data.text(f"{_ATTR}formatting") or "sharegpt"
    if formatting not in ("sharegpt", "alpaca"):
        raise ConfigError(f"{DATA.title}: {_ATTR}formatting is {show(formatting)}, expected sharegpt or alpaca")
    columns = _named(data, _COLUMNS)
    tags = _named(data, USUAL_TAGS)
    made: dict[str, Any] = {"format": "preference" if data.switch(f"{_ATTR}ranking") else formatting}
    given = [name for name in ("formatting", *_COLUMNS, *USUAL_TAGS) if f"{_ATTR}{name}" in data]
    said = f"format {made['format']}, columns {columns or 'usual'}, tags {tags or 'usual'}"
    report.add("used", "attr", f"data.train: {said}; from {', '.join(given) or 'its defaults'}")
    return {**made, **({"columns": columns} if columns else {}), **({"tags": tags} if tags else {})}


def _named(data: Values, usual: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    given = {name: data.text(_ATTR + name) for name in usual}
    return {name: value for name, value in given.items() if value and value not in usual[name]}


def _pictures(data: Values, report: Report) -> dict[str, Any]:
    """Bounds on pixels and frames; what the file leaves out has MindSpeed-MM's defaults."""
    given = {name: data.number(_PRE + name, usual) for name, usual in PIXEL_DEFAULTS.items()}
    given = {name: PIXEL_DEFAULTS[name] if value is None else value for name, value in given.items()}
    given |= _old_bounds(data, report)
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
    report.add("added", "data.video_frames", "llamafactory: frames are chosen by its rule, which MindSpeed-MM has")
    if made["video_max_frames"] < 4:
        made["video_min_frames"] = made["video_max_frames"]
        report.add("added", "data.video_min_frames", f"{made['video_min_frames']}: no more than the most of them")
    for name, value in given.items():
        absent = "" if data.peek(_PRE + name) is not None else " (its default)"
        field = "video_max_frames" if name == "video_maxlen" else re.sub("^image_", "", name)
        if name in least and least[name] != value:
            report.add("changed", name, f"data.{field}: {least[name]} - the processor enlarges smaller ones to that")
        else:
            report.add("used", name, f"data.{field}: {made[field]}{absent}")
    report.add("changed", "resize", "pictures are resized once, by the published processor; MindSpeed-MM resizes "
               "before it as well (`data.resize: llamafactory` does so)")  # fmt: skip
    return made


def _old_bounds(data: Values, report: Report) -> dict[str, float]:
    """Release 1.0 bounds the sides of pictures and frames, where the later ones bound their pixels."""
    found: dict[str, float] = {}
    for kind in ("image", "video"):
        side = data.number(f"{_PRE}{kind}_resolution")
        if side is None:
            continue
        if data.peek(f"{_PRE}{kind}_max_pixels") is not None:
            report.add("not needed", f"{kind}_resolution", f"{kind}_max_pixels says the same")
            continue
        found[f"{kind}_max_pixels"] = side * side
        field = "data.max_pixels" if kind == "image" else "data.video_max_pixels"
        said = f"{field}: {side * side:g} - {side:g} is the longest side there, and the square of it the bound here"
        report.add("changed", f"{kind}_resolution", said)
    return found


def _shuffle(data: Values, report: Report) -> bool:
    sampler = data.text("dataloader_param.sampler_type") or "BaseRandomBatchSampler"
    shuffle = data.switch("dataloader_param.shuffle", True)
    if "Random" in sampler and not shuffle:
        report.add("contradiction", "shuffle", f"false, but {sampler} shuffles; data.shuffle: true")
    shuffle = shuffle or "Random" in sampler
    report.add(
        "used", f"shuffle, sampler_type {sampler}", f"data.shuffle: {str(shuffle).lower()}, in duetvl's own order"
    )
    return shuffle
