"""Drafts on disk, so that later epochs, runs and nodes need not tokenise and look into videos again.

An entry is a file named by a digest of all that its draft follows from: the record's values, size and time of change
of the files that it names, how its data set is read, the encoder with its settings, and this package's code. So there
is nothing to invalidate. A name without an ending is not known for a file's; so an entry also holds what was there of
each medium's file, and is computed again if that has changed. It appears by a rename: a reader sees all of it or
nothing, and two writers of one entry write the same. Damaged entries are computed again.

Pixels are not kept. As bytes they take ten times the space of the JPEG that they come from, and reading so much from
a disk that is shared takes as long as decoding it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import duetvl
from duetvl.core.batch import Batch, Pair, Sample
from duetvl.core.errors import ConfigError
from duetvl.data.draft import Draft, Encoder
from duetvl.data.formats.parts import find_file
from duetvl.data.media.plan import Medium
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.records import Record
from duetvl.data.sources.spelling import without_scheme

_HEAD: Final = b"duetvl draft 2\n"
_LARGEST: Final = 1 << 20  # bytes of an entry: drafts that hold their pictures' files are no smaller than their data
_FILE_NAME: Final = re.compile(r"[^\n<>]{1,1000}\.\w{2,5}")
_NUMPY: Final = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}


class CachedEncoder:
    """An `Encoder` that looks for its drafts in a directory first, and leaves them there."""

    def __init__(self, encoder: Encoder, directory: str | os.PathLike[str]):
        """Raises ConfigError where the directory cannot be made."""
        self.encoder, self.directory = encoder, Path(directory)
        self._settings = _fingerprint(encoder)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache {directory}: cannot be created: {error.strerror or error}") from None

    def draft(self, record: Record) -> Draft:
        """See `Encoder`."""
        try:
            path = self._path(record)
        except RecursionError:  # values nested so deeply are not looked through
            return self.encoder.draft(record)
        found = self._read(path)
        if found is not None:
            return replace(found, id=record.id, where=record.where)
        draft = self.encoder.draft(record)
        self._write(path, draft)
        return draft

    def load(self, draft: Draft) -> Sample | Pair:
        """See `Encoder`."""
        return self.encoder.load(draft)

    def pack(self, samples: Sequence[Sample | Pair]) -> Batch:
        """See `Encoder`."""
        return self.encoder.pack(samples)

    def _path(self, record: Record) -> Path:
        digest = sha256(self._settings)
        parts = (record.values, astuple(record.reading), list(_media_files(record)))
        digest.update(json.dumps(parts, default=_plain).encode("utf-8", errors="surrogatepass"))
        name = digest.hexdigest()[:40]
        return self.directory / name[:2] / name

    def _read(self, path: Path) -> Draft | None:
        """The draft of an entry; None where there is none, or it is damaged."""
        try:
            content = path.read_bytes()
            head, check, body = content[: len(_HEAD)], content[len(_HEAD) :][:4], content[len(_HEAD) + 4 :]
            if head != _HEAD or int.from_bytes(check, "little") != zlib.crc32(body):
                return None
            found, states = _Reader(io.BytesIO(body), type(self.encoder).__module__).load()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, TypeError, ValueError):
            return None
        return found if isinstance(found, Draft) and states == _states(found) else None

    def _write(self, path: Path, draft: Draft) -> None:
        body = pickle.dumps((replace(draft, id="", where=""), _states(draft)), protocol=5)
        if len(body) > _LARGEST:
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(_HEAD + zlib.crc32(body).to_bytes(4, "little") + body)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            warnings.warn(f"data.cache: {path} cannot be written: {error.strerror or error}", stacklevel=2)


class _Reader(pickle.Unpickler):
    """Makes objects of our and the encoder's classes alone: those who may write to a mount shall not run code here."""

    def __init__(self, file: io.BytesIO, module: str):
        super().__init__(file)
        self._packages = {"duetvl", module.partition(".")[0]}

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if package in (*self._packages, "pathlib") or (package == "numpy" and name in _NUMPY):
            found = super().find_class(module, name)  # after it is known to be of a package that may be imported
            own = package in self._packages and isinstance(found, type) and found.__module__ == module
            if own or package == "numpy" or (package == "pathlib" and isinstance(found, type)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a draft")


def _fingerprint(encoder: Encoder) -> bytes:
    """A digest of the encoder, its settings, and the code that it runs."""
    digest = sha256(f"{duetvl.__version__}\n".encode())
    root = Path(duetvl.__file__).parent
    for file in sorted(file for part in ("core", "data", "models") for file in (root / part).rglob("*.py")):
        digest.update(file.read_bytes())
    digest.update(pickle.dumps(encoder, protocol=5))
    return digest.digest()


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, Blob):
        return [*astuple(value), *_state(Path(value.path))]
    return repr(value)


def _media_files(record: Record) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of whatever in the record may be the name of a file."""
    for text in _texts(record.values):
        if _FILE_NAME.fullmatch(text):
            path, _ = find_file(without_scheme(text), record.media_dirs)
            yield str(path), *_state(path)


def _states(draft: Draft) -> list[tuple[int, int]]:
    """Size and time of change of the files that its media are read from."""
    sources = [medium.part.source for medium in draft.media if isinstance(medium, Medium)]
    files = [file for source in sources for file in (source if isinstance(source, list) else [source])]
    return [_state(file) for file in files if isinstance(file, Path)]


def _state(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return state.st_size, state.st_mtime_ns


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
