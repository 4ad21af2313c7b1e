"""Calls of functions found in an answer's text while it grows, in the layout that training writes them in."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=_new_id)


class CallReader:
    """Divides an answer into text and calls. What looks like a call and is none stays text: nothing is lost.

    Blanks before a call are left out. A call is handed out when it is complete.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False

    def take(self, text: str) -> list[str | Call]:
        """What the next characters complete."""
        self._held += text
        complete: list[str | Call] = []
        while True:
            before, mark, after = self._held.partition(CLOSE if self._inside else OPEN)
            if not mark:
                break
            self._held = after
            complete.append(_call(before, CLOSE) if self._inside else before.rstrip())
            self._inside = not self._inside
        if not self._inside:
            # Characters at the end may belong to a call: the beginning of its mark, and blanks.
            begun = next(n for n in range(len(OPEN) - 1, -1, -1) if self._held.endswith(OPEN[:n]))
            content = self._held[: len(self._held) - begun].rstrip()
            complete.append(content)
            self._held = self._held[len(content) :]
        return [piece for piece in complete if piece != ""]

    def finish(self) -> list[str | Call]:
        """What is held back: nothing more comes. A call whose end mark was the stop string is complete."""
        held, self._held = self._held, ""
        last = _call(held, "") if self._inside else held
        return [last] if last != "" else []


def _call(text: str, end: str) -> str | Call:
    """The call that stands between the marks, or the text itself."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        arguments = value.get("arguments", {})
        if isinstance(arguments, dict):
            return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
    return f"{OPEN}{text}{end}"
