"""Low-rank adapters of Qwen2-VL and Qwen2.5-VL: put on a model, read, saved and merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import LocalPart, Shape
from duetvl.core.errors import ConfigError
from duetvl.core.half import narrowed, widened
from duetvl.core.params import Parameter
from duetvl.models.hub import MODELSCOPE
from duetvl.models.linear import row_norms
from duetvl.models.lora import MAGNITUDE, A, Adapters, B, Layers, initial_values, is_adapter, merged_weight
from duetvl.models.model_directory import AdapterTensors, ModelDirectory, open_model
from duetvl.models.peft_files import StoredAdapter, open_adapter, write_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.names import canonical_name, module_name
from duetvl.models.qwen_vl.parameters import PARTS, parameter_shapes
from duetvl.storage.files import staged_directory
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import load_part, write_shards

Tensor = Any
Fetch = Callable[[str], np.ndarray]

_NO_LINEAR: Final = {
    "model.embed_tokens": "the embedding of the vocabulary has no adapter here, only linear layers inside the model do",
    "lm_head": "the head has no adapter here, only linear layers inside the model do: in the small models it is tied "
    "to the embedding",
    "visual.patch_embed.proj": "the patch embedding is a convolution and has no adapter here, only linear layers do",
}


def linear_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The weights (out, in) of the linear layers that may have an adapter, by path."""
    shapes = parameter_shapes(config).items()
    return {path: shape for path, shape in shapes if len(shape) == 2 and path.removesuffix(".weight") not in _NO_LINEAR}


def layers(config: ModelConfig) -> Layers:
    """What targets may name."""
    return Layers([path.removesuffix(".weight") for path in linear_shapes(config)], PARTS, _NO_LINEAR)


# -- on a model -------------------------------------------------------------------------------------------------------


def add_adapters(model: QwenVL, adapters: Adapters, seed: int) -> None:
    """Lay new adapters on a model, which then does what it did before: B is zero.

    The ranks of a model that is divided call it together.
    """
    ops, parts = model.backend.ops, _parts(model, adapters)
    whole = {path: part.whole for path, part in parts.items()}
    tensors = {
        path: ops.from_numpy(np.ascontiguousarray(parts[path].of(values)))
        for path, values in initial_values(whole, seed)
    }
    leaves = model.layout.records(model.parameters)
    for module in filter(model.layout.holds, adapters.sizes if adapters.dora else ()):
        weight, leave = model.parameters[f"{module}.weight"], leaves.get(f"{module}.leave")
        whole_weight = model.layout.whole(weight.path, weight.place.whole, weight.tensor)
        a, b = (tensors[f"{module}.{letter}"] for letter in (A, B))
        tensors[f"{module}.{MAGNITUDE}"] = row_norms(ops, whole_weight, a, b, adapters.scale(module), leave)
    model.put_adapters(adapters, _parameters(tensors, parts))


def open_adapter_for(config: ModelConfig, directory: str | Path) -> StoredAdapter:
    """An adapter on disk, checked to fit a model; CheckpointError or ConfigError where it does not."""
    return open_adapter(
        directory,
        linear_shapes(config),
        rename=lambda name: canonical_name(name, tied=False) or name,
        spell=lambda module: (module_name(module), module),
    )


def load_adapter(model: QwenVL, stored: AdapterTensors) -> None:
    """Lay an adapter from disk on a model, in float32 and in the place of any that it has."""
    parts = _parts(model, stored.adapters)
    tensors = {path: load_part(model.backend, *stored.read(path), "float32", part) for path, part in parts.items()}
    model.put_adapters(stored.adapters, _parameters(tensors, parts))


def _parts(model: QwenVL, adapters: Adapters) -> dict[str, LocalPart]:
    """Those of their tensors that this rank holds, and what it has of each."""
    shapes = adapters.shapes(linear_shapes(model.config))
    return {path: model.layout.part(path, shape) for path, shape in shapes.items() if model.layout.holds(path)}


def _parameters(tensors: Mapping[str, Tensor], parts: Mapping[str, LocalPart]) -> dict[str, Parameter]:
    return {path: Parameter.of(path, tensor, parts[path]) for path, tensor in tensors.items()}


