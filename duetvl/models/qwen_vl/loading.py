"""Model directories in the Hugging Face layout: reading, writing, and making random ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError
from duetvl.core.params import Parameter
from duetvl.models.hub import model_directory
from duetvl.models.qwen_vl.config import ModelConfig, load_config
from duetvl.models.qwen_vl.init import initial_weights
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.names import canonical_names
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.files import WEIGHT_FILES, staged_directory, write_text
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import fingerprint, load_parameters, open_weights, write_shards, write_weights

Tensor = Any
AnyModel = TypeVar("AnyModel", bound=QwenVL)
DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    path: str | Path,
    *,
    backend: Backend,
    dtype: str = "float32",
    make: Callable[[ModelConfig, Backend, Mapping[str, Parameter]], AnyModel] = QwenVL,  # type: ignore[assignment]
    progress: Callable[[int], None] | None = None,
) -> AnyModel:
    """Read a model directory slice by slice straight to the device; an id of a hub is fetched first (models/hub.py).

    `dtype` is the one the weights are held in; `progress` is told the bytes of each tensor read. Raises
    CheckpointError for what is missing or damaged, ConfigError for what duetvl does not implement.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    path = model_directory(path)
    config = load_config(path)
    rename = canonical_names(config.tie_word_embeddings)
    tensors = load_parameters(parameter_shapes(config), path, backend, dtype, rename=rename, progress=progress)
    model = make(config, backend, {name: Parameter(name, tensor) for name, tensor in tensors.items()})
    model.source = path
    return model


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
            copy_settings(model.source, staging)
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


def identity(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """Where a model's weights lie, and by what they are known wherever they lie."""
    weights = open_weights(directory, canonical_names(config.tie_word_embeddings))
    return {"path": str(directory), "fingerprint": fingerprint(weights)}


def write_config(config: ModelConfig, directory: Path, dtype: str) -> None:
    """`config.json` for weights of this dtype."""
    text = json.dumps({**config.to_dict(), "torch_dtype": dtype}, indent=2) + "\n"
    write_text(directory / "config.json", text)


def copy_settings(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: tokenizer, template, picture and generation settings, licence."""
    for file in sorted(source.iterdir()):
        weights = file.name == "config.json" or any(file.match(pattern) for pattern in WEIGHT_FILES)
        if file.is_file() and not weights and file.suffix not in (".bin", ".pt", ".safetensors"):
            shutil.copyfile(file, target / file.name)
