"""The conversions: what is read, what is written, and that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from duetvl.convert.layouts import Layout, Model, Piece, check_layout, lora_tensors, stored_tensors
from duetvl.convert.mindspeed import (
    LATEST,
    RELEASE,
    Format,
    MindSpeedDirectory,
    infer_model,
    is_mindspeed,
    lora_model,
    open_mindspeed,
    plan_mindspeed,
)
from duetvl.convert.names import TOWERS, VisionOrder
from duetvl.convert.sources import INDEX, Source, open_adapter, open_source, shard_map
from duetvl.convert.streaming import (
    CHUNK,
    FetchedTensors,
    FragmentedTensors,
    LogicalTensors,
    Output,
    Progress,
    plan_tensor_file,
    row_chunks,
    write_files,
)
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.files import WEIGHT_FILES, staged_directory, write_text
from duetvl.core.tensor_files import TensorSpec
from duetvl.core.weights_dir import MAX_SHARD_BYTES, plan_shards
from duetvl.models.qwen_vl.config import ModelConfig, load_config

FAMILIES: Final = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}
_HIDDEN: Final = (".git", ".cache", ".ipynb_checkpoints")
_BASE_MEMORY: Final = 120 * 10**6  # Python, numpy, headers


@dataclass(frozen=True)
class Options:
    """How to go about it. `start(bytes)` gives what to tell of the progress; `say` takes lines."""

    overwrite: bool = False
    dry_run: bool = False
    workers: int = 2
    start: Callable[[int], Progress | None] = lambda _: None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Plan:
    """A directory to be made. `texts` and `copies` are small files of it; `private`: modes as MindSpeed-MM's."""

    target: Path
    outputs: Sequence[Output]
    source: LogicalTensors
    texts: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    private: bool = False
    layout: Layout | None = None

    @property
    def size(self) -> int:
        """Bytes of the files of tensors."""
        return sum(output.file.size for output in self.outputs)


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
    source = open_source(hf_dir, language_dir)
    _check_family(source.config, family, hf_dir)
    for warning in check_layout(source.model, layout):
        options.say(f"warning: {warning}")
    model = source.model.only("visual.") if vision_only else source.model
    outputs = plan_mindspeed(source.tensors.specs, stored_tensors(model, layout), layout, kind)
    inputs = [hf_dir] + ([language_dir] if language_dir else [])
    _execute(_release(mm_dir, outputs, source.tensors, layout), inputs, options)


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
    tensors = directory.logical(model, _as_found(layout, directory.layout))
    outputs, texts = _plan_hf(hf_dir, model, tensors.specs)
    _execute(Plan(save_hf_dir, outputs, tensors, texts, _beside(hf_dir)), [mm_dir, hf_dir], options)


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
    """One division of a MindSpeed-MM checkpoint to another; fused or canonical stays as it is."""
    directory = open_mindspeed(source_dir)
    directory.check(source, "source_parallel_config")
    source, target = (_as_found(layout, directory.layout) for layout in (source, target))
    if hf_dir is not None:
        config = load_config(hf_dir)
        _check_family(config, family, hf_dir)
        model = Model.of(config)
    else:
        _check_found_family(directory.layout, directory.has(_VISION_BIAS), family, source_dir)
        exact = source.replicate_kv or target.replicate_kv or source.vision_qkv != target.vision_qkv
        model = infer_model(directory, source, [target], exact=exact)
        if model.tied and directory.has("text_decoder.output_layer."):
            options.say("the head has the numbers of the embedding, so the model is taken as tied")
    vision_only = not directory.has("text_decoder.")
    if vision_only:
        model = model.only("visual.")
    tensors = directory.logical(model, source)
    for warning in check_layout(model, target, "target_parallel_config"):
        options.say(f"warning: {warning}")
    outputs = plan_mindspeed(tensors.specs, stored_tensors(model, target), target, kind)
    _execute(_release(target_dir, outputs, tensors, target), [source_dir], options)


