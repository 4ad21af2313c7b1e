"""Adapter directories as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are stored as `base_model.model.` + the module's name in transformers + `.lora_A.weight`, `.lora_B.weight`, and
for DoRA `.lora_magnitude_vector` without a further name. What a configuration asks for and duetvl does not do is an
error: an adapter never loses a part without a word.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import Shape
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.lora import MAGNITUDE, A, Adapters, Size
from duetvl.storage.files import read_object, write_text
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file
from duetvl.storage.weights_dir import count_and_name

Spell = Callable[[str], tuple[str, str]]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_FLOATS: Final = ("float32", "bfloat16", "float16", "float64")
_TENSOR: Final = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(\.[^.]+)??(\.weight)?")

# What a configuration may say beside what is read below; each is about how the adapter was made, or is told by the
# tensors themselves.
_WITHOUT_EFFECT: Final = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})  # fmt: skip
_READ: Final = frozenset(
    {"alpha_pattern", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern", "use_dora", "use_rslora"}
)
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on disk. `tensors` has, by our path, its file's name of the tensor."""

    directory: Path
    adapters: Adapters
    file: TensorFile
    tensors: Mapping[str, str]

    def read(self, path: str) -> tuple[np.ndarray, str]:
        """The bits of a tensor as a mapped array, which need not be aligned, and their dtype's name."""
        name = self.tensors[path]
        return self.file.view(name), self.file.specs[name].dtype

    def shape(self, path: str) -> Shape:
        """Shape of a tensor."""
        return self.file.specs[self.tensors[path]].shape


def open_adapter(
    directory: str | Path, weights: Mapping[str, Shape], rename: Callable[[str], str], spell: Spell
) -> StoredAdapter:
    """Read the configuration and the header of an adapter, and check that it fits a model.

    `weights` are the shapes (out, in) of the weights that may have an adapter, `rename` makes a module's name in
    transformers ours, and `spell` gives what transformers calls ours, now and in the past. CheckpointError for what is
    missing, damaged or of another model, ConfigError for what duetvl does not implement.
    """
    directory = Path(directory)
    config = _read_config(directory)
    _refuse_unimplemented(config, directory)
    if not (directory / WEIGHTS).is_file():
        raise CheckpointError(f"{directory}: has no {WEIGHTS}{_pickled(directory)}")
    file = TensorFile(directory / WEIGHTS)
    tensors = _paths(file, rename)
    heads = {path.removesuffix(f".{A}"): name for path, name in tensors.items() if path.endswith(f".{A}")}
    own = {module: name.removeprefix(PREFIX).partition(".lora_A")[0] for module, name in heads.items()}
    ranks = {module: (*file.specs[name].shape, 0)[0] for module, name in heads.items()}
    sizes, unused = _sizes(config, directory / CONFIG, own, ranks, spell)
    adapters = Adapters(
        sizes,
        dropout=_dropout(config, directory / CONFIG),
        rslora=_flag(config, "use_rslora", directory / CONFIG),
        dora=_flag(config, "use_dora", directory / CONFIG),
    )
    stored = StoredAdapter(directory, adapters, file, tensors)
    _check(stored, weights)
    for text in unused:
        warnings.warn(f"{directory / CONFIG}: {text}", stacklevel=3)
    return stored


