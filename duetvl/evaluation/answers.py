"""The answers of a run on disk: answers.jsonl in its own directory, where no question is asked twice.

run.json       what was asked, of which model, and how: another run does not fit into the directory
answers.jsonl  a line for each question, by its place in the data; the model is not needed again to score them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError, DataError, shown
from duetvl.data.digest import digest
from duetvl.evaluation.profiles import Profile
from duetvl.evaluation.question import Question, Questions, Task
from duetvl.storage.answers_file import AnswersFile, Row
from duetvl.storage.files import json_value, read_object, write_text
from duetvl.version import __version__

RUN: Final = "run.json"
ANSWERS: Final = "answers.jsonl"
TABLES: Final = (".json", ".jsonl", ".tsv", ".csv", ".yaml", ".yml")
DIRECTORIES: Final = ("", "Eval_QA", "answer")  # of a directory of data, where its tables lie
_CHUNK: Final = 2**22


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked: the first `count` questions of a data set, in a profile. `way`: how answers are made, as text."""

    task: Task
    profile: Profile
    questions: Questions
    count: int
    way: str = ""

    def __iter__(self) -> Iterator[Question]:
        """The questions, one after the other: their pictures need not fit into memory together."""
        return (self.questions[number] for number in range(self.count))


class RunAnswers:
    """The answers to what is asked, in the directory of a run."""

    def __init__(self, asked: Asked, directory: Path):
        """Read what there is; every question is looked at for it. ConfigError for answers to something else."""
        self.asked = asked
        self.unasked: dict[int, str] = {}  # questions that cannot be asked, and why
        keys: list[str] = []
        self.numbers: list[int] = []
        self.ids: list[str] = []
        for question in asked:
            if question.problem:
                self.unasked[question.index] = question.problem
                continue
            keys.append(digest(question.conversation, f"{asked.way} {question.index}"))
            self.numbers.append(question.index)
            self.ids.append(question.id)
        # A run of more questions has been here: its answers stay for the day when it goes on.
        self.file = AnswersFile(directory / ANSWERS, keys, command="eval", keep=lambda row: _place(row) >= asked.count)
        self._keys = dict(zip(self.numbers, keys, strict=True))

    def missing(self, process: int = 0, processes: int = 1) -> list[int]:
        """Indices of the questions that a process has to ask: of rows process, process + processes, ..."""
        return [number for place in self.file.missing() if (number := self.numbers[place]) % processes == process]

    def add(self, add: Callable[[str, Row], None], number: int, row: Row) -> None:
        """Keep an answer. Of equal questions each is asked for itself."""
        add(self._keys[number], {"index": number, **row})

    def rows(self) -> dict[int, Row]:
        """The answers that are here, by index."""
        known = ((number, self.file.known.get(key)) for number, key in self._keys.items())
        return {number: row for number, row in known if row is not None}

    def finish(self) -> None:
        """Write answers.jsonl, sorted by index."""
        self.file.finish(self.ids)


def read_answers(directory: Path) -> dict[int, Row]:
    """The answers of a run, by index; the model is not needed. ConfigError where there are none."""
    file = directory / ANSWERS
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: no answers of a run: {error.strerror or error}") from None
    rows: dict[int, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json_value(line)
            rows[int(row["index"])] = row
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file}:{number}: is not an answer of duetvl eval") from None
    return rows


def _place(row: Row) -> int:
    index = row.get("index")
    return index if isinstance(index, int) else -1


# -- run.json --------------------------------------------------------------------------------------------------------


def open_run(directory: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a run's answers depend on (`settings`), and what else is to be known (`about`).

    Gives what was written.
    ConfigError where the directory holds a run that asked something else: nothing is written over.
    """
    plain = _plain(settings)
    if (directory / RUN).exists():
        before = read_run(directory)["settings"]
        name = next((name for name in {**before, **plain} if before.get(name) != plain.get(name)), None)
        if name is not None:
            raise ConfigError(
                f"-o {directory}: holds a run with {name} {shown(before.get(name))}, and this one has "
                f"{shown(plain.get(name))}; give each run a directory of its own"
            )
    directory.mkdir(parents=True, exist_ok=True)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {"settings": plain, "about": {**_plain(about), "duetvl": __version__, "started": started}}
    write_text(directory / RUN, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return content


def read_run(directory: Path) -> dict[str, Any]:
    """What a run asked, as `open_run` wrote it. ConfigError where the directory is none of a run."""
    if not (directory / RUN).is_file():
        raise ConfigError(f"{directory}: is not a directory of duetvl eval: it has no {RUN}")
    run = read_object(directory / RUN, ConfigError)
    if not all(isinstance(run.get(name), dict) for name in ("settings", "about")):
        raise ConfigError(f"{directory / RUN}: is not what duetvl eval writes: it lacks settings or about")
    return run


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON, to be compared with those of a file."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def data_md5(path: Path) -> str:
    """MD5 of a data file, by which benchmarks name theirs; of a directory that of its tables' names and contents.

    DataError where it cannot be read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    try:
        if path.is_file():
            return _md5(path)
        places = [place for name in DIRECTORIES for place in (path / name).glob("*")]
        tables = sorted(file for file in places if file.suffix in TABLES and file.is_file())
        told = "".join(f"{file.relative_to(path)} {_md5(file)}\n" for file in tables)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from None
    return hashlib.md5(told.encode(), usedforsecurity=False).hexdigest()


def _md5(file: Path) -> str:
    content = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()
