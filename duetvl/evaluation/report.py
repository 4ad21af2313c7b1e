"""The results of a run on disk and on the screen: one scale, percent, and beside every score what it is worth.

scores.json    the scores with all that they depend on
scores.csv     the same as a table, a line for the whole and for each group
results.jsonl  what became of each question, to be compared with another run's
answers.xlsx   the same for a spreadsheet, where xlsxwriter is installed
mindie.csv     the line that MindIE's tool writes, in its profiles
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.evaluation.published import published
from duetvl.evaluation.scoring import Marked, Summary, Tally
from duetvl.storage.files import json_value, write_text

SCORES: Final = "scores.json"
TABLE: Final = "scores.csv"
RESULTS: Final = "results.jsonl"
MINDIE: Final = "mindie.csv"
JUDGED: Final = ("asked", "cached", "undecided", "failed")
_MOST_NOTES: Final = 10
_MOST_PROBLEMS: Final = 3
_COLUMNS: Final = ("score", "low", "high", "n", "unparsed", "truncated", "unanswered", "clusters")


@dataclass(frozen=True)
class Report:
    """A run that is scored. `run`: what run.json says. `remarks`: what a reader of the scores should know."""

    run: Mapping[str, Any]
    marked: Sequence[Marked]
    summary: Summary
    published: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None
    remarks: Sequence[str] = ()

    @property
    def name(self) -> str:
        """What was asked, in two words."""
        asked = self.run["settings"]
        return f"{asked['task']}, profile {asked['profile']}"


def write_report(report: Report, directory: Path) -> None:
    """Write all files of the report but the page and the spreadsheet. OSError where the disk is full."""
    write_text(directory / SCORES, json.dumps(scores(report), indent=2, ensure_ascii=False) + "\n")
    write_text(directory / TABLE, _table(report))
    lines = (json.dumps(one.as_row(), ensure_ascii=False) + "\n" for one in report.marked)
    write_text(directory / RESULTS, "".join(lines))
    if str(report.run["settings"]["profile"]).startswith("mindie"):
        write_text(directory / MINDIE, _mindie(report))


def scores(report: Report) -> dict[str, Any]:
    """The content of scores.json."""
    asked, whole = report.run["settings"], asdict(report.summary.whole)
    return {
        "task": asked["task"],
        "profile": asked["profile"],
        **whole,
        "unit": "percent",
        "groups": {
            field: {value: asdict(one) for value, one in values.items()}
            for field, values in report.summary.groups.items()
        },
        "published": report.published,
        "judge": report.judge,
        "remarks": list(report.remarks),
        "settings": asked,
        "run": report.run["about"],
    }


def read_results(directory: Path) -> list[Marked]:
    """What became of each question of a run. ConfigError where it is not scored."""
    file = directory / RESULTS
    try:
        return [Marked.from_row(json_value(line)) for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise ConfigError(
            f"{file}: {error.strerror or error}; score the run with duetvl eval --rescore -o {directory}"
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: is not what duetvl eval writes: {error}") from None


def notes(marked: Sequence[Marked]) -> list[str]:
    """What a reader of the scores should know of the questions: what is odd about some, and why some have no answer."""
    counts = Counter(note for one in marked for note in one.notes)
    odd = [f"{_questions(count)}: {note}" for note, count in counts.most_common(_MOST_NOTES)]
    if len(counts) > _MOST_NOTES:
        odd.append(f"{len(counts) - _MOST_NOTES} more such notes stand beside their questions in {RESULTS}")
    problems = [one for one in marked if one.value is None]
    first = [f"{one.id}: {one.problem}" for one in problems[:_MOST_PROBLEMS]]
    if problems:
        odd.append(f"{_questions(len(problems))} without an answer, which no score counts: {'; '.join(first)}")
    return odd


def beside_published(model: str, task: str, summary: Summary) -> dict[str, Any] | None:
    """The published score of a model with ours beside it, and what is to be said of the two; None where none is."""
    known = published(model, task)
    if known is None:
        return None
    ours = summary.whole
    if known.group is not None:
        ours = summary.groups.get(known.group[0], {}).get(known.group[1], ours)
    words = f"{known.model} {known.score:.1f} on {known.split}{'' if known.checked else ' (unchecked)'}"
    if ours.score is not None:
        where = "" if known.group is None else f" on {known.group[1]}"
        words += f", here{where} {ours.score:.1f} ({span(ours)}): {ours.score - known.score:+.1f}"
    return {
        **asdict(known),
        "ours": ours.score,
        "text": ". ".join(filter(None, (words, known.warning.rstrip("."), known.expect.rstrip(".")))),
    }


def _questions(count: int) -> str:
    return f"{count} question{'s' * (count != 1)}"


# -- on the screen ---------------------------------------------------------------------------------------------------


def markdown(report: Report) -> Iterator[str]:
    """The lines of the report as Markdown, with columns that stand below each other."""
    yield f"{report.name}: {_in_words(report.summary.whole)}"
    yield ""
    rules = list(report.summary.whole.others)
    titles = ("", "score", "95% interval", "n", "unparsed", "truncated", "unanswered", *rules)
    yield from table(_lines(report, rules), titles)
    if report.published:
        yield ""
        yield f"published: {report.published['text']}"
    if report.judge:
        yield f"judge {report.judge['model']}: " + ", ".join(f"{name} {report.judge[name]}" for name in JUDGED)
    for remark in report.remarks:
        yield f"note: {remark}"


def table(rows: Iterator[Sequence[str]], titles: Sequence[str]) -> Iterator[str]:
    """A table of Markdown; the first column is text, the others are numbers."""
    content = [titles, *rows]
    widths = [max(len(row[place]) for row in content) for place in range(len(titles))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    yield line(titles)
    yield "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths)) + "|"
    yield from map(line, content[1:])


def _lines(report: Report, rules: Sequence[str]) -> Iterator[Sequence[str]]:
    for name, one in tallies(report.summary):
        yield (
            name,
            _number(one.score),
            span(one),
            *(str(count) for count in (one.n, one.unparsed, one.truncated, one.unanswered)),
            *(_number(one.others.get(rule)) for rule in rules),
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def tallies(summary: Summary) -> Iterator[tuple[str, Tally]]:
    """The whole and every group, by the names that tables give them."""
    yield "all", summary.whole
    for field, values in summary.groups.items():
        yield from ((f"{field}: {value}", one) for value, one in values.items())


def span(one: Tally) -> str:
    """An interval in words."""
    return "-" if one.low is None or one.high is None else f"{one.low:.1f} to {one.high:.1f}"


def _in_words(one: Tally) -> str:
    if one.score is None:
        return "no question has an answer"
    return f"{one.score:.1f}% ({span(one)}) of {_questions(one.n)}"


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(report: Report) -> str:
    asked = report.run["settings"]
    rows: list[list[Any]] = [["task", "profile", "field", "group", *_COLUMNS]]
    summary = report.summary
    groups = [(field, value, one) for field, values in summary.groups.items() for value, one in values.items()]
    for field, value, one in [("", "", summary.whole), *groups]:
        numbers = ["" if (number := getattr(one, name)) is None else number for name in _COLUMNS]
        rows.append([*map(harmless, (asked["task"], asked["profile"], field, value)), *numbers])
    return _csv(rows)


def _mindie(report: Report) -> str:
    """A line for the whole, and one for each set of videos."""
    rows: list[list[Any]] = [["Tasks", "N-Shot", "Total", "Pass", "Metric", "Value"]]
    task = report.run["settings"]["task"]
    sets = report.summary.groups.get("set", {})
    for name, one in [(task, report.summary.whole), *((f"{task}/{name}", one) for name, one in sets.items())]:
        score = one.score or 0.0
        rows.append([harmless(name), 0, one.n, round(one.n * score / 100, 2), "accuracy", round(score / 100, 6)])
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def harmless(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
