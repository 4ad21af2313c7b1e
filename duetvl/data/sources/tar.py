"""Tar shards in the manner of WebDataset: members with one key, side by side, make one record.

The key of a member is its name up to the first dot of its last part; what follows is its kind. A `.json` holds the
record's values. Pictures and videos join them as `Blob`s, which are read where they are decoded: in the place of
their names where the JSON names them, or else under `images` and `videos` in the order in which they lie. Without
JSON, a text (`.txt`, `.caption`) is the answer to its pictures and videos.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.errors import DataError
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.records import LONGEST_LINE, Places, Reading, Record, kind_of, parse_json

IMAGES: Final = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
VIDEOS: Final = frozenset({"mp4", "mkv", "mov", "avi", "webm", "m4v", "mpg", "mpeg", "flv"})
_TEXTS: Final = ("txt", "text", "caption")
_MEDIA_KEYS: Final = ("images", "image", "videos", "video")


@dataclass(frozen=True)
class TarShard:
    """A tar file of records."""

    path: Path
    reading: Reading = field(default_factory=Reading)

    def places(self) -> Places:
        """Where the first member of each record starts."""
        found = [at for at, _ in self.scan(0, self.path.stat().st_size)]
        return Places(np.array(found, np.int64))

    def shards(self) -> list[tuple[int, int]]:
        """The whole."""
        return [(0, self.path.stat().st_size)]

    def scan(self, start: int, stop: int, after: int | None = None) -> Iterator[tuple[int, int]]:
        """Records by the place of their first member; media are passed over. Numbers are those of a full reading."""
        last: str | None = None
        number = 0
        for member in _members(self.path, 0):
            key = _key(member.name)[0]
            if key == last:
                continue
            last, number = key, number + 1
            if after is None or member.offset > after:
                yield member.offset, number

    def read(self, at: int, number: int = 0) -> Record:
        """Read the record whose first member starts there."""
        members: list[tuple[str, Blob]] = []
        key = None
        for member in _members(self.path, at):
            name, kind = _key(member.name)
            if key is not None and name != key:
                break
            key = name
            members.append((kind, Blob(str(self.path), member.offset_data, member.size, member.name)))
        if key is None:
            raise DataError(f"{self.path}: has no member at byte {at}; it has changed since it was looked through")
        where = f"{self.path}: {key}"
        return Record(self.path, number, where, _values(members, where), self.reading, name=key)


def _members(path: Path, start: int) -> Iterator[tarfile.TarInfo]:
    """Files in a tar archive from a header on. Raises DataError where it is damaged or cut off."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.TarFile(fileobj=file) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # they would be kept for ever
                    if member.offset_data + member.size > size:
                        raise DataError(f"{path}: ends inside of {member.name}; the file is cut off")
                    if member.isfile():
                        yield member
    except tarfile.TarError as error:
        compressed = "; is it compressed? unpack it to a plain .tar" if start == 0 else ""
        raise DataError(f"{path}: not a tar file, or damaged: {error}{compressed}") from None


def _key(name: str) -> tuple[str, str]:
    """`a/b.left.jpg` is `a/b` and `left.jpg`."""
    directory, _, last = name.rpartition("/")
    key, _, kind = last.partition(".")
    return (f"{directory}/{key}" if directory else key), kind.lower()


def _values(members: list[tuple[str, Blob]], where: str) -> dict[str, Any]:
    """The values of a record from its members."""
    by_kind = dict(members)
    media = {
        "images": [blob for kind, blob in members if kind.rpartition(".")[2] in IMAGES],
        "videos": [blob for kind, blob in members if kind.rpartition(".")[2] in VIDEOS],
    }
    document = next((blob for kind, blob in members if kind.endswith("json")), None)
    if document is None:
        text = next((by_kind[kind] for kind in _TEXTS if kind in by_kind), None)
        if text is None:
            kinds = ", ".join(f".{kind}" for kind, _ in members)
            raise DataError(f"{where}: has neither a .json nor a .txt; found {kinds}")
        return _caption(_text(text, where), media)
    values = parse_json(_small(document, where), f"{where}.json")
    if not isinstance(values, dict):
        raise DataError(f"{where}.json: expected an object, found {kind_of(values)}")
    return _with_media(values, members, media)


def _with_media(values: dict[str, Any], members: list[tuple[str, Blob]], media: dict[str, Any]) -> dict[str, Any]:
    """The JSON's values with members in the place of their names, or added under `images` and `videos`."""
    names = {blob.name: blob for _, blob in members}
    names |= {blob.name.rpartition("/")[2]: blob for _, blob in members} | dict(members)
    named = {key: _resolved(values[key], names) for key in _MEDIA_KEYS if values.get(key)}
    added = {key: blobs for key, blobs in media.items() if blobs and not (named.keys() & {key, key.removesuffix("s")})}
    return {**values, **named, **added}


def _resolved(value: Any, names: dict[str, Blob]) -> Any:
    if isinstance(value, list):
        return [_resolved(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _caption(text: str, media: dict[str, Any]) -> dict[str, Any]:
    question = "<image>" * len(media["images"]) + "<video>" * len(media["videos"])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}]
    return {"messages": messages, **{key: blobs for key, blobs in media.items() if blobs}}


def _text(blob: Blob, where: str) -> str:
    try:
        return _small(blob, where).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {blob.name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _small(blob: Blob, where: str) -> bytes:
    if blob.size > LONGEST_LINE:
        raise DataError(f"{where}: {blob.name} has more than {LONGEST_LINE >> 20} MiB")
    return blob.read()
