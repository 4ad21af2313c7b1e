"""Pictures and videos that requests name: read as far as the server's policy lets, and looked at before any decoding.

What a file is, its bytes say: neither its name nor the type that somebody writes before it is believed. Files that can
lead a decoder to other files (playlists, drawings, PostScript) are no pictures or videos here.
"""

from __future__ import annotations

import base64
import re
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

import av

from duetvl.core.errors import ConfigError, DataError, first_line, shown
from duetvl.data.media.images import describe, image_size
from duetvl.data.media.kinds import LONGEST_HEAD, what_it_is
from duetvl.data.media.video_index import opened, read_index
from duetvl.serving.errors import ServerError
from duetvl.serving.fetching import Fetcher, MayConnect, Resolve, addresses_of, is_public, too_large

Kind = Literal["image", "video"]

_MOST_PIXELS: Final = 178_956_970  # where Pillow itself refuses a picture
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PICTURES: Final = ((0, b"\xff\xd8\xff"), (0, b"\x89PNG\r\n\x1a\n"), (0, b"GIF8"), (8, b"WEBP"), (0, b"BM"),
                    (0, b"II*\0"), (0, b"MM\0*"))  # fmt: skip
_VIDEOS: Final = (*((4, kind) for kind in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
                  (0, b"\x1aE\xdf\xa3"), (8, b"AVI "), (0, b"FLV\1"), (0, b"\0\0\1\xba"))  # fmt: skip
_MAGIC: Final = {"image": _PICTURES, "video": _VIDEOS}
_LONGEST_PATH: Final = 4096
_PIECE: Final = 1 << 18  # letters of base64
_PACKET: Final = 188  # bytes of a packet of an MPEG transport stream, each of which begins with a G


@dataclass(frozen=True)
class MediaPolicy:
    """What requests may name, and how large it may be.

    hosts: whose http(s) URLs are fetched, see `fetching.Hosts`; by default none. root: the directory whose files
    `file://` URLs and paths may name; by default none. max_bytes: of one picture or video. max_pixels: of a picture,
    and of a video's frame. max_video_seconds and max_frames: of a video file, however few of them the model is shown.
    max_media: pictures and videos of one request. timeout: seconds in which a URL is to be read. decode_seconds: in
    which one video is to be read and decoded. Raises ConfigError for what makes no sense.
    """

    hosts: tuple[str, ...] = ()
    root: Path | None = None
    max_bytes: int = 64 << 20
    max_pixels: int = 64_000_000
    max_video_seconds: float = 1800.0
    max_frames: int = 108_000
    max_media: int = 16
    timeout: float = 20.0
    decode_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "max_video_seconds", "max_frames", "timeout", "decode_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"media {name} is {shown(getattr(self, name))}, it must be above 0")
        if self.max_media < 0:
            raise ConfigError(f"media max_media is {self.max_media}, it must be 0 (none) or more")
        if self.max_pixels > _MOST_PIXELS:
            raise ConfigError(f"media max_pixels is {self.max_pixels}; Pillow decodes {_MOST_PIXELS} at most")
        if self.root is not None and not self.root.is_dir():
            raise ConfigError(f"media root {self.root} is not a directory")


class Media:
    """Reads what requests name. May be called from any thread, and blocks: call it on none that others wait for.

    resolve, may_connect and tls are those of `fetching.Fetcher`: for servers whose media lie in a network of their own.
    """

    def __init__(
        self,
        policy: MediaPolicy,
        *,
        resolve: Resolve = addresses_of,
        may_connect: MayConnect = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.policy = policy
        self._root = None if policy.root is None else policy.root.resolve()
        self._fetcher = Fetcher(
            policy.hosts,
            max_bytes=policy.max_bytes,
            seconds=policy.timeout,
            resolve=resolve,
            may_connect=may_connect,
            tls=tls,
        )

    def check_count(self, count: int) -> None:
        """Raise ServerError where a request has more pictures and videos than it may."""
        if count > self.policy.max_media:
            raise ServerError(
                f"the request has {count} pictures and videos, this server takes {self.policy.max_media}",
                param="messages",
                code="too_many_media",
            )

    def open(self, url: str, kind: Kind) -> bytes:
        """The bytes of a picture or video: a data: URI, an http(s) URL, a `file://` URL or a path.

        They are of a kind that is decoded here, and within the policy's bounds by their header; a file that is damaged
        further on is found when it is decoded. Raises ServerError naming the URL: 413 for too many bytes, else 400.
        """
        try:
            content = self._read(url, kind)
            self._check(content, kind)
        except ServerError as error:
            raise ServerError(
                f"{describe(url) or 'an empty URL'}: {error}", status=error.status, code=error.code, param="messages"
            ) from None
        return content

    # -- where it is --------------------------------------------------------------------------------------------------

    def _read(self, url: str, kind: Kind) -> bytes:
        found = _SCHEME.match(url)
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            return self._of_data_uri(url, kind)
        if scheme in ("http", "https"):
            return self._fetcher.fetch(url)
        if scheme in ("", "file"):
            return self._of_file(url, scheme)
        raise _bad(f"{shown(scheme, 20)} is not a supported scheme; send the file itself as a data: URI")

    def _of_data_uri(self, url: str, kind: Kind) -> bytes:
        head, comma, body = url.partition(",")
        mime, *parameters = head[len("data:") :].lower().split(";")
        if not comma or parameters[-1:] != ["base64"]:
            raise _bad(f"expected data:{kind}/<type>;base64,<content>")
        if not mime.strip().startswith(f"{kind}/") and mime.strip() != "application/octet-stream":
            raise _bad(f"its type is {shown(mime, 40)}, expected {kind}/...")
        if len(body) // 4 * 3 > self.policy.max_bytes + len(body) // 32:  # line ends are no part of the content
            raise too_large(self.policy.max_bytes)
        return self._sized(_decoded(body))

    def _of_file(self, url: str, scheme: str) -> bytes:
        if self._root is None:
            raise _bad(
                "this server reads no files of its own; send the file itself as a data: URI", "media_not_allowed"
            )
        if len(url) > _LONGEST_PATH:
            raise _bad("the path is too long")
        name = url
        if scheme:
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost"):
                raise _bad("a file:// URL is of no other machine: write file:///path")
            name = unquote(parts.path)
        try:
            path = (self._root / name).resolve(strict=True)
            if not path.is_relative_to(self._root) or not stat.S_ISREG(path.stat().st_mode):
                raise FileNotFoundError
            with path.open("rb") as file:
                return self._sized(file.read(self.policy.max_bytes + 1))
        except (OSError, ValueError, RuntimeError):  # a NUL byte, links in a circle: one answer for all of them
            raise _bad("there is no such file in the directory that this server reads from") from None

    def _sized(self, content: bytes) -> bytes:
        if len(content) > self.policy.max_bytes:
            raise too_large(self.policy.max_bytes)
        if not content:
            raise _bad("is empty (0 bytes)", "invalid_media")
        return content

    # -- what it is ---------------------------------------------------------------------------------------------------

    def _check(self, content: bytes, kind: Kind) -> None:
        _check_kind(content, kind)
        try:
            if kind == "image":
                height, width = image_size(content)
                self._check_pixels("the picture", width, height)
            else:
                self._check_video(content)
        except DataError as error:
            raise _bad(str(error).removeprefix(f"{describe(content)}: "), "invalid_media") from None

    def _check_video(self, content: bytes) -> None:
        with opened(content) as container:  # the header first: one frame may be too large to decode
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    self._check_pixels("a frame of the video", stream.codec_context.width, stream.codec_context.height)
                self._check_length(stream.frames, (container.duration or 0) / av.time_base)
        index = read_index(content, seconds=self.policy.decode_seconds)  # a header may say anything
        self._check_length(len(index), float(index.duration))

    def _check_pixels(self, what: str, width: int, height: int) -> None:
        if width * height > self.policy.max_pixels:
            raise _too_much(
                f"{what} has {width} x {height} pixels, at most {self.policy.max_pixels} are decoded; scale it"
            )

    def _check_length(self, frames: int, seconds: float) -> None:
        policy = self.policy
        if seconds > policy.max_video_seconds:
            raise _too_much(
                f"the video is {seconds:.0f} seconds long, at most {policy.max_video_seconds:g} are taken; cut it"
            )
        if frames > policy.max_frames:
            raise _too_much(f"the video has {frames} frames, at most {policy.max_frames} are taken; cut it")


def _decoded(text: str) -> bytes:
    """What base64 stands for, with or without line ends and padding. Raises ServerError.

    A piece at a time: one call for all of a large picture would keep every other thread waiting, the event loop's too.
    """
    content, rest = bytearray(), ""
    try:
        for start in range(0, len(text), _PIECE):
            piece = rest + "".join(text[start : start + _PIECE].split())
            whole = len(piece) // 4 * 4
            if content and piece and len(content) % 3:  # there was padding before
                raise _bad("is not base64: something follows its padding")
            content += base64.b64decode(piece[:whole], validate=True)
            rest = piece[whole:]
        return bytes(content + base64.b64decode(rest + "=" * (-len(rest) % 4), validate=True))
    except ValueError as error:
        raise _bad(f"is not base64: {first_line(error)}") from None


def _check_kind(content: bytes, kind: Kind) -> None:
    """Raise ServerError for what is of no format that is decoded here."""
    if _is_of(content, kind):
        return
    if kind == "video" and _is_of(content, "image"):
        raise _bad("is a picture: give it as image_url", "invalid_media")
    what = what_it_is(content[:LONGEST_HEAD])
    known = "JPEG, PNG, WebP, GIF, BMP, TIFF" if kind == "image" else "MP4, QuickTime, WebM, Matroska, AVI, FLV, MPEG"
    raise _bad(f"is {what}" if what else f"is not of a supported kind; send one of {known}", "invalid_media")


def _is_of(content: bytes, kind: Kind) -> bool:
    if any(content.startswith(magic, place) for place, magic in _MAGIC[kind]):
        return True
    return kind == "video" and len(content) > _PACKET and content[0] == content[_PACKET] == ord("G")


def _bad(words: str, code: str = "invalid_media_url") -> ServerError:
    return ServerError(words, code=code)


def _too_much(words: str) -> ServerError:
    return ServerError(words, code="media_too_large")
