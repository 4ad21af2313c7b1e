"""`model.dtype: auto`, decided once, before anything that depends on it."""

from __future__ import annotations

from collections.abc import Callable

from duetvl.convert.opening import open_merged
from duetvl.core.device import Device
from duetvl.models.qwen_vl.loading import DTYPES
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.sections import Recipe


def with_dtype(recipe: Recipe, *, on_cpu: bool, supports: Callable[[str], bool] = lambda _: True) -> Recipe:
    """The recipe with the dtype that `auto` stands for: that of the model's `config.json`, and float32 on a CPU or
    where the device does not have it.

    Raises CheckpointError or ConfigError for a `config.json` that cannot be read, and ConfigError where the recipe
    does not go with the dtype.
    """
    if recipe.model.dtype != "auto":
        return recipe
    stored = None
    if not on_cpu:
        stored = open_merged(recipe.model.path, base=recipe.model.base, weights=False).config.dtype
    dtype = stored if stored in DTYPES and supports(stored) else "float32"
    return make_recipe(recipe.model_dump(mode="json"), [f"model.dtype={dtype}"])


def on_device(recipe: Recipe, device: Device) -> Recipe:
    """The same for a device that is there."""
    return with_dtype(recipe, on_cpu=device.name == "cpu", supports=device.supports)
