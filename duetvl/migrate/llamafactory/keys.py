"""The keys of a YAML file with LLaMA-Factory's defaults, and notes of where each went."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from duetvl.core.errors import ConfigError
from duetvl.migrate.llamafactory.tables import DEFAULTS, LLAMAFACTORY
from duetvl.migrate.report import Report, Values
from duetvl.training.recipe.text import show
from duetvl.training.recipe.yaml_values import BLANK


class Keys(Values):
    """The values of one YAML file; a key that is left out has LLaMA-Factory's default."""

    def __init__(self, path: Path, values: dict[str, Any], report: Report) -> None:
        given = {key: None if value is BLANK else value for key, value in values.items()}
        given |= {key: False for key in LLAMAFACTORY.cannot if given.get(key) == 0}  # 0 asks for nothing
        super().__init__(replace(LLAMAFACTORY, title=str(path)), given, report)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, LLaMA-Factory's default where it is not given or null; it counts as read."""
        value = super().get(key)
        return DEFAULTS.get(key, default) if value is None else value

    def names(self, key: str) -> list[str]:
        """Names as a list or as one text with commas. Raises ConfigError for anything else."""
        value = self.get(key, "")
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"{self.table.title}: {key} is {show(value)}, expected names separated by commas")
        return [part.strip() for part in parts if part.strip()]

    def one_of(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of some words. Raises ConfigError for another, which `--allow-unknown` takes as the first of them."""
        value = str(self.get(key))
        if value in allowed:
            return value
        self.report.lacks(self.table.title, f"{key}: {value}", f": duetvl has {', '.join(allowed)}")
        return allowed[0]

    def note(self, key: str, text: str, *, changed: bool = False) -> None:
        """Note where a key went; one that the file does not give is noted as added."""
        if self.peek(key) is None:
            self.report.add("added", key, f"{text} (LLaMA-Factory's default)")
        else:
            self.report.add("changed" if changed else "used", key, text)

    def take(self, key: str, field: str, *, whole: bool = False, least: float | None = None) -> Any:
        """A number that means the same in a field of the recipe, which is noted."""
        value = self.whole(key) if whole else float(self.number(key))
        if least is not None and value < least:
            raise ConfigError(f"{self.table.title}: {key} is {value:g}, expected {least:g} or more")
        self.note(key, f"{field}: {value:g}")
        return value
