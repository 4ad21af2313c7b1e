"""Names of files as others spell them: accents of macOS, backslashes of Windows, URIs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from unicodedata import normalize
from urllib.parse import unquote

_FILE_URI: Final = re.compile(r"file:(?://(?:localhost(?=/))?)?", re.IGNORECASE)


def on_disk(path: Path) -> Path | None:
    """The path as it is spelt on the disk; None where there is nothing under any spelling.

    Accents may be one character (NFC) or two (NFD, macOS), and directories be divided as on Windows.
    """
    text = str(path)
    others = () if text.isascii() else (normalize("NFC", text), normalize("NFD", text))
    windows = (text.replace("\\", "/"),) if "\\" in text else ()
    for spelling in dict.fromkeys((text, *others, *windows)):
        if os.path.exists(spelling):
            return Path(spelling)
    return None


def without_scheme(text: str) -> str:
    """The path of a `file:` URI, in which `%20` is a space unless there is a file of that very name; others as is."""
    path, changed = _FILE_URI.subn("", text, count=1) if text[:5].lower() == "file:" else (text, 0)
    return unquote(path) if changed and "%" in path and not os.path.exists(path) else path
