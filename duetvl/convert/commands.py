"""The conversions: what is read, and what is to be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from duetvl.convert.inferred import has_gated_vision, infer_adapter, infer_model
from duetvl.convert.layouts import EMBEDDING, Layout, Model, TensorBox, check_layout, lora_tensors, stored_tensors
from duetvl.convert.mindspeed import LATEST, RELEASE, Format, MindSpeedDirectory, open_mindspeed, plan_mindspeed
from duetvl.convert.names import TOWERS
from duetvl.convert.plans import DirectoryPlan, Options, execute
from duetvl.convert.sources import open_adapter, open_source, read_index
from duetvl.convert.streaming import FetchedTensors, FragmentedTensors, LogicalTensors, Output, plan_tensor_file
from duetvl.convert.verify import differing_copies
from duetvl.convert.vision_order import OLD_RELEASES, read_order
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.qwen_vl.config import ModelConfig, load_config
from duetvl.models.qwen_vl.names import module_name
from duetvl.models.settings import model_settings
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import INDEX, MAX_SHARD_BYTES, plan_shards

FAMILIES: Final = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}


def hf_to_mm(
    hf_dir: Path,
    mm_dir: Path,
    layout: Layout,
    options: Options,
    *,
    family: str | None = None,
    language_dir: Path | None = None,
    vision_only: bool = False,
    kind: Format = "pt",
) -> None:
    """Hugging Face (or a training checkpoint of ours) to MindSpeed-MM."""
    source = open_source(hf_dir, language_dir, options.say)
    _check_family(source.config, family, hf_dir)
    for warning in check_layout(source.model, layout):
        options.say(f"warning: {warning}")
    model = source.model.only("visual.") if vision_only else source.model
    outputs = plan_mindspeed(source.tensors.specs, stored_tensors(model, layout), layout, kind)
    inputs = [source.path] + ([language_dir] if language_dir else [])
    execute(_release(mm_dir, outputs, source.tensors, layout), inputs, options)


def mm_to_hf(
    mm_dir: Path, hf_dir: Path, save_hf_dir: Path, layout: Layout, options: Options, *, family: str | None = None
) -> None:
    """MindSpeed-MM to Hugging Face; shards, configuration and tokenizer as in `hf_dir`."""
    config = load_config(hf_dir)
    _check_family(config, family, hf_dir)
    model = Model.of(config)
    directory = open_mindspeed(mm_dir)
    directory.check(layout, "parallel_config")
    check_placed(model, layout, "parallel_config")
    layout = replace(layout, canonical=directory.layout.canonical)
    directory.logical(model, layout)  # what is missing is named before orders are compared
    order = read_order(directory, layout, model, hf_dir, key="vit_qkv_layout", needed=True, say=options.say)
    tensors = directory.logical(model, replace(layout, vision_qkv=order))
    _check_tied(directory, tensors)
    outputs, texts = _plan_hf(hf_dir, model, tensors.specs)
    execute(DirectoryPlan(save_hf_dir, outputs, tensors, texts, _beside(hf_dir)), [mm_dir, hf_dir], options)


def resplit(
    source_dir: Path,
    target_dir: Path,
    source: Layout,
    target: Layout,
    options: Options,
    *,
    hf_dir: Path | None = None,
    family: str | None = None,
    kind: Format = "pt",
) -> None:
    """One division of a MindSpeed-MM checkpoint to another; fused or canonical stays as it is.

    So does the order of the vision tower's qkv where the target's is not stated, unless the source's is.
    """
    directory = open_mindspeed(source_dir)
    directory.check(source, "source_parallel_config")
    source, target = (replace(layout, canonical=directory.layout.canonical) for layout in (source, target))
    model = _resplit_model(directory, source, target, options, hf_dir=hf_dir, family=family)
    directory.logical(model, source)  # what is missing is named before orders are compared
    needed = target.vision_qkv is not None
    key = "source_vit_qkv_layout"
    order = read_order(directory, source, model, hf_dir, key=key, needed=needed, say=options.say)
    if target.vision_qkv is None and source.vision_qkv is None:
        target = replace(target, vision_qkv=order)
        if order == "hf":
            options.say("it keeps that order; --cfg.target_vit_qkv_layout interleaved writes the one of later releases")
    source = replace(source, vision_qkv=order)
    for warning in check_layout(model, target, "target_parallel_config"):
        options.say(f"warning: {warning}")
    tensors = directory.logical(model, source)
    if hf_dir is not None:  # else the model is taken as tied because they are equal
        _check_tied(directory, tensors)
    outputs = plan_mindspeed(tensors.specs, stored_tensors(model, target), target, kind)
    execute(_release(target_dir, outputs, tensors, target), [source_dir], options)


def _resplit_model(
    directory: MindSpeedDirectory,
    source: Layout,
    target: Layout,
    options: Options,
    *,
    hf_dir: Path | None,
    family: str | None,
) -> Model:
    """The model of `hf_dir`, or as much of it as the files tell; without a language model where they have none."""
    if hf_dir is not None:
        config = load_config(hf_dir)
        _check_family(config, family, hf_dir)
        model = Model.of(config)
    else:
        _check_found_family(directory, family)
        exact = source.replicate_kv or target.replicate_kv or source.vision_order != target.vision_order
        model = infer_model(directory, source, [target], exact=exact)
        if model.tied and directory.has("text_decoder.output_layer."):
            options.say("the head equals the embedding, so the model is treated as tied")
    return model if directory.has("text_decoder.") else model.only("visual.")


def lora_hf_to_mm(
    hf_dir: Path,
    mm_dir: Path,
    layout: Layout,
    options: Options,
    *,
    prefix: str | None,
    family: str = "qwen2_5_vl",
    kind: Format = "pt",
) -> None:
    """An adapter of peft to MindSpeed-MM's canonical structure."""
    shapes, tensors = open_adapter(hf_dir, prefix)
    model = Model(shapes, layout.tp, layout.tp, layout.tp_of("vision"), gated_vision=family == "qwen2_5_vl")
    _check_adapter(model, layout, hf_dir)
    stored = list(lora_tensors(model, layout))
    if lost := sorted(set(shapes) - {piece.name for one in stored for piece in one.pieces}):
        raise CheckpointError(f"{hf_dir}: adapters that MindSpeed-MM has no place for: {', '.join(lost[:3])}")
    execute(_release(mm_dir, plan_mindspeed(tensors.specs, stored, layout, kind), tensors, layout), [hf_dir], options)


