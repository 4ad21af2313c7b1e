"""Answers on disk, such that nothing is asked twice: JSON Lines in the order of what was asked.

While answers come in, in whatever order, each is appended to OUT.part beside OUT, by the key of what was asked. At the
end OUT appears whole, and OUT.part goes. What either holds for a key is not asked again. Several processes that answer
a part each append to files of their own, OUT.part1, OUT.part2, ..., which are read like OUT.part.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from duetvl.core.errors import ConfigError
from duetvl.storage.files import write_text
from duetvl.storage.locks import file_lock

Row = Mapping[str, Any]
Add = Callable[[str, Row], None]
_SYNC_SECONDS: Final = 1.0


class AnswersFile:
    """The answers to some asks, each known by its key; what failed is no answer, and is asked again."""

    def __init__(
        self, path: Path, keys: Sequence[str], *, command: str = "infer", keep: Callable[[Row], bool] | None = None
    ):
        """Read what there is. ConfigError where OUT holds something else than answers to these asks.

        `keep` says of an answer to another ask that it belongs here as well and stays. `command` wrote OUT.
        """
        self.path, self.keys, self.command = path, keys, command
        self.part = path.with_name(f"{path.name}.part")
        self._wanted, self._keep = set(keys), keep or (lambda row: False)
        before, part = dict(self._rows(path)), self._part_rows()
        made = "answers to other questions, or made in another way; choose another name, or move it away"
        if strange := len(_answers(before)) - len(_answers(self._own(before))):
            raise ConfigError(f"-o {path}: exists already, and {strange} of its lines are {made}")
        if _answers(part) and not self._own(part):
            raise ConfigError(f"-o {path}: {self.part.name} beside it holds {len(part)} {made}")
        self.known: dict[str, Row] = self._own({**before, **part})

    def missing(self) -> Iterator[int]:
        """Numbers of the asks that are to be answered, equal ones once; those that failed are asked again."""
        seen: set[str] = set()
        for number, key in enumerate(self.keys):
            if key not in seen and self.known.get(key, {"error": ""}).get("error") is not None:
                seen.add(key)
                yield number

    @contextmanager
    def adding(self, process: int = 0) -> Iterator[Add]:
        """A function that takes an ask's key and its answer, for the process of this number.

        What it has taken survives a kill of the process; every second, and at the end, it is forced to disk. OSError
        names the file.
        """
        part = self.part.with_name(f"{self.part.name}{process or ''}")
        with closing(_Appended(part)) as file:

            def add(key: str, row: Row) -> None:
                self.known[key] = row
                file.append(_line({**row, "key": key}).encode())

            yield add

    def read_again(self) -> None:
        """Take what other processes have added."""
        self.known |= self._own(self._part_rows())

    def finish(self, ids: Iterable[str]) -> None:
        """Write OUT, a line for each ask that has an answer, named by `ids`, then those that stay."""
        named = ((key, id) for id, key in zip(ids, self.keys, strict=True) if key in self.known)
        rows = [{**self.known[key], "id": id, "key": key} for key, id in named]
        others = [{**row, "key": key} for key, row in self.known.items() if key not in self._wanted]
        write_text(self.path, "".join(map(_line, [*rows, *others])))
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _own(self, rows: Mapping[str, Row]) -> dict[str, Row]:
        """Those that answer these asks, or belong here as well."""
        return {key: row for key, row in rows.items() if key in self._wanted or self._keep(row)}

    def _parts(self) -> list[Path]:
        """The files of unfinished answers, of however many processes."""
        files = self.part.parent.glob(f"{glob.escape(self.part.name)}*")
        return sorted(file for file in files if file.name.removeprefix(self.part.name).isdigit() or file == self.part)

    def _part_rows(self) -> dict[str, Row]:
        return {key: row for part in self._parts() for key, row in self._rows(part)}

    def _rows(self, path: Path) -> Iterator[tuple[str, Row]]:
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
                    what = f"exists already, and is not an answer of duetvl {self.command}; choose another name"
                    raise ConfigError(f"{path}:{number}: {what}") from None


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


class _Appended:
    """A file of lines that outlives kills: a last line that one has cut off is removed. OSError names the file."""

    def __init__(self, path: Path):
        self._path, self._synced = path, time.monotonic()
        self._file: BinaryIO | Any = open(path, "ab", buffering=0)  # noqa: SIM115  closed by `close`
        self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def append(self, content: bytes) -> None:
        """Add a line; once a second what has come is forced to disk."""
        try:
            while content:  # a disk that fills up takes a part
                content = content[self._file.write(content) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:  # a full disk does not know the name of the file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Force what has come to disk."""
        with self._file:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _answers(rows: Mapping[str, Row]) -> list[Row]:
    """Rows that are no failures."""
    return [row for row in rows.values() if "error" not in row]


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