def save_adapter(model: QwenVL, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write a model's adapter as PEFT loads it. The directory appears whole or not at all; see `staged_directory`."""
    adapters = _adapters_of(model)
    tensors = {path: p.tensor for path, p in model.parameters.items() if is_adapter(path)}
    specs = {path: TensorSpec("float32", tuple(x.shape)) for path, x in tensors.items()}

    def fetch(path: str) -> np.ndarray:
        return model.backend.checkpoint_io.save(tensors[path])[0].reshape(specs[path].shape)

    with staged_directory(directory, overwrite=overwrite) as staging:
        base = None if model.source is None else model.source.name
        write_adapter_files(staging, model.config, adapters, specs, fetch, base)


def write_adapter_files(
    staging: Path,
    config: ModelConfig,
    adapters: Adapters,
    specs: Mapping[str, TensorSpec],
    fetch: Fetch,
    base: str | None,
) -> None:
    """Write PEFT's two files; `specs` and `fetch` by our paths, `base` what the user calls the model below.

    An id is written without its hub, which PEFT does not know.
    """
    targets = peft_targets(config, adapters.sizes)
    base = None if base is None else base.removeprefix(MODELSCOPE)
    write_adapter(staging, adapters, specs, fetch, rename=module_name, targets=targets, base=base)


# -- merging ----------------------------------------------------------------------------------------------------------


def merge_adapter(model: QwenVL) -> None:
    """Put what the adapter does into the weights, rounded once to their dtype; the model is then a plain one."""
    ops, adapters = model.backend.ops, _adapters_of(model)
    fetch = _merging(adapters, lambda path: _values(model, path), lambda path: _values(model, path))
    for module in adapters.sizes:
        ops.assign(model.parameters[f"{module}.weight"].tensor, ops.from_numpy(fetch(f"{module}.weight")))
    model.put_adapters(None, {})


def merged_tensors(
    source: ModelDirectory, adapters: Adapters, leaf: Fetch, dtype: str | None = None
) -> tuple[dict[str, TensorSpec], Fetch]:
    """The tensors of a model on disk, merged with an adapter whose float32 tensors `leaf` gives: made one by one, when
    they are asked for, without a framework.

    Each keeps its dtype; with `dtype` they are rounded to that before they are merged, as a model is that is loaded so.
    """
    shapes, weights = parameter_shapes(source.config), source.weights
    specs = {path: TensorSpec(dtype or weights.spec(path).dtype, shape) for path, shape in shapes.items()}
    touched = {f"{module}.weight" for module in adapters.sizes}

    def bits(path: str) -> np.ndarray:
        stored, wanted = weights.spec(path).dtype, specs[path].dtype
        found = np.require(weights.view(path, shapes[path]), requirements="A")
        return found if stored == wanted else narrowed(widened(found, stored), wanted)

    merged = _merging(adapters, lambda path: widened(bits(path), specs[path].dtype), leaf)

    def fetch(path: str) -> np.ndarray:
        made = narrowed(merged(path), specs[path].dtype) if path in touched else bits(path)
        weights.release(path)
        return made

    return specs, fetch


def merge_directories(model: str | Path | ModelDirectory, adapter: str | Path, target: str | Path) -> int:
    """Write the model of a directory merged with an adapter, tensor by tensor and without a framework.

    Every tensor keeps its dtype. A target that exists is refused; it appears whole or not at all. Returns the number
    of layers that were merged.
    """
    source = open_model(model)
    stored = open_adapter_for(source.config, adapter)
    specs, fetch = merged_tensors(source, stored.adapters, lambda path: widened(*stored.read(path)))
    with staged_directory(target) as staging:
        source.copy_settings(staging)
        write_shards(staging, specs, fetch)
        write_config(source.config, staging, specs["model.embed_tokens.weight"].dtype)
    return len(stored.adapters.sizes)


def _merging(adapters: Adapters, weight: Fetch, leaf: Fetch) -> Fetch:
    """A function from a weight's path to its float32 values, merged where it has an adapter."""

    def fetch(path: str) -> np.ndarray:
        module = path.removesuffix(".weight")
        if module not in adapters.sizes:
            return weight(path)
        magnitude = leaf(f"{module}.{MAGNITUDE}") if adapters.dora else None
        a, b = (leaf(f"{module}.{letter}") for letter in (A, B))
        return merged_weight(weight(path), a, b, adapters.scale(module), magnitude)

    return fetch


def _values(model: QwenVL, path: str) -> np.ndarray:
    return model.backend.ops.to_numpy(model.parameters[path].tensor).astype(np.float32, copy=False)


def _adapters_of(model: QwenVL) -> Adapters:
    if model.adapters is None:
        raise ConfigError("this model has no adapter; load one: duetvl.load_model(path, adapter=directory)")
    return model.adapters


# -- PEFT's names -----------------------------------------------------------------------------------------------------


def peft_targets(config: ModelConfig, modules: Iterable[str]) -> list[str] | str:
    """`target_modules` that name exactly these layers: their last names where no other module has one of them, else a
    regular expression, which holds for old and new names of transformers' modules."""
    chosen = set(modules)
    others = [module for module in (*layers(config).modules, *_NO_LINEAR) if module not in chosen]
    names = {module.rsplit(".", 1)[1] for module in chosen}
    if not any(name.isdigit() for name in names) and not names & {other.rsplit(".", 1)[-1] for other in others}:
        return sorted(names)
    kinds: dict[tuple[str, str], list[str]] = {}
    for module in chosen:
        head, layer, rest = _split(module)
        kinds.setdefault((head, rest), []).append(layer)
    patterns = [f"{_layers_pattern(head, layers, config)}{re.escape(rest)}" for (head, rest), layers in kinds.items()]
    return rf"(?:.*\.)?(?:{'|'.join(sorted(patterns))})"


def _split(module: str) -> tuple[str, str, str]:
    """("layers", "3", ".mlp.up_proj"), ("blocks", ...), or ("", "", "merger.mlp.0")."""
    match = re.search(r"(layers|blocks)\.(\d+)(\..+)", module)
    return (match[1], match[2], match[3]) if match else ("", "", module.removeprefix("visual."))


def _layers_pattern(head: str, layers: list[str], config: ModelConfig) -> str:
    if not head:
        return ""
    count = config.text.num_layers if head == "layers" else config.vision.depth
    numbers = r"\d+" if len(layers) == count else f"(?:{'|'.join(sorted(layers, key=int))})"
    return rf"{head}\.{numbers}"
