"""Model directories and training checkpoints, opened as logical tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from duetvl.convert.layouts import Model
from duetvl.convert.streaming import Fragment, FragmentedTensors
from duetvl.core.boxes import Box, Shape
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.qwen_vl.config import ModelConfig, load_config
from duetvl.models.qwen_vl.names import canonical_name, canonical_names
from duetvl.models.qwen_vl.weights import open_model_weights
from duetvl.storage.checkpoint_format import StoredTensor, box_name
from duetvl.storage.finding import find_checkpoint, has_checkpoint, parse_run
from duetvl.storage.tensor_files import TensorFile
from duetvl.storage.weights_dir import INDEX, StoredWeights, open_weights, read_shard_index

WEIGHTS: Final = "weights"  # of the kinds of tensors in a checkpoint
_CONFIG: Final = "config.json"


@dataclass(frozen=True)
class SourceModel:
    """A model that can be read whole. path: the directory that it is in, of a run the run's."""

    path: Path
    config: ModelConfig
    model: Model
    tensors: FragmentedTensors


def open_source(
    directory: Path, language: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> SourceModel:
    """A Hugging Face directory, a training checkpoint of ours, or a run: RUN for its newest, RUN@STEP for that one.

    A checkpoint's weights are verified. Of a run a damaged newest one is passed over, and said; a step that is named is
    read or fails. `language`: another directory that the language model's tensors are taken from.
    """
    run, step = (directory, None) if directory.exists() else parse_run(str(directory))
    if step is not None or has_checkpoint(run):
        return _open_checkpoint(run, step, language, say)
    if (run / "export" / _CONFIG).exists() and not (run / _CONFIG).exists():
        raise CheckpointError(f"{run}: has no checkpoint; give the model that it exported: {run / 'export'}")
    config = load_config(run)
    model = Model.of(config)
    weights = open_model_weights(run, config)
    if language is not None:
        weights = _with_language(weights, language, config.tie_word_embeddings)
    weights.check(model.shapes)
    return SourceModel(run, config, model, FragmentedTensors(run, _whole(weights, model.shapes)))


def _whole(weights: StoredWeights, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape, Fragment]]:
    for name, shape in shapes.items():
        store, key = weights.places[name]
        yield name, shape, Fragment(Box.whole(shape), store, key, 0, shape)


def _with_language(weights: StoredWeights, directory: Path, tied: bool) -> StoredWeights:
    other = open_weights(directory, canonical_names(tied))
    places = {name: place for name, place in weights.places.items() if name.startswith("visual.")}
    places |= {name: place for name, place in other.places.items() if not name.startswith("visual.")}
    return StoredWeights(directory, places)


def read_index(directory: Path, shapes: Mapping[str, Shape]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The index of a directory's shards, as it is and as {canonical name: file}; None for one without an index."""
    index = directory / INDEX
    if not index.exists():
        return None
    content = read_shard_index(index)
    if not isinstance(content.setdefault("metadata", {}), dict):
        raise CheckpointError(f"{index}: is not an index of shards: its metadata are no object; download it again")
    tied = "lm_head.weight" not in shapes
    found = {canonical_name(name, tied=tied): file for name, file in content["weight_map"].items()}
    if absent := [name for name in shapes if name not in found]:
        raise CheckpointError(f"{index}: does not name {len(absent)} tensor(s) of its model, such as {absent[0]}")
    files = {name: found[name] for name in shapes}
    if odd := [file for file in files.values() if not re.fullmatch(r"[^/\\]+\.safetensors", str(file))]:
        raise CheckpointError(f"{index}: {odd[0]!r} is no name for a shard")
    return content, files


def open_adapter(directory: Path, prefix: str | None) -> tuple[dict[str, Shape], FragmentedTensors]:
    """An adapter of peft: shapes and tensors by canonical names (`model.layers.0.self_attn.q_proj.lora_A.weight`)."""
    found = sorted(directory.glob("adapter_*.safetensors")) or sorted(directory.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{directory}: has no adapter_model.safetensors")
    shapes: dict[str, Shape] = {}
    parts: list[tuple[str, Shape, Fragment]] = []
    for file in map(TensorFile, found):
        for key, spec in file.specs.items():
            bare = re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", key.removeprefix(prefix or ""))
            name = canonical_name(bare, tied=False) or bare
            if not re.fullmatch(r"(visual|model|lm_head).*\.lora_[AB]\.weight", name):
                raise CheckpointError(
                    f"{file.path}: {key!r} is no LoRA tensor of these models; "
                    f"cfg.common_model_config.model_prefix is {prefix!r}, peft's is 'base_model.model.'"
                )
            if name in shapes:
                raise CheckpointError(f"{file.path}: {name} is stored twice")
            shapes[name] = spec.shape
            parts.append((name, spec.shape, Fragment(Box.whole(spec.shape), file, key, 0, spec.shape)))
    return shapes, FragmentedTensors(directory, parts)


# -- training checkpoints ---------------------------------------------------------------------------------------------


def _open_checkpoint(run: Path, step: int | None, language: Path | None, say: Callable[[str], None]) -> SourceModel:
    if (run / _CONFIG).exists() and has_checkpoint(run):
        raise CheckpointError(
            f"{run}: is a model ({_CONFIG}) and a run (checkpoints/) at once; give one of its checkpoints, or a copy "
            f"of the model alone"
        )
    if language is not None:
        raise ConfigError(f"llm_hf_dir {language}: a run ({run}) has its own language model; leave it out")
    ref = find_checkpoint(run, step, kinds=(WEIGHTS,), pass_over=True)
    for text in ref.rejected:
        say(f"warning: skipped: {text}")
    if ref.path != run:
        say(f"{run}: its checkpoint of step {ref.step} is read")
    directory, manifest = ref.path, ref.manifest
    if not manifest.meta.model_config:
        raise ConfigError(f"{directory}: does not name its model; give the run's export directory instead")
    if manifest.meta.extra.get("base_model"):
        raise CheckpointError(
            f"{directory}: holds the adapters of a LoRA run alone; give a merged model: `duetvl export`, `duetvl merge`"
        )
    config = ModelConfig.from_dict(manifest.meta.model_config, source=f"{directory}: its model_config")
    model = Model.of(config)
    stored = manifest.tensors.get(WEIGHTS, {})
    wrong = [name for name in model.shapes if name not in stored or stored[name].shape != model.shapes[name]]
    if wrong or len(stored) != len(model.shapes):
        what = wrong[0] if wrong else next(name for name in stored if name not in model.shapes)
        raise CheckpointError(f"{directory}: its weights are not those of its model_config: see {what}")
    return SourceModel(run, config, model, FragmentedTensors(directory, _boxes(directory, stored, model)))


def _boxes(directory: Path, stored: Mapping[str, StoredTensor], model: Model) -> Iterator[tuple[str, Shape, Fragment]]:
    files: dict[str, TensorFile] = {}
    for name, tensor in stored.items():
        for part in tensor.boxes:
            store = files[part.file] = files.get(part.file) or TensorFile(directory / Path(part.file).name)
            key, shape = box_name(name, part.box), part.box.shape
            if key not in store.specs or store.specs[key].shape != shape:
                raise CheckpointError(f"{store.path}: has no {key} of shape {shape}, as the manifest says")
            yield name, model.shapes[name], Fragment(part.box, store, key, 0, shape)
