"""The weights of a model with an adapter put into them, made one by one as they are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from duetvl.core.boxes import Box, Shape
from duetvl.core.half import narrowed, widened
from duetvl.models.lora import MAGNITUDE, A, B, merged_weight
from duetvl.models.model_directory import AdapterTensors
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import ModelWeights, check_weights, cut


class MergedWeights:
    """`weights` with an adapter's part added, computed in float32 and rounded once to each weight's dtype."""

    def __init__(self, weights: ModelWeights, adapter: AdapterTensors):
        self._weights, self._adapter = weights, adapter
        self._held: tuple[str, np.ndarray] | None = None  # the last one that was made

    @property
    def directory(self) -> Path:
        """See ModelWeights."""
        return self._weights.directory

    @property
    def names(self) -> Collection[str]:
        """See ModelWeights."""
        return self._weights.names

    def spec(self, name: str) -> TensorSpec:
        """See ModelWeights."""
        return self._weights.spec(name)

    def view(self, name: str, shape: Shape | None = None) -> np.ndarray:
        """See ModelWeights."""
        if name.removesuffix(".weight") not in self._adapter.adapters.sizes:
            return self._weights.view(name, shape)
        if self._held is None or self._held[0] != name:
            self._held = name, self._made(name)
        return self._held[1] if shape is None else self._held[1].reshape(shape)

    def read(self, name: str, box: Box, shape: Shape | None = None) -> np.ndarray:
        """See ModelWeights; a weight with an adapter is made whole."""
        if name.removesuffix(".weight") not in self._adapter.adapters.sizes:
            return self._weights.read(name, box, shape)
        return cut(name, self.view(name, shape), box)

    def release(self, name: str) -> None:
        """See ModelWeights."""
        self._held = None
        self._weights.release(name)

    def place(self, name: str) -> tuple[str, int]:
        """See ModelWeights."""
        return self._weights.place(name)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """See ModelWeights."""
        check_weights(self, shapes)

    def _made(self, name: str) -> np.ndarray:
        module, dtype = name.removesuffix(".weight"), self.spec(name).dtype
        adapters = self._adapter.adapters
        magnitude = self._leaf(f"{module}.{MAGNITUDE}") if adapters.dora else None
        a, b = self._leaf(f"{module}.{A}"), self._leaf(f"{module}.{B}")
        weight = widened(np.require(self._weights.view(name), requirements="A"), dtype)
        return narrowed(merged_weight(weight, a, b, adapters.scale(module), magnitude), dtype)

    def _leaf(self, path: str) -> np.ndarray:
        return widened(*self._adapter.read(path))
