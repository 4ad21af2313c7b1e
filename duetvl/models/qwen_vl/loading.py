"""Model directories in the Hugging Face layout: reading, writing, and making random ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError
from duetvl.core.params import Parameter
from duetvl.models.layout import UNDIVIDED, Divided
from duetvl.models.model_directory import ModelDirectory, open_model
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.init import initial_weights
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.files import staged_directory, write_text
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import load_parameters, write_shards, write_weights

Tensor = Any
AnyModel = TypeVar("AnyModel", bound=QwenVL)
DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    model: str | Path | ModelDirectory,
    *,
    backend: Backend,
    dtype: str = "float32",
    make: Callable[[ModelConfig, Backend, Mapping[str, Parameter]], AnyModel] = QwenVL,  # type: ignore[assignment]
    progress: Callable[[int], None] | None = None,
    division: Divided = UNDIVIDED,
) -> AnyModel:
    """Read a model, given by directory or id, slice by slice straight to the device.

    `dtype` is the one the weights are held in; `progress` is called with the bytes of each tensor read. Of a model
    that is divided over ranks the `division`'s part is read of each tensor that this rank holds; such a model needs its
    `layout` too before it runs (`parallel.tensor.layout_of`). Raises CheckpointError for what is missing or damaged,
    whether this rank reads it or not, ConfigError for what duetvl does not implement.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    source = open_model(model)
    shapes = parameter_shapes(source.config)
    tensors = load_parameters(
        shapes, source.weights, backend, dtype, part_of=division.part, holds=division.holds, progress=progress
    )
    parameters = {
        name: Parameter.of(name, tensor, division.part(name, shapes[name])) for name, tensor in tensors.items()
    }
    loaded = make(source.config, backend, parameters)
    loaded.source, loaded.dtype = source, dtype
    return loaded


def save_model(model: QwenVL, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write a model as transformers loads it, with the tokenizer and settings of the directory it was read from.

    The directory appears whole or not at all. One that exists and is not empty is refused unless `overwrite`.
    ConfigError for a model with an adapter.
    """
    if model.adapters is not None:
        raise ConfigError("this model has an adapter: merge it first (merge_adapter), or save it alone (save_adapter)")
    tensors = {name: parameter.tensor for name, parameter in model.parameters.items()}
    with staged_directory(directory, overwrite=overwrite) as staging:
        if model.source is not None:
            model.source.copy_settings(staging)
        write_weights(staging, tensors, model.backend)
        write_config(model.config, staging, model.dtype)


def write_random_model(
    config: ModelConfig, directory: str | Path, *, seed: int = 0, settings: Callable[[Path], None] | None = None
) -> None:
    """A model directory with random float32 weights; `settings` may add a tokenizer and the like to it."""
    specs = {name: TensorSpec("float32", shape) for name, shape in parameter_shapes(config).items()}
    weights = initial_weights(config, seed)

    def fetch(wanted: str) -> np.ndarray:
        name, values = next(weights)
        assert name == wanted, "weights are made in the order in which they are written"
        return values

    with staged_directory(directory) as staging:
        write_shards(staging, specs, fetch)
        write_config(config, staging, "float32")
        if settings is not None:
            settings(staging)


def write_config(config: ModelConfig, directory: Path, dtype: str) -> None:
    """`config.json` for weights of this dtype."""
    text = json.dumps({**config.to_dict(), "torch_dtype": dtype}, indent=2) + "\n"
    write_text(directory / "config.json", text)
