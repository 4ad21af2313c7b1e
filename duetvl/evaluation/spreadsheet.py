"""answers.xlsx: a line for each question. No cell is a formula or a link, whatever a model has answered."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.evaluation.scoring import Marked

SHEET: Final = "answers.xlsx"
_LONGEST: Final = 32_767  # UTF-16 units of a cell
_CUT: Final = " [cut off]"
_COLUMNS: Final = (
    ("index", 8), ("id", 12), ("verdict", 11), ("value", 8), ("read as", 14), ("answer", 50), ("truths", 24),
    ("question", 60), ("options", 40), ("groups", 24), ("truncated", 10), ("judged", 8), ("problem", 24), ("notes", 24),
)  # fmt: skip
# What XML cannot hold, and what a spreadsheet reads as one of its codes for such.
_NOT_IN_XML: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def available() -> bool:
    """Whether the package that writes such files is installed."""
    return find_spec("xlsxwriter") is not None


def write_spreadsheet(marked: Sequence[Marked], target: Path) -> None:
    """Write it. ConfigError where xlsxwriter is not installed."""
    if not available():
        raise ConfigError("a spreadsheet needs xlsxwriter: pip install duetvl[eval]")
    xlsxwriter = import_module("xlsxwriter")
    unfinished = target.with_name(f".{target.name}.tmp")
    book = xlsxwriter.Workbook(str(unfinished), {"constant_memory": True})
    try:
        bold, wrapped = book.add_format({"bold": True}), book.add_format({"valign": "top", "text_wrap": True})
        sheet = book.add_worksheet("answers")
        for place, (name, width) in enumerate(_COLUMNS):
            sheet.set_column(place, place, width, wrapped)
            sheet.write_string(0, place, name, bold)
        sheet.freeze_panes(1, 3)
        for line, one in enumerate(marked, start=1):
            for place, value in enumerate(_cells(one)):
                _write(sheet, line, place, value)
        sheet.autofilter(0, 0, max(len(marked), 1), len(_COLUMNS) - 1)
    finally:
        book.close()
    os.replace(unfinished, target)


def _write(sheet: Any, line: int, place: int, value: Any) -> None:
    if isinstance(value, int | float):
        sheet.write_number(line, place, value)
    elif value:
        sheet.write_string(line, place, cell_text(value))


def _cells(one: Marked) -> tuple[Any, ...]:
    value = "" if one.value is None else one.value
    return (
        one.index, one.id, one.verdict, value, one.parsed or "", one.answer or "", "\n".join(one.truths),
        one.prompt, "\n".join(f"{letter}. {text}" for letter, text in one.options.items()),
        "\n".join(f"{name}: {text}" for name, text in one.groups.items()), "yes" if one.truncated else "",
        "yes" if one.judged else "", one.problem, "\n".join(one.notes),
    )  # fmt: skip


def cell_text(text: str) -> str:
    """A text as a cell can hold it: what is beyond the most that it can is cut off, and says so."""
    clean = _NOT_IN_XML.sub("\ufffd", text.replace("\r\n", "\n"))
    if len(clean.encode("utf-16-le")) <= 2 * _LONGEST:
        return clean
    room = 2 * (_LONGEST - len(_CUT))
    return clean.encode("utf-16-le")[:room].decode("utf-16-le", "ignore") + _CUT
