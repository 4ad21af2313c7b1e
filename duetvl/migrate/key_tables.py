"""The tables of all keys as a page for users: docs/migrating_keys.md holds exactly this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from duetvl.migrate.tables import TABLES

_PREFACE = """
<!-- Made by `duetvl.migrate.key_tables.key_tables()`; a test holds that it is current. -->

What [`duetvl import-mindspeed`](migrating.md) does with every key of `data.json` and `model.json` and every argument of
a training script. `*` stands for anything. Fields are described in [recipe.md](recipe.md).
"""


def key_tables() -> str:
    """All keys as markdown tables."""
    lines = ["# Keys of MindSpeed-MM", "", _PREFACE.strip(), ""]
    for table in TABLES:
        lines += [f"## {table.title}", "", "| key | in a recipe |", "|---|---|"]
        lines += _rows(table.used, "")
        lines += _rows(table.not_needed, "not needed: ")
        lines += _rows(table.cannot, "refused: ")
        lines.append("")
    return "\n".join(lines)


def _rows(keys: Mapping[str, str], before: str) -> Iterator[str]:
    return (f"| `{key}` | {before}{text} |" for key, text in keys.items())
