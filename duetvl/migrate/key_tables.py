"""The tables of all keys as a page for users: docs/migrating_keys.md holds exactly this."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from duetvl.migrate.tables import TABLES

_PREFACE = """
<!-- Made by `duetvl.migrate.key_tables.key_tables()`; a test holds that it is current. -->

What [`duetvl import-mindspeed`](migrating.md) does with every key of `data.json` and `model.json` and every argument of
a training script. `*` stands for anything. Fields are described in [recipe.md](recipe.md).
"""


def key_tables() -> str:
    """All keys as markdown tables."""
    titles = ", ".join(f"[{table.title}](#{_anchor(table.title)})" for table in TABLES)
    lines = ["# Keys of MindSpeed-MM", "", _PREFACE.strip(), "", f"Contents: {titles}.", ""]
    for table in TABLES:
        lines += [f"## {table.title}", "", "| key | in a recipe |", "|---|---|"]
        lines += _rows(table.used, "")
        lines += _rows(table.not_needed, "not needed: ")
        lines += _rows(table.cannot, "refused: ")
        lines.append("")
    return "\n".join(lines)


def _rows(keys: Mapping[str, str], before: str) -> Iterator[str]:
    """A row for each meaning, with all keys that have it."""
    same: dict[str, list[str]] = {}
    for key, text in keys.items():
        same.setdefault(text, []).append(f"`{key}`")
    return (f"| {', '.join(names)} | {before}{text} |" for text, names in same.items())


def _anchor(title: str) -> str:
    """GitHub's address of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
