"""Low-rank adapters of a model: which linear layers have one, of what kind, and what merging gives.

An adapter's tensors are parameters like others, at `PATH.lora_A.weight` (rank, in), `PATH.lora_B.weight` (out, rank)
and with DoRA `PATH.lora_magnitude_vector.weight` (out,), beside the layer's own `PATH.weight`. The tree without them is
the model without its adapter.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import Shape
from duetvl.core.errors import ConfigError
from duetvl.core.patterns import Parts, matching, require_matching
from duetvl.core.random import philox
from duetvl.models.linear import Adapter

A: Final = "lora_A.weight"
B: Final = "lora_B.weight"
MAGNITUDE: Final = "lora_magnitude_vector.weight"
_LEAF: Final = re.compile(r"\.lora_(?:A|B|magnitude_vector)\.weight$")


@dataclass(frozen=True)
class Size:
    """Rank and alpha of one layer's adapter."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model by module path, such as `model.layers.0.self_attn.q_proj`; tensors are elsewhere.

    rslora: scaled by alpha / sqrt(rank) (arXiv:2312.03732) instead of alpha / rank. dora: with magnitudes
    (arXiv:2402.09353). dropout is of an adapter's input while training.
    """

    sizes: Mapping[str, Size]
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def scale(self, module: str) -> float:
        """What the product B A is multiplied by."""
        size = self.sizes[module]
        return size.alpha / (math.sqrt(size.rank) if self.rslora else size.rank)

    def shapes(self, weights: Mapping[str, Shape]) -> dict[str, Shape]:
        """Path and shape of every tensor, for layers with these shapes (out, in) of `PATH.weight`."""
        found: dict[str, Shape] = {}
        for module, size in self.sizes.items():
            rows, columns = weights[f"{module}.weight"]
            found[f"{module}.{A}"] = (size.rank, columns)
            found[f"{module}.{B}"] = (rows, size.rank)
            if self.dora:
                found[f"{module}.{MAGNITUDE}"] = (rows,)
        return found

    def leaves(
        self, key: Sequence[int] = (), rows_of: Callable[[str], np.ndarray | None] = lambda module: None
    ) -> dict[str, Adapter]:
        """The records that `linear` looks for, by path. `key` names a pass that trains: with it there is dropout.

        `rows_of` gives the numbers of the rows that a module sees among those of the whole pass; None: it sees all.
        """
        return {f"{module}.lora": self._leaf(module, key, rows_of(module)) for module in self.sizes}

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes the same."""
        sizes = {module: [size.rank, size.alpha] for module, size in self.sizes.items()}
        return {"sizes": sizes, "dropout": self.dropout, "rslora": self.rslora, "dora": self.dora}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Adapters:
        """What `to_json` wrote; KeyError or TypeError for anything else."""
        sizes = {module: Size(rank, alpha) for module, (rank, alpha) in values["sizes"].items()}
        return cls(sizes, values["dropout"], values["rslora"], values["dora"])

    def _leaf(self, module: str, key: Sequence[int], rows: np.ndarray | None) -> Adapter:
        site = (*key, zlib.crc32(module.encode())) if key else ()
        return Adapter(self.scale(module), self.dropout, site, rows)


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return _LEAF.search(path) is not None


def initial_values(shapes: Mapping[str, Shape], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """First values of all A and B among these shapes (`Adapters.shapes`), float32; the magnitudes are the norms of the
    rows of the weights.

    As in PEFT: A uniform within 1 / sqrt(in) (He et al., arXiv:1502.01852, with a = sqrt(5)), B zero. Each has a random
    stream of its own.
    """
    for path, shape in shapes.items():
        if path.endswith(A):
            bound = 1 / math.sqrt(shape[1])
            yield path, philox(seed, path).uniform(-bound, bound, shape).astype(np.float32)
        elif path.endswith(B):
            yield path, np.zeros(shape, np.float32)


def merged_weight(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, magnitude: np.ndarray | None = None
) -> np.ndarray:
    """The weight (out, in) of a plain layer that does what `weight` and its adapter do; everything float32."""
    both = weight + np.float32(scale) * (b @ a)
    if magnitude is None:
        return both
    norms = np.sqrt(np.square(both).sum(1) + np.float32(1e-30))
    return both * (magnitude / norms)[:, None]


# -- which layers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """The linear layers that may have an adapter: their modules, the parts of the model, and of modules that may not
    have one the reason."""

    modules: Sequence[str]
    parts: Parts
    refused: Mapping[str, str]

    def choose(self, targets: Sequence[str], frozen: Sequence[str] = ()) -> list[str]:
        """The modules that any target names, in their order, without what is frozen; see `core.patterns.matching`.

        ConfigError for a target that names no layer, or only frozen ones.
        """
        weights = {f"{module}.weight": module for module in self.modules}
        shut = {weights[path] for pattern in frozen for path in matching(pattern, weights, self.parts)}
        chosen: set[str] = set()
        for target in targets:
            free = set(self._named(target)) - shut
            if not free:
                raise ConfigError(f"lora.targets: model.freeze ({', '.join(frozen)}) freezes all that {target!r} names")
            chosen |= free
        return [module for module in self.modules if module in chosen]

    def _named(self, target: str) -> list[str]:
        found = matching(target, self.modules, self.parts)
        for module, reason in self.refused.items():
            if not found and matching(target, [module], self.parts):
                raise ConfigError(f"lora.targets: {target!r}: {reason}")
        return found or require_matching("lora.targets", [target], self.modules, self.parts)[target]
