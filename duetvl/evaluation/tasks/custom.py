"""A user's own benchmark: which columns mean what, the words it is asked in, and a metric, in a small YAML file."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from duetvl.core.errors import ConfigError, DataError, did_you_mean, first_line, shown
from duetvl.data.conversation import Part
from duetvl.data.sources.records import describe_os_error
from duetvl.evaluation.media import find_medium
from duetvl.evaluation.metrics import METRICS
from duetvl.evaluation.profiles import PROFILES, Profile
from duetvl.evaluation.question import Question, Questions, Score
from duetvl.evaluation.rows import RecordRows, Row, Rows
from duetvl.evaluation.tasks.tsv_task import choice_score, no_truth, one_turn, scored_by
from duetvl.evaluation.tsv import TsvRows

_OWN_FIELDS: Final = ("question", "hint", "options")  # of a prompt, whatever the columns are called


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(_Strict):
    """Names of columns (TSV, Parquet) or keys (JSON, JSONL). What is None is not there.

    `options` are several columns, or one that holds a list. The answer to a choice is a letter, or an option's text.
    """

    question: str = "question"
    answer: str = "answer"
    id: str | None = None
    image: str | None = None
    video: str | None = None
    hint: str | None = None
    options: str | tuple[str, ...] | None = None


class TaskFile(_Strict):
    """What stands in the YAML file.

    prompt: a template with `{question}`, `{hint}`, `{options}` (a line each) and `{column}`s; None for the profile's.
    metric: of open answers. groups: columns that scores are also given by. cluster: the column that says which
    questions are not independent; None for the picture or video.
    """

    name: str
    columns: Columns = Columns()
    prompt: str | None = None
    metric: Literal["exact_match", "relaxed_accuracy", "anls", "vqa_accuracy"] = "exact_match"
    groups: tuple[str, ...] = ()
    cluster: str | None = None


@dataclass(frozen=True)
class CustomTask:
    """A benchmark that a `TaskFile` describes."""

    file: TaskFile
    profiles: tuple[str, ...] = tuple(PROFILES)

    @property
    def name(self) -> str:
        """See `Task`."""
        return self.file.name

    @property
    def groups(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.file.groups

    def questions(self, path: Path, profile: Profile) -> Questions:
        """See `Task`. `path` is a TSV, JSON, JSONL or Parquet file."""
        columns = self.file.columns
        rows: Rows
        if path.suffix == ".tsv":
            rows = TsvRows(path, (columns.question, columns.answer), image=columns.image, index=columns.id)
        else:
            rows = RecordRows(path, image=columns.image, index=columns.id)
        _check(rows, path, self.file)
        return Questions(len(rows), lambda number: self._question(rows, number, path.parent, profile))

    def score(self, question: Question, answer: str, profile: Profile) -> Score:
        """See `Task`."""
        rule = choice_score if question.kind == "choice" else scored_by(METRICS[self.file.metric])
        return rule(question, answer, profile)

    def _question(self, rows: Rows, number: int, folder: Path, profile: Profile) -> Question:
        row, columns = rows[number], self.file.columns
        options = _options(row, columns.options)
        truths = _truths(row, columns.answer, options)
        video = row.text(columns.video) if columns.video else ""
        media: list[Part] = []
        problem = no_truth(truths, options)
        try:
            media = [profile.picture(picture) for picture in rows.pictures(number)]
            if columns.video:
                media.append(profile.clip(find_medium(video, (folder, Path()))))
        except DataError as error:
            problem = str(error)
        return Question(
            index=number,
            id=row.id,
            kind="choice" if options else "open",
            conversation=one_turn((*media, self._prompt(row, options, profile))),
            truths=truths,
            options=options,
            groups={name: row.text(name) for name in self.file.groups if name in row.cells},
            cluster=row.text(self.file.cluster or "") or video or row.cluster,  # the picture's own is no cell
            problem=problem,
        )

    def _prompt(self, row: Row, options: Mapping[str, str], profile: Profile) -> str:
        columns = self.file.columns
        question, hint = row.text(columns.question), row.text(columns.hint) if columns.hint else ""
        if self.file.prompt is None:
            return profile.choice(question, options, hint) if options else question + profile.open_suffix
        lines = "".join(f"{letter}. {text}\n" for letter, text in options.items())
        own = {"question": question, "hint": hint, "options": lines}
        texts = {name: own.get(name, row.text(name)) for name in _fields(self.file.prompt)}
        return self.file.prompt.format(**texts)


def _options(row: Row, columns: str | tuple[str, ...] | None) -> dict[str, str]:
    if columns is None:
        return {}
    texts = row.texts(columns) if isinstance(columns, str) else tuple(row.text(name) for name in columns)
    return {letter: text for letter, text in zip(string.ascii_uppercase, texts, strict=False) if text}


def _truths(row: Row, column: str, options: Mapping[str, str]) -> tuple[str, ...]:
    if not options:
        return row.texts(column)
    answer = row.text(column)
    letters = [letter for letter, text in options.items() if text == answer]
    return (letters[0],) if answer not in options and len(letters) == 1 else (answer,)


def _check(rows: Rows, path: Path, file: TaskFile) -> None:
    """Raise DataError where the data lack a column that the file names."""
    columns = file.columns
    options = (columns.options,) if isinstance(columns.options, str) else columns.options or ()
    single = (columns.question, columns.answer, columns.id, columns.image, columns.video, columns.hint, file.cluster)
    fields = [name for name in _fields(file.prompt or "") if name not in _OWN_FIELDS]
    for name in (*single, *options, *file.groups, *fields):
        if name is not None and name not in rows.columns:
            raise DataError(f"{path}: has no column {shown(name)} for {file.name}{did_you_mean(name, rows.columns)}")


def _fields(prompt: str) -> list[str]:
    """The names in braces. Raises ValueError for a template that is none."""
    return [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]


def read_task(path: Path) -> CustomTask:
    """The task that a YAML file describes. Raises ConfigError for what it has wrong, with the nearest name."""
    try:
        values: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(str(describe_os_error(path, error))) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields ({', '.join(TaskFile.model_fields)}), found {shown(values)}")
    try:
        file = TaskFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    _check_prompt(file.prompt or "", path)
    return CustomTask(file)


def _one_line(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in problem["loc"] if part in (*TaskFile.model_fields, *Columns.model_fields))
    if problem["type"] == "extra_forbidden":
        known = Columns.model_fields if problem["loc"][0] == "columns" else TaskFile.model_fields
        return f"no field {str(problem['loc'][-1])!r}{did_you_mean(str(problem['loc'][-1]), known)}"
    return f"{name}: {problem['msg']}; found {shown(problem['input'])}"


def _check_prompt(prompt: str, path: Path) -> None:
    try:
        fields = _fields(prompt)
    except ValueError as error:
        raise ConfigError(f"{path}: prompt: {error}; write a literal brace twice") from None
    for name in fields:
        if not name.isidentifier() and not name.replace("-", "_").isidentifier():
            raise ConfigError(f"{path}: prompt: {{{name}}} is not a column's name")
