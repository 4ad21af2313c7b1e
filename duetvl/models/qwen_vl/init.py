"""Random weights: for tests, benchmarks and training from scratch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from duetvl.core.random import philox
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.parameters import parameter_shapes


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(path, float32 array) of every parameter, each from a random stream of its own.

    Matrices are normal with the configuration's `initializer_range`, norms one, biases zero: as in transformers.
    """
    for path, shape in parameter_shapes(config).items():
        yield path, initial_weight(path, shape, config.initializer_range, seed)


def initial_weight(path: str, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
    """One parameter's first values."""
    if path.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return philox(seed, path).standard_normal(shape, dtype=np.float32) * np.float32(std)
