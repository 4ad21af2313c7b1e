"""LLaMA-Factory's dataset_info.json: where a data set lies and how its records are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import DataError, did_you_mean, shown
from duetvl.data.sources.spelling import on_disk
from duetvl.storage.files import read_object

INFO_NAME: Final = "dataset_info.json"
_REMOTE: Final = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_FORMATS: Final = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_COMMON: Final = ("system", "tools", "images", "videos", "audios", "chosen", "rejected")
_TALK: Final = {"messages": "conversations"}
_TASK: Final = {"prompt": "instruction", "query": "input", "response": "output", "history": ""}


@dataclass(frozen=True)
class SourceInfo:
    """One entry: its files, and `format`, `columns` and `tags` for `duetvl.data.formats.reading.read_record`.

    A column with an empty name is not used. `num_samples`: the number of records that are taken.
    """

    files: tuple[Path, ...]
    format: str
    columns: dict[str, str]
    tags: dict[str, str]
    num_samples: int | None = None


def read_dataset_info(path: str | Path, name: str) -> SourceInfo:
    """The entry `name` of a dataset_info.json; its files lie beside it.

    As in LLaMA-Factory only the columns that an entry names are used, besides those that every layout has. Raises
    DataError naming the entry, also for data sets that would have to be downloaded.
    """
    path = Path(path)
    where = f"{path}:{name}"
    entry = _entry(path, name)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _FORMATS:
        raise DataError(f"{where}: formatting is {shown(formatting)}{did_you_mean(str(formatting), _FORMATS)}")
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise DataError(f"{where}: ranking is {shown(ranking)}, expected true or false")
    return SourceInfo(
        files=_files(path.parent, entry, where),
        format="preference" if ranking else _FORMATS[formatting],
        columns=_columns(formatting, _names(entry, "columns", where), where),
        tags=_names(entry, "tags", where),
        num_samples=_count(entry.get("num_samples"), where),
    )


def info_names(path: str | Path) -> str:
    """The names of all entries, for messages: `alpaca_en_demo, mllm_demo`. Raises DataError."""
    return ", ".join(sorted(_entries(Path(path))))


def _entry(path: Path, name: str) -> Mapping[str, Any]:
    entries = _entries(path)
    if name not in entries:
        raise DataError(f"{path}: has no data set {shown(name)}{did_you_mean(name, entries)}")
    if not isinstance(entries[name], dict):
        raise DataError(f"{path}:{name}: expected an object, found {type(entries[name]).__name__}")
    return dict(entries[name])


def _entries(path: Path) -> Mapping[str, Any]:
    return read_object(path, DataError, "an object of data sets")


def _files(directory: Path, entry: Mapping[str, Any], where: str) -> tuple[Path, ...]:
    given = entry.get("file_name")
    if not isinstance(given, str) or not given:
        remote = next((key for key in _REMOTE if entry.get(key)), None)
        if remote is None:
            raise DataError(f"{where}: has no file_name; found {', '.join(entry) or 'nothing'}")
        raise DataError(
            f"{where}: {remote} {shown(entry[remote])} is not a local file, and no data sets are downloaded; "
            "download it and give it as file_name"
        )
    found = on_disk(directory / given) or directory / given
    if found.is_dir():
        files = tuple(sorted(file for file in found.iterdir() if file.is_file() and not file.name.startswith(".")))
        if not files:
            raise DataError(f"{where}: {found} contains no files")
        return files
    if not found.is_file():
        raise DataError(f"{where}: {found}: no such file")
    return (found,)


def _columns(formatting: str, named: Mapping[str, str], where: str) -> dict[str, str]:
    if "kto_tag" in named:
        raise DataError(f"{where}: kto_tag: answers with a like or dislike are not supported; preference pairs are")
    own = _TASK if formatting == "alpaca" else _TALK
    for column in named:
        if column not in own and column not in _COMMON:
            raise DataError(f"{where}: columns has no {shown(column)}{did_you_mean(column, (*own, *_COMMON))}")
    # An entry that names columns names all of them; only a talk is always there.
    usual = own if own is _TALK or not named else {}
    return {**dict.fromkeys((*_COMMON, *own), ""), **usual, **named}


def _names(entry: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    """Names as text; what is null is as if it were not there."""
    given = entry.get(key) or {}
    if not isinstance(given, dict):
        raise DataError(f"{where}: {key} must be an object, found {type(given).__name__}")
    named = {name: value for name, value in given.items() if value is not None}
    for name, value in named.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key}.{name} must be a text, found {shown(value)}")
    return named


def _count(value: Any, where: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise DataError(f"{where}: num_samples is {shown(value)}, expected a positive whole number")
