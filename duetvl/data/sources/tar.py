"""Tar shards in the manner of WebDataset: members with one key, side by side, make one record.

The key of a member is its name up to the first dot of its last part; what follows is its kind. A `.json` holds the
record's values. Pictures and videos join them as `Blob`s, which are read where they are decoded: in the place of
their names where the JSON names them, or else under `images` and `videos` in the order in which they lie. Without
JSON, a text (`.txt`, `.caption`) is the answer to its pictures and videos.

Names may have dots of their own, as in `v1.0_0001.jpg`. Where neighbours of one key are records of their own by their
names up to the last dot, these names are the keys.
"""

from __future__ import annotations

import io
import tarfile
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple
from unicodedata import normalize

import numpy as np

from duetvl.core.errors import DataError, one_line, shown
from duetvl.data.sources.blob import Blob
from duetvl.data.sources.json_files import kind_of, parse_json
from duetvl.data.sources.records import LONGEST_LINE, Places, Reading, Record

IMAGES: Final = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "tga",
    "jp2", "avif", "heic", "heif",
})  # fmt: skip
VIDEOS: Final = frozenset({
    "mp4", "mkv", "mov", "avi", "webm", "m4v", "mpg", "mpeg", "flv", "wmv", "3gp", "ts", "mts", "m2ts", "ogv",
})  # fmt: skip
_TEXTS: Final = ("txt", "text", "caption")
_LISTS: Final = {"images": ("images", "image"), "videos": ("videos", "video")}  # where a record lists its media
_SOURCES: Final = ("images", "image", "image_url", "videos", "video", "video_url", "url", "path")  # name a medium
_LAYOUTS: Final = (
    "messages", "conversations", "instruction", "prompt", "question", "query", "output", "response", "completion",
    "answer", "chosen", "rejected",
)  # fmt: skip
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
        for _, group in groupby(_members(self.path), key=lambda member: member.key):
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
            raise DataError(f"{self.path}: has no member at byte {at}; it has changed since it was indexed")
        members = list(chain(*runs[: _runs_of_record(runs)]))
        key = members[0].key if len({member.stem for member in members}) > 1 else members[0].stem or members[0].key
        where = f"{self.path}: {_named(key)}"
        return Record(self.path, number, where, _values(members, where, self.reading), self.reading, name=key)


def _runs_of_record(runs: Sequence[Sequence[Member]]) -> int:
    """How many of the runs, which have one key and a stem each, make up the first record: one, or all of them.

    The first two decide, so that a record is the same from wherever its shard is read.
    """
    apart = all(map(_is_whole, runs[:2])) or any(map(_has_all, runs[:2]))
    return 1 if apart else len(runs)


def _is_whole(run: Sequence[Member]) -> bool:
    """Whether members with one stem are a record by themselves: a JSON file, or a text with its pictures."""
    documents, texts = _of(run, ("json",)), _of(run, _TEXTS)
    return len(documents) == 1 if documents else len(texts) == 1 and _has_media(run)


def _has_all(run: Sequence[Member]) -> bool:
    """Whether they are one with media of its own under a name with more dots, which no neighbour can add to."""
    return run[0].stem != run[0].key and _is_whole(run) and _has_media(run)


def _has_media(run: Sequence[Member]) -> bool:
    return bool(_of(run, IMAGES | VIDEOS))


def _of(members: Sequence[Member], suffixes: Container[str]) -> list[Member]:
    return [member for member in members if member.suffix in suffixes]