def lora_hf_to_mm(
    hf_dir: Path, mm_dir: Path, layout: Layout, options: Options, *, prefix: str | None, kind: Format = "pt"
) -> None:
    """An adapter of peft to MindSpeed-MM's canonical structure."""
    shapes, tensors = open_adapter(hf_dir, prefix)
    model = Model(shapes, layout.tp, layout.tp, layout.tp_of("vision"), gated_vision=True)
    _check_adapter(model, layout, hf_dir)
    stored = list(lora_tensors(model, layout))
    if lost := sorted(set(shapes) - {piece.name for one in stored for piece in one.pieces}):
        raise CheckpointError(f"{hf_dir}: adapters that MindSpeed-MM has no place for: {', '.join(lost[:3])}")
    _execute(_release(mm_dir, plan_mindspeed(tensors.specs, stored, layout, kind), tensors, layout), [hf_dir], options)


def lora_mm_to_hf(
    mm_dir: Path, save_hf_dir: Path, layout: Layout, options: Options, *, prefix: str | None, new_names: bool
) -> None:
    """The adapter in a MindSpeed-MM checkpoint to one `adapter_model.safetensors`."""
    directory = open_mindspeed(mm_dir)
    directory.check_grid(layout, "parallel_config")  # an adapter need not have every layer
    model = lora_model(directory, layout)
    tensors = directory.lora(model, layout)
    names = {name: (prefix or "") + (_new_name(name) if new_names else name) for name in tensors.specs}
    specs = {names[name]: spec for name, spec in tensors.specs.items()}
    pieces = {names[name]: _whole(name, spec) for name, spec in tensors.specs.items()}
    output = Output(Path("adapter_model.safetensors"), plan_tensor_file(specs, {"format": "pt"}), pieces)
    _execute(Plan(save_hf_dir, [output], tensors), [mm_dir], options)


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
    _execute(_release(target, outputs, tensors, layout), [], Options(overwrite=overwrite, workers=1))


# -- checks and plans -------------------------------------------------------------------------------------------------

_VISION_BIAS: Final = "image_encoder.encoder.blocks.layers.0.input_layernorm.bias"


def check_placed(model: Model, layout: Layout, where: str) -> None:
    """Raise ConfigError unless a source's lists place every layer; the order of towers is none of our business."""
    for tower in TOWERS:
        if sum(layout.stages(tower)) != model.layers(tower):
            raise ConfigError(
                f"{where} ({layout.describe()}) places {sum(layout.stages(tower))} {tower} layers, the model has "
                f"{model.layers(tower)}"
            )


def _as_found(stated: Layout, found: Layout) -> Layout:
    """Whether q, k, v are fused is what the files show."""
    return Layout(
        stated.text, stated.vision, stated.tp, stated.vision_tp, found.canonical, stated.vision_qkv, stated.replicate_kv
    )


def _check_family(config: ModelConfig, family: str | None, directory: Path) -> None:
    if family is not None and config.model_type != family:
        raise ConfigError(
            f"{directory}: is a model of type {config.model_type}; use {FAMILIES[config.model_type]} instead of "
            f"{FAMILIES[family]}"
        )


def _check_found_family(layout: Layout, layer_norm: bool, family: str | None, directory: Path) -> None:
    found = "qwen2_vl" if layer_norm else "qwen2_5_vl"
    if family is not None and any(layout.stages("vision")) and family != found:
        other = f"use {FAMILIES[found]} instead of {FAMILIES[family]}"
        raise ConfigError(f"{directory}: has the tensors of {found}; {other}")


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


def _release(target: Path, outputs: Sequence[Output], tensors: LogicalTensors, layout: Layout) -> Plan:
    # Without a newline at its end, as MindSpeed-MM writes it.
    return Plan(target, outputs, tensors, {LATEST: RELEASE}, private=True, layout=layout)


def _plan_hf(hf_dir: Path, model: Model, specs: Mapping[str, TensorSpec]) -> tuple[list[Output], dict[str, str]]:
    """The shards of the directory that the model came from, under canonical names; our own where it has none."""
    files = shard_map(hf_dir, model.shapes)
    if files is None:
        one_file = (hf_dir / "model.safetensors").exists()
        shards = [list(model.shapes)] if one_file else plan_shards({n: specs[n] for n in model.shapes}, MAX_SHARD_BYTES)
        count = len(shards)
        names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
        names = names if count > 1 else ["model.safetensors"]
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    outputs = []
    for file in sorted(set(files.values())):
        chosen = {name: specs[name] for name in model.shapes if files[name] == file}
        pieces = {name: _whole(name, spec) for name, spec in chosen.items()}
        outputs.append(Output(Path(file), plan_tensor_file(chosen, {"format": "pt"}), pieces))
    if len(outputs) == 1 and outputs[0].path.name == "model.safetensors":
        return outputs, {}
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    return outputs, {INDEX: json.dumps(index, indent=2) + "\n"}


