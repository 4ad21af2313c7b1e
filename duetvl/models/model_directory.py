"""A model on disk: what its user calls it, where it lies, its configuration, weights, tokenizer and settings."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from duetvl.models.hub import fetch, is_id
from duetvl.models.lora import Adapters
from duetvl.models.qwen_vl.config import ModelConfig, load_config
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.weights import open_model_weights
from duetvl.models.settings import model_settings
from duetvl.storage.weights_dir import ModelWeights, fingerprint


class AdapterTensors(Protocol):
    """A low-rank adapter that can be laid on a model, wherever it is stored."""

    @property
    def adapters(self) -> Adapters:
        """Which layers have one, and of which size."""
        ...

    @property
    def tensors(self) -> Collection[str]:
        """Their paths in the model."""
        ...

    def read(self, path: str) -> tuple[np.ndarray, str]:
        """The bits of a tensor, and their dtype's name."""
        ...


@dataclass(frozen=True)
class ModelDirectory:
    """A model, opened once and handed on; make one with `open_model`, or with that of `convert.opening`, which knows
    runs, adapters and MindSpeed-MM as well.

    name: as the user gave it, a directory or an id. path: where the files are. revision: the commit of the hub that
    they are, where that is known.
    """

    name: str
    path: Path
    revision: str | None = None

    @cached_property
    def config(self) -> ModelConfig:
        """What `config.json` says. CheckpointError where it cannot be read, ConfigError where duetvl cannot run it."""
        return load_config(self.path)

    @cached_property
    def family(self) -> QwenVLFamily:
        """The host side of the model."""
        return QwenVLFamily(self.config)

    @cached_property
    def weights(self) -> ModelWeights:
        """The weights, of which the headers are read. CheckpointError where they are not those of `config`."""
        weights = open_model_weights(self.path, self.config)
        weights.check(parameter_shapes(self.config))
        return weights

    @cached_property
    def adapter(self) -> AdapterTensors | None:
        """A low-rank adapter that belongs on the weights."""
        return None

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights, of whatever format; those of an id may not be fetched yet."""
        return any(file for ending in ("safetensors", "bin") for file in self.path.glob(f"*.{ending}"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer, in either of its forms."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", "vocab.json"))

    def identity(self) -> dict[str, Any]:
        """Which model this is, as JSON: the user's name for it, and by what its weights are known wherever they lie."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"path": self.name, **revision, "fingerprint": fingerprint(self.weights)}

    def settings(self) -> list[Path]:
        """See `model_settings`."""
        return model_settings(self.path)

    def copy_settings(self, target: Path) -> None:
        """Copy them into a directory of new weights."""
        for file in self.settings():
            (target / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.path / file, target / file)


def open_model(model: str | Path | ModelDirectory, *, weights: bool = True) -> ModelDirectory:
    """Find a model: a directory if there is one of this name, else an id, whose files are fetched.

    Without `weights`, only what is needed to encode records is. Nothing is read yet. CheckpointError where an id can
    neither be fetched nor is in the cache. What is neither a directory nor an id is taken for a directory: who reads
    it says what it lacks.
    """
    if isinstance(model, ModelDirectory):
        return open_model(model.name) if weights and not model.has_weights else model
    name = str(model)
    if not is_id(name):
        return ModelDirectory(name, Path(name))
    path = fetch(name, weights=weights)
    return ModelDirectory(name, path, path.name if path.parent.name == "snapshots" else None)
