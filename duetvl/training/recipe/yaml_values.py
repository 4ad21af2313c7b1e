"""YAML as people expect it: the core schema of YAML 1.2, without the surprises of 1.1.

PyYAML reads 1e-5 as a string, `no` and `on` as booleans, 010 as eight, 1:30 as ninety, a date as a date, and lets the
second of two equal keys win. Here numbers are JSON's (and 0x, 0o), booleans are true and false, the rest is a
string, and a key given twice is an error. A key with nothing after it has the value `BLANK`, not null.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Final

import yaml

from duetvl.core.errors import ConfigError
from duetvl.storage.files import parse_json

LARGEST = 1 << 20  # bytes of a recipe


class _Blank(Enum):
    BLANK = "nothing"

    def __str__(self) -> str:
        return self.value


BLANK: Final = _Blank.BLANK


class _Loader(yaml.SafeLoader):
    """SafeLoader with the rules of the core schema."""

    # The class attributes that PyYAML looks at.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {None: yaml.SafeLoader.construct_undefined}

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """The text; two halves of a surrogate pair, as JSON writes a character, become that character."""
        return str(self.construct_scalar(node)).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def construct_list(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)

    def construct_unique(self, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != _tag("str"):
                plain = isinstance(key, yaml.ScalarNode)
                problem = f"the key {key.value!r} is not text; put it in quotes" if plain else "a key must be text"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return self.construct_mapping(node, deep=True)

    @classmethod
    def add_scalar(cls, kind: str, pattern: str, convert: Callable[[str], Any]) -> None:
        """Plain scalars that match are of this kind; others that are tagged so are errors."""
        matches = re.compile(rf"^(?:{pattern})\Z")

        def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
            text = str(loader.construct_scalar(node))
            if not matches.match(text):
                raise yaml.MarkedYAMLError(problem=f"{text!r} is not of the type {kind}", problem_mark=node.start_mark)
            return convert(text)

        cls.add_implicit_resolver(_tag(kind), matches, None)
        cls.add_constructor(_tag(kind), construct)
        _Dumper.add_implicit_resolver(_tag(kind), matches, None)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes texts which would be numbers here, such as 1e5."""


def _tag(kind: str) -> str:
    return f"tag:yaml.org,2002:{kind}"


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.add_scalar("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true")
_Loader.add_scalar(
    "int",
    r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    lambda text: int(text, 0) if text[:2] in ("0x", "0o") else int(text),
)
_Loader.add_scalar("float", _FLOAT, lambda text: float(re.sub(r"\.(?=[in])", "", text.lower())))
_Loader.add_scalar("null", r"~|null|Null|NULL", lambda text: None)
_Loader.add_scalar("blank", "", lambda text: BLANK)
_Loader.add_constructor(_tag("str"), _Loader.construct_text)
_Loader.add_constructor(_tag("seq"), _Loader.construct_list)
_Loader.add_constructor(_tag("map"), _Loader.construct_unique)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; None where it is empty. Raises ConfigError naming `source`, line and cause."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark and "\n" in text.rstrip() else ""
        hint = "; put a text that begins with * in quotes" if "scanning an alias" in (error.context or "") else ""
        raise ConfigError(f"{source}{where}: not valid YAML: {error.problem or error.context}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: it is nested too deeply") from None


def parse_value(text: str, source: str) -> Any:
    """The value of an override. In quotes or brackets it is YAML; anything else is taken whole, as one plain scalar.

    So `*.tar`, `a: b` and `dir #2` are texts, which YAML would take for an alias, a mapping and a comment. Nothing at
    all is `BLANK`. Raises ConfigError naming `source`.
    """
    text = text.strip()
    if text[:1] in tuple("[{\"'"):
        return parse_yaml(text, source)
    loader = _Loader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))
    except ValueError as error:  # thousands of digits
        raise ConfigError(f"{source}: {error}") from None


def read_yaml(path: Path) -> Any:
    """The value of a YAML file, or by its suffix of a JSON file. Raises ConfigError."""
    content = _read(path)
    if path.suffix.lower() == ".json":
        return parse_json(content, path, ConfigError)
    try:
        return parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8: {error}") from None


def _read(path: Path) -> bytes:
    """The bytes of a file of a recipe's size. A pipe would make the reader wait, and a device never end."""
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{path}: is a directory; give the file of a recipe")
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: is a pipe or a device; write the recipe to a file first")
        if found.st_size > LARGEST:
            raise ConfigError(f"{path}: has {found.st_size} bytes, a recipe at most {LARGEST}")
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def write_yaml(value: Any, *, flow: bool = False) -> str:
    """A YAML text that `parse_yaml` reads back to the same value; with `flow` innermost lists are on one line."""
    style = None if flow else False
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=style)
