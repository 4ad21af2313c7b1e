"""The keys of mm-convert's commands, as jsonargparse reads them: one dataclass for each command, one for each section.

The text below a field is what --help says of it. The names are those of MindSpeed-MM's tool, all but those of `Ours`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

from jsonargparse.typing import register_type

from duetvl.convert.layouts import Layout
from duetvl.convert.names import VisionOrder
from duetvl.core.errors import CheckpointError, ConfigError, shown
from duetvl.core.stages import as_rows
from duetvl.storage.finding import parse_run

VitQkvLayout = Literal["auto", "interleaved", "hf"]

# -- types ------------------------------------------------------------------------------------------------------------


class Layers(tuple[tuple[int, ...], ...]):
    """Layers of each pipeline stage, a row for each virtual stage."""


class Count(int):
    """A whole number from 1."""


class Natural(int):
    """A whole number from 0."""


class Target(str):
    """A directory to be made."""


class Directory(str):
    """A directory that exists."""


class SourcePath(str):
    """A directory that exists, or a step of a run: RUN@STEP."""


_ONE: Final = Count(1)
_NONE: Final = Natural(0)


def _layers(value: object) -> Layers:
    allowed = "a list of layers for each stage, [1,10,10,7], or a row for each virtual stage, [[1,10],[10,7]]"
    try:
        rows = as_rows(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, RecursionError):
        raise ValueError(f"expected {allowed}, found {shown(value)}") from None
    return Layers(rows)


def _whole(kind: type[int], least: int) -> Callable[[object], int]:
    def convert(value: object) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not text.isascii() or not text.isdigit() or not least <= int(text) < 10**9:
            raise ValueError(f"expected a whole number from {least}, found {shown(value)}")
        return kind(text)

    return convert


def _target(value: object) -> Target:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected the path of a directory, found {shown(value)}")
    return Target(value)


def _directory(value: object) -> Directory:
    if not isinstance(value, str) or not Path(value).is_dir():
        raise ValueError(f"expected an existing directory, found {shown(value)}")
    return Directory(value)


def _source(value: object) -> SourcePath:
    try:
        run, step = (Path(value), None) if Path(str(value)).is_dir() else parse_run(str(value))  # type: ignore[arg-type]
    except CheckpointError:
        run, step = Path(), None
    if not isinstance(value, str) or not run.is_dir() or (run != Path(value) and step is None):
        raise ValueError(f"expected an existing directory, found {shown(value)}")
    return SourcePath(value)


register_type(Layers, lambda rows: [list(row) for row in rows], _layers)
register_type(Count, int, _whole(Count, 1))
register_type(Natural, int, _whole(Natural, 0))
register_type(Target, str, _target)
register_type(Directory, str, _directory)
register_type(SourcePath, str, _source)


# -- sections ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Division over pipeline stages and ranks of tensor parallelism"""

    llm_pp_layers: Layers
    """layers of the language model in each pipeline stage: [1,10,10,7], with virtual stages a row for each"""
    vit_pp_layers: Layers
    """layers of the vision tower in each pipeline stage"""
    tp_size: Count = _ONE
    """ranks of tensor parallelism"""
    vit_tp_size: Natural = _NONE
    """the same for the vision tower; 0: as tp_size"""
    ep_size: Count = _ONE
    """expert parallelism; these models have no experts, so 1"""
    audio_pp_layers: Layers | None = None
    """these models have no audio tower, so null"""
    audio_tp_size: Natural = _NONE
    """these models have no audio tower, so 0"""


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """Model directory in the Hugging Face layout"""

    hf_dir: Directory
    """model directory: configuration, tokenizer, names of shards; its weights show the order of the vision qkv"""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What is converted"""

    hf_dir: SourcePath
    """model directory in the Hugging Face layout, or a run of duetvl (RUN, RUN@STEP), or one of its checkpoints"""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The adapter"""

    hf_dir: Directory
    """directory of the adapter (safetensors)"""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Model directory in the Hugging Face layout"""

    hf_dir: Directory | None = None
    """model directory with a config.json: says what heads there are; its weights show the order of the vision qkv"""


@dataclass(frozen=True, kw_only=True)
class LlmHfConfig:
    """Another language model"""

    hf_dir: Directory | None = None
    """hf_to_mm: take the language model's tensors from this directory"""


@dataclass(frozen=True, kw_only=True)
class CommonModelConfig:
    """The model"""

    enable_canonical_hf_struct: bool = False
    """q, k, v and gate, up as in Hugging Face, not fused"""
    new_transformers_weight_key: bool = False
    """LoRA: adapters are named as in transformers >= 4.52 (both are read; this says which to write)"""
    model_prefix: str | None = None
    """LoRA: what peft puts before names, base_model.model."""
    llm_hf_dir: Directory | None = None
    """as llm_hf_config.hf_dir"""
    num_experts: Natural = _NONE
    """accepted for compatibility; what the model has is read from its config.json"""
    num_key_value_heads: Natural = _NONE
    """accepted for compatibility"""
    llm_num_layers: Natural = _NONE
    """accepted for compatibility"""
    vit_num_layers: Natural = _NONE
    """accepted for compatibility"""
    audio_num_layers: Natural | None = None
    """accepted for compatibility"""
    tie_word_embeddings: bool = False
    """accepted for compatibility"""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What the original has not."""

    overwrite: bool = False
    """replace what is there; without it an existing target is refused"""
    dry_run: bool = False
    """print files, sizes and stages, and write nothing"""
    workers: Natural = _NONE
    """threads; 0: one for each core, at most 4"""


@dataclass(frozen=True, kw_only=True)
class _Release:
    format: Literal["pt", "safetensors"] = "pt"
    """files of torch, or safetensors in the same tree"""


@dataclass(frozen=True, kw_only=True)
class _Model(Ours):
    common_model_config: CommonModelConfig = field(default_factory=CommonModelConfig)
    llm_hf_config: LlmHfConfig = field(default_factory=LlmHfConfig)
    trust_remote_code: bool = False
    """accepted for compatibility; no code of a model is ever run"""


@dataclass(frozen=True, kw_only=True)
class _Replicated:
    replicate_kv: bool = False
    """allow more ranks than key and value heads, with copies of those heads"""


# -- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HfToMm(_Model, _Replicated, _Release):
    """Keys"""

    mm_dir: Target
    """MindSpeed-MM checkpoint directory to be made"""
    hf_config: SourceConfig
    parallel_config: ParallelConfig
    save_vit_only: bool = False
    """only the vision tower and the projector"""
    vit_qkv_layout: VitQkvLayout = "auto"
    """order of rows in the vision tower's fused qkv; auto: interleaved; hf: as releases 2.1.0 to 2.3.0 wrote it"""