def write_adapter(
    directory: Path,
    adapters: Adapters,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], np.ndarray],
    *,
    rename: Callable[[str], str],
    targets: list[str] | str,
    base: str | None,
) -> None:
    """Write both files into a directory that exists.

    `specs` and `fetch(path)` are by our paths; `rename` gives a module's name in transformers; `targets` is PEFT's
    target_modules, `base` the name of the model that the adapter belongs to.
    """
    stored = {_stored_name(path, rename): path for path in specs}
    write_tensor_file(
        directory / WEIGHTS,
        {name: specs[path] for name, path in stored.items()},
        lambda name: fetch(stored[name]),
        {"format": "pt"},
    )
    ranks = {rename(module): size.rank for module, size in adapters.sizes.items()}
    alphas = {rename(module): size.alpha for module, size in adapters.sizes.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": adapters.dropout,
        "target_modules": targets,
        "use_rslora": adapters.rslora,
        "use_dora": adapters.dora,
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: _whole(one) for name, one in alphas.items() if one != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


# -- the configuration ------------------------------------------------------------------------------------------------


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give the directory of an adapter in PEFT's layout")
    if not (directory / CONFIG).is_file():
        run = (directory / "checkpoints").is_dir() or (directory / "manifest.json").is_file()
        hint = "; write a run's adapter with `duetvl export`" if run else ""
        raise CheckpointError(f"{directory}: has no {CONFIG}, so it is not an adapter in PEFT's layout{hint}")
    return read_object(directory / CONFIG, CheckpointError)


def _refuse_unimplemented(config: Mapping[str, Any], directory: Path) -> None:
    where = directory / CONFIG
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type {config.get('peft_type')!r} is not implemented; only LORA is")
    if config.get("modules_to_save"):
        raise ConfigError(
            f"{where}: modules_to_save {config['modules_to_save']}: whole layers trained beside an adapter are not "
            f"implemented; merge with PEFT (merge_and_unload) and use the merged model"
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights {start!r} changes the base model's weights; save the adapter with PEFT's "
            f"path_initial_model_for_weight_conversion first, which turns it into a plain one"
        )
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{where}: bias {config['bias']!r}: trained biases are not implemented; only 'none' is")
    known = _READ | _WITHOUT_EFFECT | {"bias", "modules_to_save"}
    if other := sorted(key for key, value in config.items() if key not in known and value):
        raise ConfigError(f"{where}: {', '.join(f'{key} {config[key]!r}' for key in other)}: not implemented")


def _flag(config: Mapping[str, Any], key: str, where: Path) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} {value!r} must be true or false")
    return bool(value)


def _dropout(config: Mapping[str, Any], where: Path) -> float:
    value = config.get("lora_dropout") or 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{where}: lora_dropout {value!r} must be a number from 0 to below 1")
    return float(value)


def _sizes(
    config: Mapping[str, Any], where: Path, own: Mapping[str, str], ranks: Mapping[str, int], spell: Spell
) -> tuple[dict[str, Size], list[str]]:
    """Rank and alpha of each module, patterns included; the rank that the configuration says must be the tensors'.
    And what is to be said of patterns that match nothing.

    `own` has the name in the file of each module, `ranks` the rows of its A, both by our path. Patterns are of the
    names that the adapter was trained with, which are those of its tensors. Where none of them matches a module, its
    current name is tried, as PEFT does today with an old file; and its old one where the ranks prove that those are
    meant.
    """
    rank_of = _Pattern(config, "r", "rank_pattern", where)
    alpha_of = _Pattern(config, "lora_alpha", "alpha_pattern", where)
    names: dict[str, Sequence[str]] = {module: (name, spell(module)[0]) for module, name in own.items()}
    if any(rank_of(names[module]) != rank for module, rank in ranks.items()):
        every: dict[str, Sequence[str]] = {module: (name, *spell(module)) for module, name in own.items()}
        if all(rank_of(every[module]) == rank for module, rank in ranks.items()):
            names = every
    sizes: dict[str, Size] = {}
    for module, stored in ranks.items():
        rank, alpha = rank_of(names[module]), alpha_of(names[module])
        if not rank > 0 or not 0 < alpha < math.inf:
            raise ConfigError(f"{where}: {module}: rank {rank:g} and alpha {alpha:g} must be more than 0")
        if rank != stored:
            raise CheckpointError(f"{where.parent}: {module}.{A} has {stored} rows, {CONFIG} says rank {rank:g}")
        sizes[module] = Size(int(rank), alpha)
    unused = [text for pattern in (rank_of, alpha_of) if (text := pattern.unused(names.values()))]
    return sizes, unused


