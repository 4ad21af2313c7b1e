"""A checkpoint as a model directory for others, at any time and without a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.convert.opening import open_model
from duetvl.core.errors import CheckpointError, ConfigError, DuetvlError
from duetvl.models.lora import Adapters
from duetvl.models.qwen_vl.adapters import linear_shapes, write_adapter_files
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.files import staged_directory
from duetvl.storage.finding import CheckpointRef, find_checkpoint, parse_run
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import Shape, count_and_name, write_shards

Say = Callable[[str], None]


def export_run(run: str, target: str | Path, say: Say = lambda _: None) -> Path:
    """Write a checkpoint, `RUN` or `RUN@STEP`, as transformers loads it, or that of a LoRA run as PEFT does; the
    directory that is returned.

    Takes the weights as they are stored and the tokenizer and settings of the recipe's model. `target` appears whole
    or not at all, and one that exists is refused. The run may still be going on. Where the checkpoint is damaged, an
    older one is named and not taken instead. Raises CheckpointError, ConfigError.
    """
    directory, step = parse_run(run)
    ref = find_checkpoint(directory, step, kinds=("weights",))
    kind = "adapter" if ref.meta.recipe.get("lora") is not None else "model"
    with staged_directory(target) as staging:
        EXPORTERS[kind](ref, staging, say)
    say(f"exported step {ref.step} of {directory} to {target}")
    return Path(target)


def _export_model(ref: CheckpointRef, staging: Path, say: Say) -> None:
    """A checkpoint that has all weights of its model."""
    if not ref.meta.model_config:
        raise ConfigError(f"{ref.path}: says nothing of its model, so it cannot be exported")
    config = ModelConfig.from_dict(ref.meta.model_config, source=f"{ref.path}: its model_config")
    stored = ref.manifest.tensors["weights"]
    shapes = parameter_shapes(config)
    absent = [name for name, shape in shapes.items() if name not in stored or stored[name].shape != shape]
    if absent or len(stored) != len(shapes):
        what = count_and_name("tensor(s) absent or of another shape", absent) or "it has tensors of another model"
        raise CheckpointError(f"{ref.path}: its weights are not those of its model_config: {what}")
    specs = {name: TensorSpec(stored[name].dtype, shape) for name, shape in shapes.items()}
    write_shards(staging, specs, _reader(ref))
    write_config(config, staging, next(iter(specs.values())).dtype)
    _copy_settings_of(ref.meta.recipe, shapes, staging, say)


def _export_adapter(ref: CheckpointRef, staging: Path, say: Say) -> None:
    """A checkpoint that has the adapters of a model alone."""
    base, stored = ref.meta.extra.get("base_model") or {}, ref.manifest.tensors["weights"]
    try:
        config = ModelConfig.from_dict(ref.meta.model_config, source=f"{ref.path}: its model_config")
        adapters = Adapters.from_json(base["adapters"])
        shapes = adapters.shapes(linear_shapes(config))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{ref.path}: says nothing usable of its adapters ({error!r})") from None
    if {name: tensor.shape for name, tensor in stored.items()} != shapes:
        raise CheckpointError(f"{ref.path}: its weights are not those of the adapters that it names")
    specs = {name: TensorSpec(stored[name].dtype, shape) for name, shape in shapes.items()}
    named = ref.meta.recipe.get("model", {}).get("path") or base.get("path")
    write_adapter_files(staging, config, adapters, specs, _reader(ref), named)


def _reader(ref: CheckpointRef) -> Callable[[str], np.ndarray]:
    """Reads one tensor at a time, and gives the memory of the one before back."""
    checkpoint, before = ref.stored, [""]

    def fetch(name: str) -> np.ndarray:
        if before[0]:
            checkpoint.release("weights", before[0])
        before[0] = name
        return checkpoint.read("weights", name)[0]

    return fetch


def _copy_settings_of(recipe: Any, shapes: Mapping[str, Shape], staging: Path, say: Say) -> None:
    """Copy them from the recipe's model, if it is here and has these parameters: its path may lead elsewhere now."""
    path = recipe.get("model", {}).get("path", "")
    try:
        source = open_model(path, base=recipe.get("model", {}).get("base"), weights=False)
        found = "is another model" if parameter_shapes(source.config) != shapes else None
    except DuetvlError as error:
        found = f"cannot be read ({error})"
    if found is None:
        source.copy_settings(staging)
    else:
        say(f"warning: the run's model {path!r} {found}: copy its tokenizer and settings yourself")


# What a checkpoint holds -> how it is written to a staging directory.
EXPORTERS: dict[str, Callable[[CheckpointRef, Path, Say], None]] = {
    "model": _export_model,
    "adapter": _export_adapter,
}