@dataclass(frozen=True, kw_only=True)
class MmToHf(_Model, _Replicated):
    """Keys"""

    save_hf_dir: Target
    """directory to be made, in the Hugging Face layout"""
    mm_dir: Directory
    """MindSpeed-MM checkpoint to be read"""
    hf_config: HfConfig
    parallel_config: ParallelConfig
    vit_qkv_layout: VitQkvLayout = "auto"
    """order of rows in the vision tower's fused qkv; auto: as hf_dir's weights show; hf: as releases 2.1.0 to 2.3.0"""


@dataclass(frozen=True, kw_only=True)
class Resplit(Ours, _Replicated, _Release):
    """Keys"""

    source_dir: Directory
    """MindSpeed-MM checkpoint to be read"""
    target_dir: Target
    """MindSpeed-MM checkpoint directory to be made"""
    source_parallel_config: ParallelConfig
    target_parallel_config: ParallelConfig
    hf_config: BaseConfig = field(default_factory=BaseConfig)
    source_vit_qkv_layout: VitQkvLayout = "auto"
    """order of rows in the source's fused vision qkv; auto: as hf_dir's weights show; hf: as releases 2.1.0 to 2.3.0"""
    target_vit_qkv_layout: VitQkvLayout = "auto"
    """the target's; auto: the source's, or interleaved where that is stated"""


@dataclass(frozen=True, kw_only=True)
class LoraHfToMm(_Model, _Release):
    """Keys"""

    mm_dir: Target
    """MindSpeed-MM checkpoint directory to be made"""
    hf_config: AdapterConfig
    parallel_config: ParallelConfig
    save_vit_only: bool = False
    """has no effect on adapters"""


@dataclass(frozen=True, kw_only=True)
class LoraMmToHf(_Model):
    """Keys"""

    save_hf_dir: Target
    """directory to be made"""
    mm_dir: Directory
    """MindSpeed-MM checkpoint to be read"""
    parallel_config: ParallelConfig
    hf_config: BaseConfig = field(default_factory=BaseConfig)
    vit_qkv_layout: VitQkvLayout = "auto"
    """order of rows in the vision tower's fused qkv; auto: interleaved; hf: its base is of releases 2.1.0 to 2.3.0"""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Keys"""

    hf_config: BaseConfig = field(default_factory=BaseConfig)
    a_vit_qkv_layout: VitQkvLayout = "auto"
    """order of rows in the fused vision qkv of A; auto: as the other side, or hf_dir, shows"""
    b_vit_qkv_layout: VitQkvLayout = "auto"
    """the same of B"""


# -- what they mean ---------------------------------------------------------------------------------------------------


def layout_of(
    config: ParallelConfig,
    where: str,
    order: VitQkvLayout = "auto",
    *,
    canonical: bool = False,
    replicate: bool = False,
) -> Layout:
    """The division that a section states. Raises ConfigError for what these models do not have."""
    if config.ep_size != 1:
        raise ConfigError(f"--cfg.{where}.ep_size must be 1: these models have no experts")
    if config.audio_pp_layers or config.audio_tp_size:
        raise ConfigError(f"--cfg.{where}.audio_*: these models have no audio tower; leave it out")
    sizes = int(config.tp_size), int(config.vit_tp_size)
    rows = tuple(config.llm_pp_layers), tuple(config.vit_pp_layers)
    return Layout(*rows, *sizes, canonical, stated(order), replicate)


def stated(order: VitQkvLayout) -> VisionOrder | None:
    """An order that is stated; None for `auto`."""
    return None if order == "auto" else order


def key_tree(command: type) -> Mapping[str, Any]:
    """Every key below a dataclass: {name: type, section: {name: type}}."""
    hints = get_type_hints(command)
    return {
        each.name: key_tree(hints[each.name]) if is_dataclass(hints[each.name]) else hints[each.name]
        for each in fields(command)
    }


def key_names(tree: Mapping[str, Any], path: str = "cfg") -> Iterator[str]:
    """Every key and section in full: `cfg.parallel_config`, `cfg.parallel_config.tp_size`."""
    yield path
    for name, below in tree.items():
        if isinstance(below, Mapping):
            yield from key_names(below, f"{path}.{name}")
        else:
            yield f"{path}.{name}"


COMMANDS: Final[Mapping[str, type]] = {
    "hf_to_mm": HfToMm,
    "mm_to_hf": MmToHf,
    "resplit": Resplit,
    "lora_hf_to_mm": LoraHfToMm,
    "lora_mm_to_hf": LoraMmToHf,
    "verify": Verify,
}
