"""Names of files as others spell them: accents of macOS, backslashes of Windows, URIs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from unicodedata import normalize
from urllib.parse import unquote

_FILE_URI: Final = re.compile(r"file:(?://(?:localhost(?=/))?)?", re.IGNORECASE)


def on_disk(path: Path) -> Path | None:
    """The path as it is spelt on the disk; None where there is nothing under any spelling.

    Accents may be one character (NFC) or two (NFD, macOS), in each part otherwise, and the parts be divided as on
    Windows.
    """
    text = str(path)
    if os.path.exists(text):
        return path
    if not text.isascii() and (found := _composed_otherwise(path)) is not None:
        return found
    return on_disk(Path(text.replace("\\", "/"))) if "\\" in text else None


def spellings(text: str) -> Iterable[str]:
    """The text as it is, and with accents as one character and as two."""
    return dict.fromkeys((text, normalize("NFC", text), normalize("NFD", text)))


def _composed_otherwise(path: Path) -> Path | None:
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        there = next((found / name for name in spellings(part) if os.path.exists(found / name)), None)
        if there is None:
            return None
        found = there
    return found


def without_scheme(text: str) -> str:
    """The path of a `file:` URI, in which `%20` is a space unless there is a file of that very name; others as is."""
    path, changed = _FILE_URI.subn("", text, count=1) if text[:5].lower() == "file:" else (text, 0)
    return unquote(path) if changed and "%" in path and not os.path.exists(path) else path
