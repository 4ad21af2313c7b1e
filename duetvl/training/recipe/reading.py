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
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.training.recipe.sections import ParallelSection, Recipe
from duetvl.training.recipe.text import fields, no_field, no_section, one_line, show
from duetvl.training.recipe.yaml_values import parse_yaml, read_yaml


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
    sections: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    for override in overrides:
        _apply_override(sections, override)
    try:
        recipe = Recipe.model_validate(
            {key: _empty(key) if value is None else value for key, value in sections.items()}
        )
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None
    train = recipe.train.model_copy(update={"output_dir": recipe.train.output_dir.replace("{recipe}", name)})
    return recipe.model_copy(update={"train": train})


def check_world(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError unless the recipe's degrees fit the number of processes, and this release can run them."""
    mesh = recipe.parallel.mesh
    degrees = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
    if mesh.size > 1:
        raise ConfigError(f"parallel: {degrees} needs {mesh.size} processes; this release trains on one process")
    if processes != mesh.size:
        raise ConfigError(
            f"parallel: {degrees} is {mesh.size} process, but {processes} were started; "
            f"this release trains on one process"
        )


def check_layers(parallel: ParallelSection, config: ModelConfig) -> None:
    """Raise ConfigError unless the stages' layers add up to the model's."""
    placed = (
        ("vision_layers", parallel.vision_layers, config.vision.depth, "vision tower"),
        ("language_layers", parallel.language_layers, config.text.num_layers, "language model"),
    )
    for name, rows, layers, part in placed:
        if rows is not None and (total := sum(map(sum, rows))) != layers:
            stages = parallel.pp * len(rows)
            even = [layers * (k + 1) // stages - layers * k // stages for k in range(stages)]
            raise ConfigError(
                f"parallel.{name} {show(rows)} places {total} layers, the {part} has {layers}; "
                f"evenly over {stages} stages they would be {even}"
            )


def _apply_override(sections: dict[str, Any], override: str) -> None:
    target, equals, text = override.partition("=")
    section, dot, key = target.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    if section not in Recipe.model_fields:
        raise ConfigError(no_section(section))
    if key not in fields(section):
        raise ConfigError(no_field(section, key))
    inner = sections.setdefault(section, {})
    if inner is None:
        inner = sections[section] = {}
    if not isinstance(inner, dict):
        raise ConfigError(
            f"{section}: found {show(inner)}, allowed: a section with fields ({', '.join(fields(section))})"
        )
    inner[key] = parse_yaml(text, f"override {target}")


def _empty(section: str) -> dict[str, Any] | None:
    """What `section:` with nothing after it means: its defaults, or its absence where it may be absent."""
    field = Recipe.model_fields.get(section)
    return None if field is not None and field.default is None and not field.is_required() else {}
