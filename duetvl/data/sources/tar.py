"""Tar shards in the manner of WebDataset: members with one key, side by side, make one record.

The key of a member is its name up to the first dot of its last part; what follows is its kind. A `.json` holds the
record's values. Pictures and videos join them as `Blob`s, which are read where they are decoded: in the place of
their names where the JSON names them, or else under `images` and `videos` in the order in which they lie. Without
JSON, a text (`.txt`, `.caption`) is the answer to its pictures and videos.

Names may have dots of their own, as in `v1.0_0001.jpg`. Where neighbours of one key are each a record of their own by
their names up to the last dot, these names are the keys.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple
from unicodedata import normalize

import numpy as np

from duetvl.core.errors import DataError, one_line
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.records import LONGEST_LINE, Places, Reading, Record, kind_of, parse_json

IMAGES: Final = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
VIDEOS: Final = frozenset({"mp4", "mkv", "mov", "avi", "webm", "m4v", "mpg", "mpeg", "flv"})
_TEXTS: Final = ("txt", "text", "caption")
_MEDIA_KEYS: Final = ("images", "image", "videos", "video")
_LONGEST_HEADER: Final = 1 << 20  # bytes of a long name or of extended attributes
_EXTENDED: Final = b"xgXLK"  # kinds of headers that hold something about the next one


class Member(NamedTuple):
    """A file in a shard; `fault` says why it cannot be read, as of a link."""

    name: str
    at: int  # of its header
    blob: Blob
    fault: str = ""

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part: of `a/b.left.jpg` it is `a/b`."""
        return self.name[: len(self.name) - len(self.last)] + self.last.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name up to the last dot."""
        return self.name[: len(self.name) - len(self.last)] + self.last.rpartition(".")[0]

    @property
    def kind(self) -> str:
        """What follows the key: `left.jpg`."""
        return self.last.partition(".")[2].lower()

    @property
    def suffix(self) -> str:
        """What follows the last dot."""
        return self.last.rpartition(".")[2].lower()

    @property
    def last(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]


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
        number = 0
        for _, group in groupby(_members(self.path, 0), key=lambda member: member.key):
            runs = [list(run) for _, run in groupby(group, key=lambda member: member.stem)]
            first = 0
            while first < len(runs):
                number += 1
                place = runs[first][0].at
                if after is None or place > after:
                    yield place, number
                first += _runs_of_record(runs[first:])

    def read(self, at: int, number: int = 0) -> Record:
        """Read the record whose first member starts there."""
        runs: list[list[Member]] = []
        for member in _members(self.path, at):
            if runs and member.key != runs[0][0].key:
                break
            if runs and member.stem == runs[-1][-1].stem:
                runs[-1].append(member)
            elif len(runs) == 2 and _runs_of_record(runs) == 1:
                break
            else:
                runs.append([member])
        if not runs:
            raise DataError(f"{self.path}: has no member at byte {at}; it has changed since it was looked through")
        members = list(chain(*runs[: _runs_of_record(runs)]))
        key = members[0].key if len({member.stem for member in members}) > 1 else members[0].stem or members[0].key
        where = f"{self.path}: {_named(key)}"
        return Record(self.path, number, where, _values(members, where), self.reading, name=key)


def _runs_of_record(runs: Sequence[Sequence[Member]]) -> int:
    """How many of the runs, which have one key and a stem each, make up the first record: one, or all of them."""
    return 1 if all(map(_is_whole, runs[:2])) else len(runs)


def _is_whole(run: Sequence[Member]) -> bool:
    """Whether members with one stem are a record by themselves: a JSON file, or a text with its pictures."""
    documents = [member for member in run if member.suffix == "json"]
    if documents:
        return len(documents) == 1
    texts = [member for member in run if member.suffix in _TEXTS]
    return len(texts) == 1 and any(member.suffix in IMAGES | VIDEOS for member in run)


def _members(path: Path, start: int) -> Iterator[Member]:
    """What a tar file holds from a header on, but for directories and hidden files (WebDataset leaves them out too).

    Raises DataError where it is damaged or cut off.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        for info in _headers(file, path, start):
            if info.offset_data + info.size > size:
                raise DataError(f"{path}: ends inside of {_named(info.name)}; the file is cut off")
            if not info.isdir() and not info.name.rpartition("/")[2].startswith("."):
                blob = Blob(str(path), info.offset_data, info.size, info.name)
                yield Member(info.name, info.offset, blob, _fault(info))