def _members(path: Path, start: int | None = None) -> Iterator[Member]:
    """What a tar file holds, but for directories and hidden files (WebDataset leaves them out too); with `start` from
    this header on.

    Raises DataError where it is damaged or cut off. Reading the whole of it warns of a missing end.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        for info in _headers(file, path, start or 0, warn=start is None):
            if info.offset_data + info.size > size:
                raise DataError(f"{path}: ends inside of {_named(info.name)}; the file is cut off")
            if not info.isdir() and not info.name.rpartition("/")[2].startswith("."):
                blob = Blob(str(path), info.offset_data, info.size, info.name)
                yield Member(info.name, info.offset, blob, _fault(info))


def _headers(file: BinaryIO, path: Path, at: int, *, warn: bool) -> Iterator[tarfile.TarInfo]:
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
            if warn and not closed:
                warnings.warn(
                    f"{path}: ends after a complete member but without the blocks that close a tar file; if the file "
                    "was truncated, records are missing",
                    stacklevel=2,
                )
            return
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


def _values(members: Sequence[Member], where: str, reading: Reading) -> dict[str, Any]:
    """The values of a record from its members. Raises DataError where they cannot be of one record, or be read."""
    for member in members:
        if member.fault:
            raise DataError(f"{where}: {_named(member.name)} {member.fault}")
    documents, texts = _of(members, ("json",)), _of(members, _TEXTS)
    _check_one(documents or texts, where)
    for _, same in groupby(sorted(members, key=lambda member: member.kind), key=lambda member: member.kind):
        _check_one(list(same), where)
    if documents:
        values = parse_json(_small(documents[0].blob, where), f"{where}.json")
        if not isinstance(values, dict):
            raise DataError(f"{where}.json: expected an object, found {kind_of(values)}")
        about_only = texts and not reading.columns and values.keys().isdisjoint(_LAYOUTS)
        if not about_only:  # as img2dataset writes beside a caption: width, height, url
            return _with_media(values, members, where, reading)
        _check_one(texts, where)
    media = _media(members)
    if not texts or not any(media.values()):
        missing = "a .json, or a .txt and its pictures or videos"
        raise DataError(f"{where}: needs {missing}; found {_named(', '.join(f'.{m.kind}' for m in members))}")
    return _caption(_text(texts[0].blob, where), media)


def _media(members: Sequence[Member]) -> dict[str, list[Blob]]:
    return {"images": [m.blob for m in _of(members, IMAGES)], "videos": [m.blob for m in _of(members, VIDEOS)]}


def _check_one(members: Sequence[Member], where: str) -> None:
    if len(members) > 1:
        raise DataError(
            f"{where}: {_named(members[0].name)} and {_named(members[1].name)} cannot both belong to one record; a "
            "record's members share their name up to its first dot, and no other record's have it"
        )


def _with_media(values: dict[str, Any], members: Sequence[Member], where: str, reading: Reading) -> dict[str, Any]:
    """The JSON's values with members in the place of their names; where none is named, added under `images` and
    `videos`. Raises DataError where others are named than there are."""
    renamed = {column: (reading.columns[column],) for column in _LISTS if reading.columns.get(column)}
    lists = {**_LISTS, **renamed}
    names = {normalize("NFC", name): m.blob for m in members for name in (m.kind, m.last, m.name)}
    resolver = _Resolver(names, {*_SOURCES, *chain(*renamed.values())})
    try:
        found = resolver.resolved(values)
    except RecursionError:
        raise DataError(f"{where}.json: nested too deeply") from None
    for column, blobs in _media(members).items():
        named = [key for key in lists[column] if found.get(key)]
        if not blobs or not resolver.used.isdisjoint(blobs):
            continue
        if not named:
            found[lists[column][0]] = blobs
        elif any(isinstance(source, str) for source in _flat(found[named[0]])):
            raise DataError(
                f"{where}: {named[0]} names {shown(found[named[0]])}, which is none of its members "
                f"({_named(', '.join(m.last for m in members))}); name these, or leave {named[0]} out"
            )
    return found


class _Resolver:
    """Puts members in the place of their names, under the keys that name media; `used` are those that were named."""

    def __init__(self, names: Mapping[str, Blob], keys: Container[str]) -> None:
        self._names, self._keys = names, keys
        self.used: set[Blob] = set()

    def resolved(self, value: Any, *, medium: bool = False) -> Any:
        """The value; `medium`: a text in it names a medium."""
        if isinstance(value, list):
            return [self.resolved(item, medium=medium) for item in value]
        if isinstance(value, dict):
            typed = value.get("type") in ("image", "video")
            return {k: self.resolved(v, medium=k in self._keys or (typed and k == "value")) for k, v in value.items()}
        blob = self._blob(value) if medium and isinstance(value, str) else None
        if blob is None:
            return value
        self.used.add(blob)
        return blob

    def _blob(self, name: str) -> Blob | None:
        """A member by its name, or by the last part of the path that it had before it was packed."""
        name = normalize("NFC", name).replace("\\", "/").removeprefix("./")
        return self._names.get(name) or self._names.get(name.rpartition("/")[2])


def _flat(value: Any) -> Iterator[Any]:
    """The items of lists within lists."""
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


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
