"""Files and directories that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from duetvl.core.errors import CheckpointError, DuetvlError

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")


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


def parse_json(content: bytes, where: str | Path, error: type[DuetvlError], *, unique: bool = False) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte-order mark.

    Of two equal keys of an object the second one counts; with `unique` they are an error. `error` names `where` and
    what is wrong, in one line, for whatever json itself refuses, for nesting too deep to read, and for a lone surrogate
    (`"\\ud800"`), which is no text and could not be written again.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
        if b"\\u" in content:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise error(f"{where}: cannot be read as JSON: it is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where}: cannot be read as JSON: {problem}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what prevented the writing may prevent this too
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def staged_file(target: str | Path) -> Iterator[TextIO]:
    """A new text file to write, which becomes `target` when the block ends without an error; never one that exists.

    Raises CheckpointError where `target` exists or cannot be written.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        if target.exists():
            raise CheckpointError(f"{target}: exists already; choose another name or remove it")
        os.rename(temporary, target)
        sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_directory(directory: Path) -> None:
    """Remove a directory that readers never see half-empty: it loses its name first."""
    doomed = directory.with_name(f".{directory.name.lstrip('.')}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


@contextmanager
def staged_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory to fill, which becomes `target` when the block ends without an error.

    Until then `target` is as it was, and after an error it still is. A target that exists and is not empty is
    refused with CheckpointError unless `overwrite`: then its weights and all files that have a new version are
    replaced together, by two renames (a kill between them leaves the old directory beside it under the name
    `.NAME.replaced`), and whatever else it held stays.
    """
    target = Path(target).absolute()
    if not overwrite and _holds_something(target):
        raise CheckpointError(f"{target}: exists already; choose another directory, or move it away")
    staging = target.with_name(f".{target.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)  # a killed run's
    try:
        staging.mkdir(parents=True)
        yield staging
        sync_files(staging)
        _swap(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: could not be written: {error.strerror or error}") from error
        raise


def _holds_something(target: Path) -> bool:
    try:
        return target.exists() and not (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be looked into: {error.strerror or error}") from None


def _swap(staging: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.replaced")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(staging, target)
    sync_directory(target.parent)
    if old.is_dir():
        _keep_the_rest(old, target)
        shutil.rmtree(old)


def _keep_the_rest(old: Path, target: Path) -> None:
    """Move what the new directory does not replace: all but the weights."""
    for entry in list(old.iterdir()):
        if not (target / entry.name).exists() and not any(entry.match(pattern) for pattern in WEIGHT_FILES):
            os.rename(entry, target / entry.name)