def _headers(file: BinaryIO, path: Path, at: int) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file, to its very end: behind an archive's end another may follow, as of `cat`."""
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(tarfile.BLOCKSIZE)))  # an empty one, to read headers with
    tar.fileobj = file
    closed, start = False, at
    while True:
        _check_extended(file, path, at)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # an empty block, which closes an archive
            closed, at = True, at + tarfile.BLOCKSIZE
            continue
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]  # the file's end
            if closed:
                return
            raise DataError(
                f"{path}: ends without the empty blocks that close a tar file; it is cut off, or was never closed"
            ) from None
        except (tarfile.TarError, ValueError) as error:
            compressed = "; is it compressed? unpack it to a plain .tar" if at == start == 0 else ""
            raise DataError(f"{path}: not a tar file, or damaged: {error} at byte {at}{compressed}") from None
        if info.size < 0 or tar.offset <= at:
            raise DataError(f"{path}: is damaged at byte {at}: {_named(info.name)} has a size of {info.size}")
        yield info
        closed, at = False, tar.offset


def _check_extended(file: BinaryIO, path: Path, at: int) -> None:
    """Go to a header; one that holds something about the next has a sensible size, as all of it is read at once."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    file.seek(at)
    if len(block) == tarfile.BLOCKSIZE and block[156:157] in _EXTENDED:
        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except tarfile.TarError:
            return  # said where it is read
        if not 0 <= size <= _LONGEST_HEADER:
            raise DataError(f"{path}: is damaged at byte {at}: a header of {size} bytes")


def _fault(info: tarfile.TarInfo) -> str:
    """Why a member is no plain file; empty where it is one."""
    if info.islnk() or info.issym():
        return f"is a link to {_named(info.linkname)}; pack the file itself (tar --dereference --hard-dereference)"
    if info.issparse():
        return "is stored with holes; pack it without --sparse"
    return "" if info.isfile() else "is no plain file"


def _values(members: Sequence[Member], where: str) -> dict[str, Any]:
    """The values of a record from its members. Raises DataError where they cannot be of one record, or be read."""
    for member in members:
        if member.fault:
            raise DataError(f"{where}: {_named(member.name)} {member.fault}")
    media = {
        "images": [member.blob for member in members if member.suffix in IMAGES],
        "videos": [member.blob for member in members if member.suffix in VIDEOS],
    }
    documents = [member for member in members if member.suffix == "json"]
    texts = [member for member in members if member.suffix in _TEXTS]
    _check_one(documents or texts, where)
    for _, same in groupby(sorted(members, key=lambda member: member.kind), key=lambda member: member.kind):
        _check_one(list(same), where)
    if documents:
        values = parse_json(_small(documents[0].blob, where), f"{where}.json")
        if not isinstance(values, dict):
            raise DataError(f"{where}.json: expected an object, found {kind_of(values)}")
        return _with_media(values, members, media)
    if not texts or not any(media.values()):
        missing = "a .json, or a .txt and its pictures or videos"
        raise DataError(f"{where}: needs {missing}; found {_named(', '.join(f'.{m.kind}' for m in members))}")
    return _caption(_text(texts[0].blob, where), media)


def _check_one(members: Sequence[Member], where: str) -> None:
    if len(members) > 1:
        raise DataError(
            f"{where}: {_named(members[0].name)} and {_named(members[1].name)} cannot both be "
            f"of one record; a record's members share their name up to its first dot, and no other record's have it"
        )


def _with_media(values: dict[str, Any], members: Iterable[Member], media: dict[str, Any]) -> dict[str, Any]:
    """The JSON's values with members in the place of their names, or added under `images` and `videos`."""
    names = {normalize("NFC", name): m.blob for m in members for name in (m.kind, m.last, m.name)}
    named = {key: _resolved(values[key], names) for key in _MEDIA_KEYS if values.get(key)}
    added = {key: blobs for key, blobs in media.items() if blobs and not (named.keys() & {key, key.removesuffix("s")})}
    return {**values, **named, **added}


def _resolved(value: Any, names: dict[str, Blob]) -> Any:
    if isinstance(value, list):
        return [_resolved(item, names) for item in value]
    return names.get(normalize("NFC", value), value) if isinstance(value, str) else value


def _caption(text: str, media: dict[str, Any]) -> dict[str, Any]:
    question = "<image>" * len(media["images"]) + "<video>" * len(media["videos"])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text.strip()}]
    return {"messages": messages, **{key: blobs for key, blobs in media.items() if blobs}}


def _text(blob: Blob, where: str) -> str:
    try:
        return _small(blob, where).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {_named(blob.name)} is not UTF-8: {error.reason} at byte {error.start}") from None


def _named(name: str) -> str:
    return one_line(name, 120)


def _small(blob: Blob, where: str) -> bytes:
    if blob.size > LONGEST_LINE:
        raise DataError(f"{where}: {_named(blob.name)} has more than {LONGEST_LINE >> 20} MiB")
    return blob.read()
