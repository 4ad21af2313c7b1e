"""Names of files with accents, which may be spelt with composed characters (NFC) or with separate ones (NFD, macOS)."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import normalize


def on_disk(path: Path) -> Path | None:
    """The path as it is spelt on the disk; None where there is nothing under any spelling."""
    text = str(path)
    others = () if text.isascii() else (normalize("NFC", text), normalize("NFD", text))
    for spelling in dict.fromkeys((text, *others)):
        if os.path.exists(spelling):
            return Path(spelling)
    return None
