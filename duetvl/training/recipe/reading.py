"""The recipe: one YAML or JSON file that says everything about a run.

Every field is checked before anything is loaded. Paths are relative to the working directory, as on any command
line, so that a path given as an override means the same as one in the file; paths inside a data file are relative
to `data.image_root`, or to the data file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duetvl.core.errors import ConfigError
from duetvl.core.mesh import AXES
from duetvl.training.recipe.parallel_section import ParallelSection
from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.spelling import as_overrides, nearest
from duetvl.training.recipe.text import allowed, fields, no_field, no_mapping, no_section, one_line, show
from duetvl.training.recipe.yaml_values import BLANK, parse_value, read_yaml


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides. Raises ConfigError."""
    file = Path(path)
    return make_recipe(read_yaml(file), overrides, name=file.stem, source=str(file))


def make_recipe(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, name: str = "run", source: str = "the recipe"
) -> Recipe:
    """A recipe from a mapping of sections. `name` replaces `{recipe}` in `train.output_dir`."""
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{source}: expected sections ({', '.join(Recipe.model_fields)}), found {found}")
    sections = {_text(key): _section(key, value) for key, value in values.items()}
    for override in overrides:
        _apply_override(sections, override)
    try:
        recipe = Recipe.model_validate(sections)
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None
    train = recipe.train.model_copy(update={"output_dir": recipe.train.output_dir.replace("{recipe}", name)})
    return recipe.model_copy(update={"train": train})


def for_world(recipe: Recipe, processes: int) -> Recipe:
    """The recipe for a run of `processes`, `parallel.dp: auto` resolved. Raises ConfigError as `check_world` does."""
    parallel = recipe.parallel
    if parallel.dp == "auto":
        rest, left = divmod(processes, parallel.mesh.size)
        if left or not rest:
            others = _degrees(parallel, [axis for axis in AXES if axis != "dp"])
            raise ConfigError(
                f"parallel: dp auto x {others}: {processes} processes were started, which {parallel.mesh.size} does "
                f"not divide; start a multiple of {parallel.mesh.size}"
            )
        parallel = parallel.model_copy(update={"dp": rest})
        recipe = recipe.model_copy(update={"parallel": parallel})
    check_world(recipe, processes)
    return recipe


def check_world(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError unless the recipe's degrees fit the number of processes."""
    parallel, mesh = recipe.parallel, recipe.parallel.mesh
    if processes != mesh.size:
        one = processes == 1
        alone = f"{_undivided(parallel)} takes the same steps on one"
        way = alone if one else "change the degrees: parallel.dp=auto takes the rest"
        raise ConfigError(
            f"parallel: {_degrees(parallel, AXES)} needs {mesh.size} process{'es' * (mesh.size > 1)}, and {processes} "
            f"{'was' if one else 'were'} started; start {mesh.size} (duetvl launch --nproc {mesh.size} -- train ...), "
            f"or {way}"
        )


def _undivided(parallel: ParallelSection) -> str:
    """The fields that make a layout one process."""
    ones = [f"parallel.{axis}=1" for axis in AXES if getattr(parallel.mesh, axis) > 1]
    placed = [name for name in ("vision_layers", "language_layers") if parallel.pp > 1 and getattr(parallel, name)]
    team = ["parallel.ulysses=null"] if parallel.ulysses not in (None, 1) else []
    return " ".join([*ones, *(f"parallel.{name}=null" for name in placed), *team])


def _degrees(parallel: ParallelSection, axes: Sequence[str]) -> str:
    return " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in axes)


def _apply_override(sections: dict[str, Any], override: str) -> None:
    target, equals, text = override.partition("=")
    section, dot, key = target.partition(".")
    if equals and section in Recipe.model_fields and not dot:
        sections[section] = _section(section, parse_value(text, f"override {target}"))
        return
    if not (equals and dot and section and key):
        meant = as_overrides([override]) or [f"{field}=VALUE" for field in nearest(target)]
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise ConfigError(f"override {override!r} is not of the form section.key=value{hint}")
    if section not in Recipe.model_fields:
        raise ConfigError(no_section(section))
    if key not in fields(section):
        raise ConfigError(no_field(section, key))
    if sections.get(section) is None:
        sections[section] = {}
    inner = sections[section]
    if not isinstance(inner, dict):
        raise ConfigError(no_mapping(section, inner))
    inner[key] = _field(section, key, parse_value(text, f"override {target}"))


# -- what stands in a recipe, before it is known to be one -----------------------------------------------------------

MOST_VALUES, DEEPEST = 100_000, 16  # of a field, far beyond any that makes sense


def _section(name: str, value: Any) -> Any:
    """A section as the recipe is checked with.

    One with nothing below it is there, with its defaults: `lora:` asks for adapters. Null is a section's absence where
    it may be absent, and its defaults otherwise.
    """
    known = Recipe.model_fields.get(name)
    if value is BLANK or (value is None and known is not None and known.default is not None):
        return {}
    if not isinstance(value, Mapping):
        return _plain(value, name)
    return {_text(key, name): _field(name, key, item) for key, item in value.items()}


def _field(section: str, key: str, value: Any) -> Any:
    """A field's value. Raises ConfigError where a blank could mean its default as well as null."""
    if value is not BLANK:
        return _plain(value, f"{section}.{key}")
    known = fields(section).get(key) if section in Recipe.model_fields else None
    if known is not None and known.default not in (None, ()):
        or_not = "" if known.is_required() else "; or leave the field out"
        raise ConfigError(f"{section}.{key} has no value; allowed: {allowed(section, key)}{or_not}")
    return None


def _plain(value: Any, where: str) -> Any:
    """The same value, with null for blanks. Raises ConfigError for what is no part of any recipe."""
    seen = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal seen
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ConfigError(f"{where}: is nested more than {DEEPEST} deep, or has more than {MOST_VALUES} values")
        if isinstance(value, Mapping):
            return {_text(key, where): walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item, depth + 1) for item in value]
        if isinstance(value, str) and not _is_text(value):
            raise ConfigError(f"{where}: found {show(value)}, which is not text in UTF-8 without a byte 0")
        if isinstance(value, int) and abs(value) > 2**63:
            raise ConfigError(f"{where}: found a whole number beyond 64 bits")
        return None if value is BLANK else value

    return walk(value, 0)


def _text(key: Any, where: str = "the recipe") -> str:
    if not isinstance(key, str) or not _is_text(key):
        raise ConfigError(f"{where}: the key {show(key)} is not text")
    return key


def _is_text(value: str) -> bool:
    """Whether it can be written: no byte 0, and no half of a surrogate pair."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