class _Pattern:
    """A number of PEFT's configuration that may differ between modules.

    The first pattern that matches the whole name of a module, or its end after a dot, gives it, else the default.
    """

    def __init__(self, config: Mapping[str, Any], default: str, patterns: str, where: Path):
        self.field = patterns
        try:
            self.default = float(config[default])
            given = dict(config.get(patterns) or {}).items()
            # The same groups as in PEFT, so that a pattern with a back reference means the same.
            self.patterns = {one: (re.compile(rf"(.*\.)?({one})$"), float(value)) for one, value in given}
        except (KeyError, TypeError, ValueError, OverflowError, re.error) as error:
            raise CheckpointError(f"{where}: {default} or {patterns} cannot be read: {error!r}") from None

    def __call__(self, names: Sequence[str]) -> float:
        """The number of a module; a later name of it counts where no pattern matches an earlier one."""
        matches = (value for name in names for pattern, value in self.patterns.values() if pattern.match(name))
        return next(matches, self.default)

    def unused(self, modules: Iterable[Sequence[str]]) -> str:
        """What is to be said of patterns that match no module, of which PEFT warns too; empty where there are none."""
        names = [name for module in modules for name in module]
        found = [one for one, (pattern, _) in self.patterns.items() if not any(map(pattern.match, names))]
        return f"{self.field}: {found[0]!r} matches no layer of the adapter, so it has no effect" if found else ""


# -- the tensors ------------------------------------------------------------------------------------------------------


def _paths(file: TensorFile, rename: Callable[[str], str]) -> dict[str, str]:
    """Our path -> the name in the file."""
    found: dict[str, str] = {}
    for name in file.specs:
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise CheckpointError(f"{file.path}: {name!r} is not a tensor of a LoRA adapter of linear layers")
        path = f"{rename(match['module'])}.{match['kind']}.weight"
        if path in found:
            raise CheckpointError(f"{file.path}: {path} is stored twice: {found[path]!r} and {name!r}")
        found[path] = name
    return found


def _check(stored: StoredAdapter, weights: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors are those of these layers."""
    modules = dict.fromkeys(path.rsplit(".", 2)[0] for path in stored.tensors)
    unknown = [module for module in modules if f"{module}.weight" not in weights]
    halves = [module for module in modules if module not in stored.adapters.sizes]
    known = {m: size for m, size in stored.adapters.sizes.items() if f"{m}.weight" in weights}
    wanted = Adapters(known, dora=stored.adapters.dora).shapes(weights)
    common = [path for path in wanted if path in stored.tensors]
    wrong = [path for path in common if stored.shape(path) != wanted[path]]
    extra = [p for p in stored.tensors if p.endswith(MAGNITUDE)] if not stored.adapters.dora else []
    dtypes = {path: stored.file.specs[name].dtype for path, name in stored.tensors.items()}
    problems = [
        count_and_name("of layers that the model does not have", unknown),
        count_and_name("without its lora_A", halves),
        count_and_name("of another shape", [_shapes(path, stored.shape(path), wanted[path]) for path in wrong]),
        count_and_name("absent", [path for path in wanted if path not in stored.tensors]),
        count_and_name("though use_dora is not set", extra),
        count_and_name("not floating point", [f"{p} {dtype}" for p, dtype in dtypes.items() if dtype not in _FLOATS]),
        "" if modules else "it has no tensors",
    ]
    if any(problems):
        raise CheckpointError(
            f"{stored.directory}: is an adapter for another model: {'; '.join(filter(None, problems))}. "
            f"Give the model that it was trained on"
        )


def _shapes(path: str, found: Shape, wanted: Shape) -> str:
    return f"{path} {list(found)} instead of {list(wanted)}"


def _pickled(directory: Path) -> str:
    if (directory / "adapter_model.bin").exists():
        return "; adapter_model.bin is a pickle, which duetvl does not open: save it again with PEFT"
    return ""


def _stored_name(path: str, rename: Callable[[str], str]) -> str:
    module, kind, leaf = path.rsplit(".", 2)
    suffix = "" if kind == "lora_magnitude_vector" else f".{leaf}"
    return f"{PREFIX}{rename(module)}.{kind}{suffix}"


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _whole(number: float) -> float:
    """An integer where it is one: PEFT's alpha is annotated so."""
    return int(number) if number == int(number) else number
