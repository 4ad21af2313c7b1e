"""YAML as people expect it: the core schema of YAML 1.2, without the surprises of 1.1.

PyYAML reads 1e-5 as a string, `no` and `on` as booleans, 010 as eight, 1:30 as ninety, a date as a date, and lets the
second of two equal keys win. Here numbers are JSON's (and 0x, 0o), booleans are true and false, the rest is a
string, and a key given twice is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from duetvl.core.errors import ConfigError

_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_NULL = r"~|null|Null|NULL|"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of the core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  the class attribute that PyYAML looks at

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def construct_unique(self, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return self.construct_mapping(node, deep=True)


for _tag, _pattern in (("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("null", _NULL)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_unique)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML (or JSON) text. Raises ConfigError naming `source`, line and cause."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text.rstrip() else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, or of a JSON file, which is YAML but for its tabs."""
    try:
        text = path.read_text(encoding="utf-8")
        return parse_yaml(text.replace("\t", " ") if path.suffix == ".json" else text, str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def write_yaml(value: Any, *, flow: bool = False) -> str:
    """A YAML text that `parse_yaml` reads back to the same value; with `flow` innermost lists are on one line."""
    style = None if flow else False
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120, default_flow_style=style)