def _whole(name: str, spec: TensorSpec) -> tuple[Piece, ...]:
    return (Piece(name, Box.whole(spec.shape)),)


def _new_name(name: str) -> str:
    """As modules are called in transformers >= 4.52."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _beside(directory: Path) -> dict[str, Path]:
    """All that lies beside the weights, at any depth."""
    found = {}
    for folder, names, files in os.walk(directory):
        names[:] = sorted(name for name in names if name not in _HIDDEN)
        for name in files:
            path = Path(folder) / name
            if path.suffix != ".safetensors" and not any(path.match(pattern) for pattern in WEIGHT_FILES):
                found[str(path.relative_to(directory))] = path
    return found


# -- doing it ---------------------------------------------------------------------------------------------------------


def _execute(plan: Plan, inputs: Sequence[Path], options: Options) -> None:
    _check_apart(plan.target, inputs)
    if options.dry_run:
        for line in _describe(plan, options):
            options.say(line)
        return
    _check_space(plan)
    progress, started = options.start(plan.size), time.monotonic()
    try:
        with staged_directory(plan.target, overwrite=options.overwrite) as staging:
            write_files(staging, plan.outputs, plan.source, workers=options.workers, progress=progress)
            for name, path in plan.copies.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, staging / name)
            for name, text in plan.texts.items():
                write_text(staging / name, text)
            if plan.private:
                _set_modes(staging)
    except OSError as error:
        raise CheckpointError(f"{plan.target}: cannot be written: {error.strerror or error}") from None
    finally:
        getattr(progress, "close", lambda: None)()
    seconds = max(time.monotonic() - started, 1e-3)
    options.say(
        f"{plan.target}: {len(plan.outputs)} file(s), {_bytes(plan.size)} in {seconds:.1f} s "
        f"({_bytes(plan.size / seconds)}/s)"
    )


def _check_apart(target: Path, inputs: Sequence[Path]) -> None:
    """A source is never written to, not even with overwrite."""
    for path in inputs:
        a, b = target.resolve(), path.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ConfigError(f"{target}: is not apart from the source {path}; choose another directory")


def _check_space(plan: Plan) -> None:
    there = plan.target.absolute().parent
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise CheckpointError(f"{plan.target}: cannot be written: {there} is no directory that may be written to")
    free = shutil.disk_usage(there).free
    needed = plan.size + sum(path.stat().st_size for path in plan.copies.values())
    if needed > free:
        raise CheckpointError(f"{plan.target}: needs {_bytes(needed)}, but {there} has {_bytes(free)} free")


def _set_modes(staging: Path) -> None:
    for folder, _, names in os.walk(staging):
        os.chmod(folder, 0o750)
        for name in names:
            os.chmod(Path(folder) / name, 0o640)


def _describe(plan: Plan, options: Options) -> Iterator[str]:
    yield f"{plan.target} would be written; nothing is"
    if plan.layout is not None:
        yield from _describe_stages(plan.layout)
    for output in plan.outputs:
        yield f"  {output.path}: {_bytes(output.file.size)}, {len(output.tensors)} tensor(s)"
    for name in (*plan.texts, *plan.copies):
        yield f"  {name}"
    there = plan.target.absolute().parent
    while not there.exists():
        there = there.parent
    yield (
        f"{len(plan.outputs)} file(s) of tensors, {_bytes(plan.size)}; free: {_bytes(shutil.disk_usage(there).free)}; "
        f"memory: about {_bytes(predicted_peak(plan, options.workers))} with {options.workers} worker(s)"
    )


def _describe_stages(layout: Layout) -> Iterator[str]:
    firsts = {"vision": 0, "text": 0}
    for stage in range(layout.pp * layout.vpp):
        parts = []
        for tower, title in (("vision", "vision"), ("text", "language")):
            count = layout.stages(tower)[stage]  # type: ignore[arg-type]
            span = f"{title} layers {firsts[tower]} to {firsts[tower] + count - 1}"
            parts.append(span if count else f"no {title} layers")
            firsts[tower] += count
        virtual = f", virtual stage {stage // layout.pp}" if layout.vpp > 1 else ""
        yield f"  pipeline rank {stage % layout.pp}{virtual}: {', '.join(parts)}"


def predicted_peak(plan: Plan, workers: int) -> int:
    """Most memory that writing takes: for each worker a chunk, the pages it was cut from, and a copy of it."""
    widest = 0
    for output in plan.outputs:
        for pieces in output.tensors.values():
            for piece in pieces:
                spec = plan.source.specs[piece.name]
                box = next(row_chunks(spec, piece.box))
                size = spec.nbytes * box.volume // max(Box.whole(spec.shape).volume, 1)
                cut = spec.nbytes * box.shape[0] // spec.shape[0] if box.volume else 0
                widest = max(widest, 2 * size + 2 * cut)
    return _BASE_MEMORY + workers * max(widest, CHUNK)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ."""

    name: str
    text: str