def lora_mm_to_hf(
    mm_dir: Path,
    save_hf_dir: Path,
    layout: Layout,
    options: Options,
    *,
    prefix: str | None,
    new_names: bool,
    family: str = "qwen2_5_vl",
    hf_dir: Path | None = None,
) -> None:
    """The adapter in a MindSpeed-MM checkpoint, fused or canonical, to one `adapter_model.safetensors`.

    The one A on fused q, k, v (gate, up) is written for each of them, B is cut into their rows: that is the same
    adapter. `hf_dir` is the model that it is for.
    """
    directory = open_mindspeed(mm_dir)
    directory.check_grid(layout, "parallel_config")  # an adapter need not have every layer
    config = load_config(hf_dir) if hf_dir else None
    if config is not None and hf_dir is not None:
        _check_family(config, family, hf_dir)
        check_placed(Model.of(config), layout, "parallel_config")
    layout = replace(layout, canonical=directory.canonical_adapter(layout.canonical))
    for warning in directory.layers_without_adapter(layout):
        options.say(f"warning: {directory.path}: {warning}")
    if not layout.canonical and not layout.vision_qkv and directory.has_vision_qkv_adapter:
        options.say(
            f"warning: {directory.path}: the vision tower's fused qkv is taken as interleaved by heads; if its base "
            f"goes back to a conversion by {OLD_RELEASES}, add --cfg.vit_qkv_layout hf"
        )
    tensors = directory.lora(infer_adapter(directory, layout, family == "qwen2_5_vl", config), layout)
    for difference in differing_copies(directory.path, tensors):
        raise CheckpointError(f"{difference.name}: {difference.text}; its ranks did not train one adapter")
    names = {name: (prefix or "") + (module_name(name) if new_names else name) for name in tensors.specs}
    specs = {names[name]: spec for name, spec in tensors.specs.items()}
    pieces = {names[name]: _whole(name, spec) for name, spec in tensors.specs.items()}
    output = Output(Path("adapter_model.safetensors"), plan_tensor_file(specs, {"format": "pt"}), pieces)
    inputs = [mm_dir, hf_dir] if hf_dir else [mm_dir]
    execute(DirectoryPlan(save_hf_dir, [output], tensors), inputs, options)


def export_mindspeed_mm(
    target: Path,
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], np.ndarray],
    layout: Layout,
    *,
    kind: Format = "pt",
    overwrite: bool = False,
) -> None:
    """Write the tensors of a model in memory as a MindSpeed-MM release.

    `specs` and `fetch(name)` are by Hugging Face names, whole tensors, as `parameter_shapes(config)` has them
    (bfloat16 as uint16 bits). `fetch` is called from this thread, once for each tensor; those that are fused into one
    are held together, nothing else is.
    """
    model = Model.of(config)
    wrong = [name for name in model.shapes if name not in specs or tuple(specs[name].shape) != model.shapes[name]]
    if wrong:
        raise ConfigError(f"{len(wrong)} tensor(s) of the model are absent or of another shape, such as {wrong[0]}")
    check_layout(model, layout)
    tensors = FetchedTensors({name: specs[name] for name in model.shapes}, fetch)
    outputs = plan_mindspeed(tensors.specs, stored_tensors(model, layout), layout, kind)
    execute(_release(target, outputs, tensors, layout), [], Options(overwrite=overwrite, workers=1))


