"""The chat page: files without a build step, that a server sends as they are.

The page speaks OpenAI's protocol as any client does (`v1/models`, `v1/chat/completions`) and asks nothing of another
origin. Its addresses are relative, so it also works below a prefix of a proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Final, NamedTuple

TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# What a model answers is text that anyone may have shaped. The page makes no HTML of it; should that ever fail, the
# browser still runs no script but ours, loads nothing from elsewhere and refuses strings as markup.
POLICY: Final = (
    "default-src 'self'; img-src 'self' blob: data:; media-src blob: data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a newer server never meets an older page
}


class PageFile(NamedTuple):
    """A file as it is sent."""

    content: bytes
    content_type: str
    headers: Mapping[str, str]


def page_file(path: str) -> PageFile | None:
    """The file at a request's path, which is "/" or "/page/NAME"; None for every other path.

    Nobody needs a key for these files: they hold nothing of a user or of a model.
    """
    return _all_files().get(path)


@cache
def _all_files() -> dict[str, PageFile]:
    """Every file by its path. Paths that are asked are only looked up here: none is made of a user's text."""
    sent = {}
    for file in files(__name__).iterdir():
        kind = TYPES.get(PurePosixPath(file.name).suffix)
        if kind:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            sent[path] = PageFile(file.read_bytes(), kind, HEADERS)
    return sent