def verify(
    a: Path, b: Path, *, orders: tuple[VisionOrder, VisionOrder], hf_dir: Path | None = None
) -> Iterator[Difference | str]:
    """Compare two checkpoints of any layouts; the names of equal tensors, and what differs, one by one."""
    first, second = _open_both(a, b, orders, hf_dir)
    for path, tensors in ((a, first), (b, second)):
        yield from _differing_copies(path, tensors)
    for name in sorted(set(first.specs) | set(second.specs)):
        if name not in first.specs or name not in second.specs:
            yield Difference(name, f"absent in {a if name not in first.specs else b}")
            continue
        text = _difference(name, first, second)
        yield Difference(name, text) if text else name


def _open_both(
    a: Path, b: Path, orders: tuple[VisionOrder, VisionOrder], hf_dir: Path | None
) -> tuple[FragmentedTensors, FragmentedTensors]:
    opened = [open_mindspeed(path) if is_mindspeed(path) else open_source(path) for path in (a, b)]
    layouts = [
        _with_order(each.layout, order)
        for each, order in zip(opened, orders, strict=True)
        if isinstance(each, MindSpeedDirectory)
    ]
    models = [Model.of(load_config(hf_dir))] if hf_dir else []
    models += [each.model for each in opened if isinstance(each, Source)]
    if not models:
        exact = len({(each.canonical, each.vision_qkv) for each in layouts}) > 1
        assert isinstance(opened[0], MindSpeedDirectory)  # as neither is a Source
        models = [infer_model(opened[0], layouts[0], layouts[1:], exact=exact)]
    found = []
    for each in opened:
        if isinstance(each, Source):
            found.append(each.tensors)
        else:
            seen = models[0] if each.has("text_decoder.") else models[0].only("visual.")
            found.append(each.logical(seen, layouts[0 if each is opened[0] else -1]))
    return found[0], found[1]


def _with_order(layout: Layout, order: VisionOrder) -> Layout:
    return Layout(layout.text, layout.vision, layout.tp, layout.vision_tp, layout.canonical, order, True)


def _differing_copies(path: Path, tensors: FragmentedTensors) -> Iterator[Difference]:
    """What every rank should have alike, such as norms and a tied head."""
    for name, copy in tensors.copies:
        if not np.array_equal(copy.view(copy.box), tensors.read(name, copy.box)):
            yield Difference(name, f"differs between its copies in {path}: see {copy.key} in {copy.store.path}")
        copy.store.release(copy.key)
        tensors.release(name)


def _difference(name: str, first: FragmentedTensors, second: FragmentedTensors) -> str:
    a, b = first.specs[name], second.specs[name]
    if a.shape != b.shape:
        return f"shape {list(a.shape)} and {list(b.shape)}"
    count, largest = 0, 0.0
    for box in row_chunks(a, Box.whole(a.shape)):
        x, y = first.read(name, box), second.read(name, box)
        if a.dtype != b.dtype or not np.array_equal(x, y):
            gaps = np.abs(_numbers(x, a.dtype) - _numbers(y, b.dtype))
            unlike = (x != y) if a.dtype == b.dtype else gaps != 0
            count += int(np.count_nonzero(unlike))
            largest = max(largest, float(np.max(gaps, initial=0.0, where=~np.isnan(gaps))))
        first.release(name)
        second.release(name)
    dtypes = f"dtype {a.dtype} and {b.dtype}; " if a.dtype != b.dtype else ""
    if not count:
        return f"{dtypes}the numbers are equal" if dtypes else ""
    return f"{dtypes}{count} of {Box.whole(a.shape).volume} numbers differ, by up to {largest:.3g}"


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)
