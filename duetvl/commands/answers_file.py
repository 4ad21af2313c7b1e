"""Answers on disk, such that nothing is asked twice: JSON Lines in the order of what was asked.

While answers come in, in whatever order, each is appended to OUT.part beside OUT, by the key of what was asked. At the
end OUT appears whole, and OUT.part goes. What either holds for a key is not asked again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.storage.files import write_text
from duetvl.storage.locks import file_lock

Row = Mapping[str, Any]


class AnswersFile:
    """The answers to some asks, each known by its key; what failed is no answer, and is asked again."""

    def __init__(self, path: Path, keys: Sequence[str]):
        """Read what there is. ConfigError where OUT holds something else than answers to these asks."""
        self.path, self.keys = path, keys
        self.part = path.with_name(f"{path.name}.part")
        wanted = set(keys)
        before = dict(_rows(path))
        if strange := [key for key, row in before.items() if key not in wanted and "error" not in row]:
            what = f"{len(strange)} of its lines are answers to other questions, or made in another way"
            raise ConfigError(f"-o {path}: exists already, and {what}; choose another name, or move it away")
        part = dict(_rows(self.part))
        if not wanted & part.keys() and any("error" not in row for row in part.values()):
            raise ConfigError(
                f"-o {path}: {self.part.name} beside it holds {len(part)} answers to other questions, or made in "
                f"another way; choose another name, or move it away"
            )
        self._cut_off = _complete(self.part)
        self.known: dict[str, Row] = {**before, **{key: row for key, row in part.items() if key in wanted}}

    def missing(self) -> Iterator[int]:
        """Numbers of the asks that are to be answered, equal ones once; those that failed are asked again."""
        seen: set[str] = set()
        for number, key in enumerate(self.keys):
            if key not in seen and self.known.get(key, {"error": ""}).get("error") is not None:
                seen.add(key)
                yield number

    def adder(self) -> Callable[[str, Row], None]:
        """A function that takes an ask's key and its answer; what it has taken survives a kill."""
        if self.part.exists():
            os.truncate(self.part, self._cut_off)

        def add(key: str, row: Row) -> None:
            self.known[key] = row
            try:
                with open(self.part, "a", encoding="utf-8") as handle:
                    handle.write(_line({**row, "key": key}))
            except OSError as error:  # a full disk does not know the name of the file
                raise OSError(error.errno, error.strerror, str(self.part)) from error

        return add

    def finish(self, ids: Iterable[str]) -> None:
        """Write OUT, a line for each ask, named by `ids`."""
        rows = ({**self.known[key], "id": id, "key": key} for id, key in zip(ids, self.keys, strict=True))
        write_text(self.path, "".join(map(_line, rows)))
        self.part.unlink(missing_ok=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing these answers. ConfigError where one does."""
    try:
        with file_lock(path.with_name(f".{path.name}.lock")):
            yield
    except BlockingIOError:
        raise ConfigError(
            f"-o {path}: another process is writing it; wait for its end, or choose another name"
        ) from None


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(key, row) of every complete line. ConfigError for a file of something else."""
    if not path.exists():
        return
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith(b"\n"):
                return  # cut off by a kill
            try:
                row = json.loads(line)
                yield row["key"], row
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"{path}:{number}: exists already, and is no answer of duetvl infer; choose another name"
                ) from None


def _complete(path: Path) -> int:
    """Bytes of the complete lines."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
