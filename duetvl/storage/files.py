"""Files and directories that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from duetvl.core.errors import CheckpointError, DuetvlError, shown
from duetvl.storage.locks import file_lock, made_directory, tidy_when_ended

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_MODEL, _ADAPTER = "config.json", "adapter_config.json"
# What a new directory takes away beside the files that it has itself: parts of a model or an adapter of before, which
# would be read with the new one.
_TAKEN = {_MODEL: (*WEIGHT_FILES, _ADAPTER, "adapter_model.*"), _ADAPTER: ("adapter_model.*",)}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk; a file's own data needs its own fsync."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(directory: Path) -> None:
    """Wait until every file below a directory is on disk, data and names."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(Path(folder) / name, "rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(Path(folder))


def json_value(content: bytes | str) -> Any:
    """The value of a JSON text (of bytes in UTF-8), with or without a byte-order mark.

    ValueError says in one line what is wrong: whatever json itself refuses, nesting too deep to read, a key that one
    object has twice, of which json takes the last in silence, and a lone surrogate (`"\\ud800"`), which is no text
    and could not be written again.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} is given twice in one object; keep one of them")
    return found


def parse_json(content: bytes, where: str | Path, error: type[DuetvlError]) -> Any:
    """The value of a JSON text; see `json_value`. `error` names `where` and what is wrong."""
    try:
        return json_value(content)
    except ValueError as problem:
        raise error(f"{where}: cannot be read as JSON: {problem}") from None


def read_json(path: Path, error: type[DuetvlError]) -> Any:
    """The value in a small JSON file; see `parse_json`. Raises `error` where it cannot be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None
    return parse_json(content, path, error)


def read_object(path: Path, error: type[DuetvlError], what: str = "an object") -> dict[str, Any]:
    """The JSON object in a small file. Raises `error` for whatever it is instead."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: expected {what}, found {type(value).__name__}")
    return value


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write or replace a small file: readers see the old content or the new one, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two processes may write it at once
    try:
        with open(temporary, "xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what prevented the writing may prevent this too
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_temporaries(directory: Path) -> None:
    """Remove what killed processes have left of `write_bytes`; nobody may be writing there."""
    for file in directory.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(file.name):
            file.unlink(missing_ok=True)


def free_space(directory: Path) -> int | None:
    """Free bytes of the disk that a directory is on or will be on; None where the system does not say."""
    directory = directory.absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else None


@contextmanager
def staged_file(target: str | Path) -> Iterator[TextIO]:
    """A new text file to write, which becomes `target` when the block ends without an error; never one that exists.

    Raises CheckpointError where `target` exists, is being written by another process, or cannot be written.
    """
    target = Path(os.path.realpath(target))
    with _alone(target):
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "x", encoding="utf-8") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            if os.path.lexists(target):
                raise CheckpointError(f"{target}: exists already; choose another name or remove it")
            os.rename(temporary, target)
            sync_directory(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove a directory that readers never see half-empty: it loses its name first. Of a link the link alone.

    What cannot be removed yet, as on NFS while it is read, stays under the hidden name `.NAME.deleting`.
    """
    if directory.is_symlink():
        directory.unlink()
        return
    doomed = directory.with_name(f".{directory.name.lstrip('.')}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def staged_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to fill, which becomes `target` when the block ends without an error.

    Until then `target` is as it was, and after an error or a signal it still is. A target that exists and is not empty
    is refused with CheckpointError unless `overwrite`: then the model or adapter in it and all files that have a new
    version are replaced together, by two renames, and whatever else it held stays; a model in the Hugging Face layout
    is replaced by another one alone. After a kill between the two renames the old directory lies beside it under the
    name `.NAME.replaced`; writing there again puts it back first. One process writes to a target at a time: another is
    refused.
    """
    target = Path(os.path.realpath(target))
    with _alone(target, parents=True) as locks:
        if locks:
            _tidy_up(target)
        if not overwrite and _holds_something(target):
            raise CheckpointError(f"{target}: exists already; choose another directory, or move it away")
        staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.saving")
        try:
            staging.mkdir()
            yield staging
            if _holds_a_model(target) and not (staging / _MODEL).exists():
                raise CheckpointError(
                    f"{target}: holds a model in the Hugging Face layout, which an adapter or a release does not "
                    f"replace; choose another directory"
                )
            sync_files(staging)
            if overwrite and target.is_dir():
                _replace(target, staging)
            else:
                os.rename(staging, target)  # fails where somebody has put something there meanwhile
            sync_directory(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _alone(target: Path, *, parents: bool = False) -> Iterator[bool]:
    """Keep other processes from writing to a target; whether that is possible. OSErrors become CheckpointErrors."""
    try:
        with tidy_when_ended(), made_directory(target.parent) if parents else nullcontext(), ExitStack() as held:
            try:
                works = held.enter_context(file_lock(target.with_name(f".{target.name}.lock")))
            except BlockingIOError:
                raise CheckpointError(
                    f"{target}: another process is writing it; wait for its end, or choose another name"
                ) from None
            yield works
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {error.strerror or error}") from error


def _tidy_up(target: Path) -> None:
    """End what a killed process has begun: remove what was half written, put back what was to be replaced."""
    begun = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.saving")
    for path in target.parent.iterdir():
        if begun.fullmatch(path.name):
            shutil.rmtree(path)
    _settle(target)


def _holds_something(target: Path) -> bool:
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _holds_a_model(target: Path) -> bool:
    return (target / _MODEL).is_file() and any(next(target.glob(pattern), None) for pattern in WEIGHT_FILES)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _replace(target: Path, staging: Path) -> None:
    try:
        os.rename(target, _replaced(target))
        os.rename(staging, target)
    finally:
        _settle(target)


def _settle(target: Path) -> None:
    """Between the two renames the old directory goes back; after them it gives up what the new one does not replace."""
    old = _replaced(target)
    if old.is_dir() and not target.exists():
        os.rename(old, target)
    elif old.is_dir():
        _keep_the_rest(old, target)


def _keep_the_rest(old: Path, target: Path) -> None:
    """Move what the new directory neither replaces nor takes away, and remove the old one."""
    taken = next((patterns for name, patterns in _TAKEN.items() if (target / name).exists()), ())
    for entry in list(old.iterdir()):
        if not os.path.lexists(target / entry.name) and not any(entry.match(pattern) for pattern in taken):
            os.rename(entry, target / entry.name)
    shutil.rmtree(old)
