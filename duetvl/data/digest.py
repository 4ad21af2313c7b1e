"""What tells one prompt from another: its content, of media in files their name, size and time."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from duetvl.data.conversation import Conversation, ImagePart, VideoPart


def digest(conversation: Conversation, way: str) -> str:
    """32 digits that change when what is asked does, or how it is answered (`way`)."""
    parts = [_told(part) for turn in conversation.turns for part in (turn.role, *turn.parts)]
    return digest_of([way, [parts, list(conversation.tools)]])


def digest_of(content: Any) -> str:
    """32 digits of what can be written as JSON; whatever cannot is written as Python does."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _told(part: Any) -> Any:
    """A part of a turn by its content: text as it is, of a file its name, size and time."""
    if isinstance(part, ImagePart | VideoPart):
        sources = part.source if isinstance(part.source, list | tuple) else [part.source]
        rest = [
            type(part).__name__,
            *(str(value) for name, value in vars(part).items() if name not in ("source", "root")),
        ]
        return [rest, *map(_source, sources)]
    return part if isinstance(part, str) else repr(part)


def _source(source: Any) -> Any:
    if isinstance(source, str | Path):
        try:
            found = os.stat(str(source).removeprefix("file://"))
        except (OSError, ValueError):
            return hashlib.sha256(str(source).encode()).hexdigest()
        return [str(source), found.st_size, found.st_mtime_ns]
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else repr(source)
