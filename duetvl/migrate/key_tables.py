"""The tables of all keys as a page for users: the text of docs/migrating_keys.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from duetvl.migrate.evaluation_keys import EVALUATION
from duetvl.migrate.inference_keys import INFERENCE
from duetvl.migrate.llamafactory.tables import LLAMAFACTORY
from duetvl.migrate.tables import MODEL, TABLES, Table

_PREFACE = """
<!-- Written by `duetvl.migrate.key_tables.key_tables()`; a test checks that it is current. -->

What [`duetvl import-mindspeed`](migrating.md) does with every key of `data.json` and `model.json` and every argument of
a training script, `duetvl import-llamafactory` with every key of LLaMA-Factory's training YAML, and
[`duetvl infer --from-mindspeed`](infer.md#files-of-mindspeed-mm) and
[`duetvl eval --from-mindspeed`](evaluation.md#files-of-mindspeed-mm) with every key of their JSON files. `*` stands for
anything. An inference.json also has keys of model.json, and an evaluate.json those of an inference.json; the tables do
not repeat them. [recipe.md](recipe.md) describes the fields of a recipe.
"""


def key_tables() -> str:
    """All keys as markdown tables."""
    recipes = (*TABLES, LLAMAFACTORY)
    tables = (*recipes, *(_beyond(table, known) for table, known in _RUNS))
    titles = ", ".join(f"[{table.title}](#{_anchor(table.title)})" for table in tables)
    lines = ["# Keys of MindSpeed-MM and LLaMA-Factory", "", _PREFACE.strip(), "", f"Contents: {titles}.", ""]
    for table in tables:
        lines += [f"## {table.title}", "", f"| key | {'in a recipe' if table in recipes else 'option'} |", "|---|---|"]
        lines += _rows(table.used, "")
        lines += _rows(table.not_needed, "not needed: ")
        lines += _rows(table.cannot, "refused: ")
        lines.append("")
    return "\n".join(lines)


_RUNS = ((INFERENCE, MODEL), (EVALUATION, INFERENCE))  # files that also have the keys of another table


def _beyond(table: Table, known: Table) -> Table:
    """The keys of `table` that `known` does not list with the same text."""

    def rest(keys: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
        return {key: text for key, text in keys.items() if others.get(key) != text}

    return Table(
        table.title, rest(table.used, known.used), rest(table.not_needed, known.not_needed),
        rest(table.cannot, known.cannot),
    )  # fmt: skip


def _rows(keys: Mapping[str, str], before: str) -> Iterator[str]:
    """A row for each meaning, with all keys that have it."""
    same: dict[str, list[str]] = {}
    for key, text in keys.items():
        same.setdefault(text, []).append(f"`{key}`")
    return (f"| {', '.join(names)} | {before}{text} |" for text, names in same.items())


def _anchor(title: str) -> str:
    """GitHub's address of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