# -- checks and plans -------------------------------------------------------------------------------------------------


def check_placed(model: Model, layout: Layout, where: str) -> None:
    """Raise ConfigError unless a source's lists place every layer; the order of towers is none of our business."""
    for tower in TOWERS:
        if sum(layout.stages(tower)) != model.layers(tower):
            raise ConfigError(
                f"{where} ({layout.describe()}) places {sum(layout.stages(tower))} {tower} layers, the model has "
                f"{model.layers(tower)}"
            )


def _check_tied(directory: MindSpeedDirectory, tensors: FragmentedTensors) -> None:
    """Raise CheckpointError where the copies of a tied embedding differ: one of them would be lost."""
    for difference in differing_copies(directory.path, tensors, only=(EMBEDDING,)):
        raise CheckpointError(
            f"{difference.name} {difference.text}, but config.json ties the output head to the embedding; set "
            f"tie_word_embeddings to false in hf_dir's config.json to have both"
        )


def _check_family(config: ModelConfig, family: str | None, directory: Path) -> None:
    if family is not None and config.model_type != family:
        raise ConfigError(
            f"{directory}: is a model of type {config.model_type}; use {FAMILIES[config.model_type]} instead of "
            f"{FAMILIES[family]}"
        )


def _check_found_family(directory: MindSpeedDirectory, family: str | None) -> None:
    found = "qwen2_5_vl" if has_gated_vision(directory) else "qwen2_vl"
    if family is not None and any(directory.layout.stages("vision")) and family != found:
        other = f"use {FAMILIES[found]} instead of {FAMILIES[family]}"
        raise ConfigError(f"{directory.path}: has the tensors of {found}; {other}")


def _check_adapter(model: Model, layout: Layout, directory: Path) -> None:
    for tower in TOWERS:
        if model.layers(tower) > sum(layout.stages(tower)):
            raise ConfigError(
                f"parallel_config ({layout.describe()}) has {sum(layout.stages(tower))} {tower} layers, the adapter in "
                f"{directory} is for at least {model.layers(tower)}"
            )
    for stored in lora_tensors(model, layout):
        for piece in stored.pieces:
            for axis, size in enumerate(model.shapes[piece.name]):
                if piece.box.shape[axis] and size % piece.box.shape[axis]:
                    what = f"axis {axis} of {piece.name}, {size} long"
                    raise ConfigError(f"parallel_config: the ranks do not divide {what}")


def _release(target: Path, outputs: Sequence[Output], tensors: LogicalTensors, layout: Layout) -> DirectoryPlan:
    # Without a newline at its end, as MindSpeed-MM writes it.
    return DirectoryPlan(target, outputs, tensors, {LATEST: RELEASE}, private=True, layout=layout)


def _plan_hf(hf_dir: Path, model: Model, specs: Mapping[str, TensorSpec]) -> tuple[list[Output], dict[str, str]]:
    """The shards of the directory that the model came from, under canonical names; our own where it has none."""
    index, files = read_index(hf_dir, model.shapes) or ({}, _own_shards(hf_dir, model, specs))
    outputs = []
    for file in sorted(set(files.values())):
        chosen = {name: specs[name] for name in model.shapes if files[name] == file}
        pieces = {name: _whole(name, spec) for name, spec in chosen.items()}
        outputs.append(Output(Path(file), plan_tensor_file(chosen, {"format": "pt"}), pieces))
    if len(outputs) == 1 and outputs[0].path.name == "model.safetensors":
        return outputs, {}
    metadata = {**index.get("metadata", {}), "total_size": sum(spec.nbytes for spec in specs.values())}
    index = {**index, "metadata": metadata, "weight_map": dict(sorted(files.items()))}
    return outputs, {INDEX: json.dumps(index, indent=2, ensure_ascii=False) + "\n"}


def _own_shards(hf_dir: Path, model: Model, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Tensor -> file: one file where `hf_dir` has one."""
    one_file = (hf_dir / "model.safetensors").exists()
    shards = [list(model.shapes)] if one_file else plan_shards({n: specs[n] for n in model.shapes}, MAX_SHARD_BYTES)
    count = len(shards)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    return {name: file for file, shard in zip(names, shards, strict=True) for name in shard}


def _whole(name: str, spec: TensorSpec) -> tuple[TensorBox, ...]:
    return (TensorBox(name, Box.whole(spec.shape)),)


def _beside(directory: Path) -> dict[str, Path]:
    """The configuration, and the files that belong to the model beside its weights."""
    files = [Path("config.json"), *model_settings(directory)]
    return {str(file): directory / file for file in files}
