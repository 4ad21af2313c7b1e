"""A checkpoint as a model directory for others, at any time and without a framework: of any run, whatever its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.convert.commands import export_mindspeed_mm
from duetvl.convert.layouts import Layout
from duetvl.convert.opening import open_model
from duetvl.core.errors import CheckpointError, ConfigError, DuetvlError
from duetvl.core.half import narrowed, widened
from duetvl.models.lora import Adapters
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.adapters import linear_shapes, merged_tensors, write_adapter_files
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.files import staged_directory
from duetvl.storage.finding import CheckpointRef, find_checkpoint, parse_run
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import Shape, count_and_name, write_shards
from duetvl.training.checkpoints.run_directory import ExportKind
from duetvl.training.checkpoints.space import exported_dtype

Say = Callable[[str], None]
Fetch = Callable[[str], np.ndarray]


def export_run(run: str, target: str | Path, say: Say = lambda _: None, *, dtype: str | None = None) -> Path:
    """Write a checkpoint, `RUN`, `RUN@STEP` or `RUN@best`, as transformers loads it, or that of a LoRA run as PEFT
    does; the directory that is returned.

    Takes the tokenizer and settings of the recipe's model, and of a model its dtype unless one is given: see
    `export_checkpoint`. An adapter is float32. `target` appears whole
    or not at all, and one that exists is refused. The run may still be going on. Where the checkpoint is damaged, an
    older one is named and not taken instead. Raises CheckpointError, ConfigError.
    """
    directory, step = parse_run(run)
    ref = find_checkpoint(directory, step, kinds=("weights",))
    adapter = _has_adapters(ref)
    if adapter and dtype not in (None, "float32"):
        raise ConfigError(f"--dtype {dtype}: {directory} has an adapter, which is float32; merge it: duetvl merge")
    export_checkpoint(ref, target, kind="adapter" if adapter else "model", dtype=dtype, say=say)
    say(f"exported step {ref.step} of {directory} to {target}")
    return Path(target)


def export_checkpoint(
    ref: CheckpointRef,
    target: str | Path,
    *,
    kind: ExportKind,
    source: ModelDirectory | None = None,
    overwrite: bool = False,
    dtype: str | None = None,
    say: Say = lambda _: None,
) -> None:
    """Write a checkpoint, whose weights are verified, as a model for transformers, an adapter for PEFT, or a
    MindSpeed-MM release of one stage and rank; see `staged_directory` for `overwrite`.

    One tensor is held at a time. `source` is the model that the run started from. Where the checkpoint has adapters
    alone, a model or a release is that one merged with them, as it was trained; else its tokenizer and settings are
    taken, and without it those of the recipe's model. A model or a release is of `dtype`, by default the one that the
    config.json of the model names which the run started from: each weight is rounded once where it was trained in
    another.
    """
    if kind == "adapter":
        with staged_directory(target, overwrite=overwrite) as staging:
            _write_adapter(ref, source, staging)
        return
    config = _config_of(ref)
    trained = _merged(ref, config, source) if _has_adapters(ref) else _whole(ref, config)
    specs, fetch = _in_dtype(*trained, dtype or exported_dtype(config.dtype))
    if kind == "mindspeed_mm":
        export_mindspeed_mm(Path(target), config, specs, fetch, Layout.one_stage(config), overwrite=overwrite)
        return
    with staged_directory(target, overwrite=overwrite) as staging:
        write_shards(staging, specs, fetch)
        write_config(config, staging, next(iter(specs.values())).dtype)
        if source is not None:
            source.copy_settings(staging)
        else:
            _copy_settings_of(ref.meta.recipe, parameter_shapes(config), staging, say)


def _in_dtype(specs: dict[str, TensorSpec], fetch: Fetch, dtype: str | None) -> tuple[dict[str, TensorSpec], Fetch]:
    """The tensors in a dtype; without one as they are."""
    if dtype is None:
        return specs, fetch

    def rounded(name: str) -> np.ndarray:
        bits, stored = fetch(name), specs[name].dtype
        return bits if stored == dtype else narrowed(widened(bits, stored), dtype)

    return {name: TensorSpec(dtype, spec.shape) for name, spec in specs.items()}, rounded


def _has_adapters(ref: CheckpointRef) -> bool:
    return ref.meta.recipe.get("lora") is not None


def _config_of(ref: CheckpointRef) -> ModelConfig:
    if not ref.meta.model_config:
        raise ConfigError(f"{ref.path}: does not name its model, so it cannot be exported")
    return ModelConfig.from_dict(ref.meta.model_config, source=f"{ref.path}: its model_config")


def _whole(ref: CheckpointRef, config: ModelConfig) -> tuple[dict[str, TensorSpec], Fetch]:
    """The tensors of a checkpoint that has all weights of its model."""
    stored = ref.manifest.tensors["weights"]
    shapes = parameter_shapes(config)
    absent = [name for name, shape in shapes.items() if name not in stored or stored[name].shape != shape]
    if absent or len(stored) != len(shapes):
        what = count_and_name("tensor(s) absent or of another shape", absent) or "it has tensors of another model"
        raise CheckpointError(f"{ref.path}: its weights are not those of its model_config: {what}")
    return {name: TensorSpec(stored[name].dtype, shape) for name, shape in shapes.items()}, _reader(ref)


def _merged(
    ref: CheckpointRef, config: ModelConfig, source: ModelDirectory | None
) -> tuple[dict[str, TensorSpec], Fetch]:
    """The tensors of the model that a checkpoint's adapters belong to, with these merged."""
    assert source is not None, "adapters are merged with the model that they belong to"
    adapters, specs = _adapters_of(ref, config)
    read = _reader(ref)
    dtype = ref.meta.recipe["model"]["dtype"]
    return merged_tensors(source, adapters, lambda path: widened(read(path), specs[path].dtype), dtype)


def _write_adapter(ref: CheckpointRef, source: ModelDirectory | None, staging: Path) -> None:
    config = _config_of(ref)
    adapters, specs = _adapters_of(ref, config)
    named = ref.meta.recipe.get("model", {}).get("path") or ref.meta.extra["base_model"].get("path")
    write_adapter_files(staging, config, adapters, specs, _reader(ref), source.name if source else named)


def _adapters_of(ref: CheckpointRef, config: ModelConfig) -> tuple[Adapters, dict[str, TensorSpec]]:
    """What a checkpoint that has the adapters of a model alone says of them, and their tensors."""
    base, stored = ref.meta.extra.get("base_model") or {}, ref.manifest.tensors["weights"]
    try:
        adapters = Adapters.from_json(base["adapters"])
        shapes = adapters.shapes(linear_shapes(config))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{ref.path}: has no usable description of its adapters ({error!r})") from None
    if {name: tensor.shape for name, tensor in stored.items()} != shapes:
        raise CheckpointError(f"{ref.path}: its weights are not those of the adapters that it names")
    return adapters, {name: TensorSpec(stored[name].dtype, shape) for name, shape in shapes.items()}


def _reader(ref: CheckpointRef) -> Fetch:
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
