"""The tables of all keys as a page for users: docs/migrating_keys.md holds exactly this."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from duetvl.migrate.llamafactory.tables import LLAMAFACTORY
from duetvl.migrate.tables import TABLES

_PREFACE = """
<!-- Made by `duetvl.migrate.key_tables.key_tables()`; a test holds that it is current. -->

What [`duetvl import-mindspeed`](migrating.md) does with every key of `data.json` and `model.json` and every argument of
a training script, and `duetvl import-llamafactory` with every key of LLaMA-Factory's training YAML.
`*` stands for anything. Fields are described in [recipe.md](recipe.md).
"""


def key_tables() -> str:
    """All keys as markdown tables."""
    tables = (*TABLES, LLAMAFACTORY)
    titles = ", ".join(f"[{table.title}](#{_anchor(table.title)})" for table in tables)
    lines = ["# Keys of MindSpeed-MM and LLaMA-Factory", "", _PREFACE.strip(), "", f"Contents: {titles}.", ""]
    for table in tables:
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
