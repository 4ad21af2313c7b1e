"""The keys of mm-convert's commands, and how they are given: flags, a YAML file, the environment.

The grammar is that of the tool that users come from (jsonargparse): `--cfg.a.b value` or `--cfg.a.b=value`, lists as
JSON whether the shell has split them at blanks or not, `--cfg.a '{"b": 1}'` for a whole section, `--config FILE`, and
with JSONARGPARSE_DEFAULT_ENV=true the variables MM_CONVERT_CONVERTER__COMMAND__CFG__A__B. Later ones win: defaults,
environment, file, flags.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from duetvl.core.errors import ConfigError, did_you_mean

Kind = Literal["path", "directory", "layers", "count", "natural", "switch", "text"]
REQUIRED: Final = object()
_WORDS: Final = {
    "path": "a path", "directory": "an existing directory", "count": "a whole number from 1",
    "layers": "a list of layers for each stage: [1,10,10,7], or a row for each virtual stage: [[1,10],[10,7]]",
    "natural": "a whole number from 0", "switch": "true or false", "text": "text",
}  # fmt: skip
_TRUE: Final = ("true", "yes", "on", "1", "y", "t")
_FALSE: Final = ("false", "no", "off", "0", "n", "f")


@dataclass(frozen=True)
class Key:
    """One key below `cfg`. choices: the only values there are."""

    name: str
    kind: Kind
    help: str
    default: Any = REQUIRED
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """In words."""
        return " or ".join(self.choices) if self.choices else _WORDS[self.kind]


def _parallel(prefix: str, what: str) -> tuple[Key, ...]:
    return (
        Key(f"{prefix}.llm_pp_layers", "layers", f"layers of the language model in each pipeline stage {what}"),
        Key(f"{prefix}.vit_pp_layers", "layers", f"layers of the vision tower in each pipeline stage {what}"),
        Key(f"{prefix}.tp_size", "count", f"ranks of tensor parallelism {what}", 1),
        Key(f"{prefix}.vit_tp_size", "natural", "the same for the vision tower; 0: as tp_size", 0),
        Key(f"{prefix}.ep_size", "count", "expert parallelism; these models have no experts, so 1", 1),
        Key(f"{prefix}.audio_pp_layers", "layers", "these models have no audio tower, so null", None),
        Key(f"{prefix}.audio_tp_size", "natural", "these models have no audio tower, so 0", 0),
    )


_IGNORED: Final = "accepted for compatibility; what the model has is read from its config.json"
_COMMON: Final = (
    Key("common_model_config.enable_canonical_hf_struct", "switch",
        "q, k, v and gate, up as in Hugging Face, not fused", False),
    Key("common_model_config.new_transformers_weight_key", "switch",
        "LoRA: adapters are named as in transformers >= 4.52 (both are read; this says which to write)", False),
    Key("common_model_config.model_prefix", "text", "LoRA: what peft puts before names, base_model.model.", None),
    Key("common_model_config.llm_hf_dir", "directory", "as llm_hf_config.hf_dir", None),
    *(Key(f"common_model_config.{name}", "natural", _IGNORED, 0)
      for name in ("num_experts", "num_key_value_heads", "llm_num_layers", "vit_num_layers")),
    Key("common_model_config.audio_num_layers", "natural", _IGNORED, None),
    Key("common_model_config.tie_word_embeddings", "switch", _IGNORED, False),
)  # fmt: skip
_HF: Final = Key("hf_config.hf_dir", "directory", "model directory in the Hugging Face layout")
_TRUST: Final = Key("trust_remote_code", "switch", "accepted for compatibility; no code of a model is ever run", False)
_FROM: Final = "take the language model's tensors from this directory"
_LANGUAGE: Final = Key("llm_hf_config.hf_dir", "directory", _FROM, None)
_NO_LANGUAGE: Final = Key("llm_hf_config.hf_dir", "directory", "accepted for compatibility; has no effect here", None)
_OURS: Final = (
    Key("overwrite", "switch", "replace what is there; without it an existing target is refused", False),
    Key("dry_run", "switch", "print files, sizes and stages, and write nothing", False),
    Key("workers", "natural", "threads; 0: one for each core, at most 4", 0),
)
_FORMAT: Final = Key("format", "text", "files of torch, or safetensors in the same tree", "pt", ("pt", "safetensors"))
_REPLICATE: Final = Key(
    "replicate_kv", "switch", "allow more ranks than key and value heads, with copies of those heads", False
)


def _order(name: str = "vit_qkv_layout") -> Key:
    text = "order of rows in the vision tower's fused qkv; hf: as releases 2.1.0 to 2.3.0 wrote it"
    return Key(name, "text", text, None, ("interleaved", "hf"))


_MM_TO_HF: Final = (
    Key("save_hf_dir", "path", "directory to be made, in the Hugging Face layout"),
    Key("mm_dir", "directory", "MindSpeed-MM checkpoint to be read"),
)
_HF_TO_MM: Final = (Key("mm_dir", "path", "MindSpeed-MM checkpoint directory to be made"),)

COMMANDS: Final[Mapping[str, tuple[str, tuple[Key, ...]]]] = {
    "hf_to_mm": (
        "Convert Hugging Face weights (or a training checkpoint of duetvl) to MindSpeed-MM",
        (*_HF_TO_MM, _HF, *_parallel("parallel_config", "of training"),
         Key("save_vit_only", "switch", "only the vision tower and the projector", False),
         *_COMMON, _LANGUAGE, _TRUST, _order(), _REPLICATE, _FORMAT, *_OURS),
    ),
    "mm_to_hf": (
        "Convert MindSpeed-MM weights to Hugging Face",
        (*_MM_TO_HF, _HF, *_parallel("parallel_config", "of the checkpoint"),
         *_COMMON, _NO_LANGUAGE, _TRUST, _order(), _REPLICATE, *_OURS),
    ),
    "resplit": (
        "Divide MindSpeed-MM weights over other stages and ranks",
        (Key("source_dir", "directory", "MindSpeed-MM checkpoint to be read"),
         Key("target_dir", "path", "MindSpeed-MM checkpoint directory to be made"),
         *_parallel("source_parallel_config", "of the source"), *_parallel("target_parallel_config", "of the target"),
         Key("hf_config.hf_dir", "directory", "model directory with a config.json: lets heads be checked", None),
         _order("source_vit_qkv_layout"), _order("target_vit_qkv_layout"), _REPLICATE, _FORMAT, *_OURS),
    ),
    "lora_hf_to_mm": (
        "Convert a LoRA adapter of peft to MindSpeed-MM",
        (*_HF_TO_MM, Key("hf_config.hf_dir", "directory", "directory of the adapter (safetensors)"),
         *_parallel("parallel_config", "of training"),
         Key("save_vit_only", "switch", "has no effect on adapters", False),
         *_COMMON, _NO_LANGUAGE, _TRUST, _FORMAT, *_OURS),
    ),
    "lora_mm_to_hf": (
        "Convert a LoRA adapter of MindSpeed-MM to one adapter_model.safetensors",
        (*_MM_TO_HF, *_parallel("parallel_config", "of the checkpoint"),
         Key("hf_config.hf_dir", "directory", "not needed", None), *_COMMON, _NO_LANGUAGE, _TRUST, *_OURS),
    ),
    "verify": (
        "Compare two checkpoints of any layouts tensor by tensor",
        (Key("hf_config.hf_dir", "directory", "model directory with a config.json, where neither has one", None),
         _order("a_vit_qkv_layout"), _order("b_vit_qkv_layout")),
    ),
}  # fmt: skip


def parse_flags(tokens: Sequence[str], keys: Sequence[Key], files: list[str]) -> dict[str, Any]:
    """Values by key. Names of files to be read are added to `files`. Raises ConfigError."""
    values: dict[str, Any] = {}
    for name, words in _flags(tokens):
        if name == "--config":
            files.append(_single(name, words))
            continue
        if name != "--cfg" and not name.startswith("--cfg."):
            raise ConfigError(f"unknown option {name}{did_you_mean(name, _spelled(keys))}")
        path = name.removeprefix("--cfg").removeprefix(".")
        known = {key.name: key for key in keys}
        if path in known:
            values[path] = convert(known[path], _value(known[path], words))
        elif not path or any(key.startswith(f"{path}.") for key in known):
            values |= flatten(_json(_single(name, words), name), keys, name, path)
        else:
            raise ConfigError(_unknown(path, keys))
    return values


def flatten(tree: Any, keys: Sequence[Key], source: str, path: str = "") -> dict[str, Any]:
    """Values by key of a nested mapping. Raises ConfigError naming `source`."""
    known = {key.name: key for key in keys}
    if path in known:
        return {} if tree is None and known[path].default is not REQUIRED else {path: convert(known[path], tree)}
    if path and not any(key.startswith(f"{path}.") for key in known):
        raise ConfigError(f"{source}: {_unknown(path, keys)}")
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source}: cfg{'.' * bool(path)}{path} is {tree!r}, expected a section")
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flatten(value, keys, source, f"{path}.{name}".lstrip("."))
    return found


def from_environment(environment: Mapping[str, str], keys: Sequence[Key], prefix: str) -> dict[str, Any]:
    """Values by key that variables such as PREFIX__CFG__PARALLEL_CONFIG__TP_SIZE give."""
    if environment.get("JSONARGPARSE_DEFAULT_ENV", "").lower() != "true":
        return {}
    names = {f"{prefix}__CFG__{key.name.replace('.', '__')}".upper(): key for key in keys}
    return {key.name: convert(key, environment[name]) for name, key in names.items() if name in environment}


def complete(values: Mapping[str, Any], keys: Sequence[Key]) -> dict[str, Any]:
    """With defaults, and nothing missing."""
    missing = [key for key in keys if key.default is REQUIRED and values.get(key.name) is None]
    if missing:
        told = "; ".join(f"--cfg.{key.name} ({key.help})" for key in missing)
        raise ConfigError(f"missing: {told}")
    return {key.name: values.get(key.name, key.default) for key in keys}


def convert(key: Key, value: Any) -> Any:
    """A value as text, or as YAML and JSON have it, checked. Raises ConfigError naming the key."""
    if isinstance(value, str) and value.strip().lower() in ("null", "none", "~") and key.default is None:
        return None
    if value is None and key.default is None:
        return None
    try:
        return _checked(key, value)
    except (ValueError, TypeError, OSError) as error:
        shown = str(value)
        cause = f": {error}" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"--cfg.{key.name}: found {shown[:80]!r}, expected {key.allowed}{cause}") from None


def _checked(key: Key, value: Any) -> Any:
    if key.choices:
        if value not in key.choices:
            raise ValueError
        return value
    if key.kind == "layers":
        return _layers(json.loads(value) if isinstance(value, str) else value)
    if key.kind in ("count", "natural"):
        number = int(value) if isinstance(value, str) else value
        if type(number) is not int or number < (key.kind == "count"):
            raise ValueError
        return number
    if key.kind == "switch":
        word = str(value).strip().lower()
        if word not in (*_TRUE, *_FALSE):
            raise ValueError
        return word in _TRUE
    if not isinstance(value, str) or not (value or key.kind == "text"):
        raise ValueError
    if key.kind == "directory" and not Path(value).is_dir():
        raise FileNotFoundError("no such directory")
    return value if key.kind == "text" else Path(value)


def _layers(value: Any) -> tuple[tuple[int, ...], ...]:
    rows = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if not all(isinstance(row, list) and row and all(type(n) is int and n >= 0 for n in row) for row in rows):
        raise ValueError
    return tuple(tuple(row) for row in rows)


def _flags(tokens: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Options, each with the words up to the next."""
    current: tuple[str, list[str]] | None = None
    for token in tokens:
        if token.startswith("--"):
            if current:
                yield current
            name, equals, value = token.partition("=")
            current = (name, [value] if equals else [])
        elif current is None:
            raise ConfigError(f"unexpected argument {token!r}; options begin with --cfg.")
        else:
            current[1].append(token)
    if current:
        yield current


def _value(key: Key, words: list[str]) -> Any:
    if key.kind == "layers":  # the shell splits [[1, 10], [9, 8]] at its blanks
        return "".join(words)
    if key.kind == "switch" and not words:
        return True
    return _single(f"--cfg.{key.name}", words)


def _single(name: str, words: list[str]) -> str:
    if len(words) != 1:
        raise ConfigError(f"{name} takes one value, found {' '.join(words) or 'none'}")
    return words[0]


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name}: expected JSON such as '{{\"tp_size\": 2}}': {error}") from None


def _unknown(path: str, keys: Sequence[Key]) -> str:
    return f"there is no key cfg.{path}{did_you_mean(path, (key.name for key in keys))}"


def _spelled(keys: Sequence[Key]) -> list[str]:
    return ["--config", "--help", "--print_config", *(f"--cfg.{key.name}" for key in keys)]


# -- telling ----------------------------------------------------------------------------------------------------------


def describe(keys: Sequence[Key]) -> Iterator[str]:
    """Every key with what it means, for --help."""
    for key in keys:
        default = "required" if key.default is REQUIRED else f"default {show(key.default)}"
        yield f"  --cfg.{key.name}"
        yield f"        {key.help} ({key.allowed}; {default})"


def as_yaml(keys: Sequence[Key], values: Mapping[str, Any], flags: Sequence[str] = ()) -> Iterator[str]:
    """A file for --config with the values as they stand; flags: comments, skip_null, skip_default."""
    yield "cfg:"
    section = ""
    for key in sorted(keys, key=lambda key: "." in key.name):
        value = values.get(key.name, None if key.default is REQUIRED else key.default)
        skipped = (value is None and "skip_null" in flags) or (value == key.default and "skip_default" in flags)
        head, _, leaf = key.name.rpartition(".")
        if skipped:
            continue
        if head != section:
            section = head
            yield f"  {head}:"
        indent = "    " if head else "  "
        if "comments" in flags:
            yield f"{indent}# {key.help} ({key.allowed})"
        yield f"{indent}{leaf}: {show(value)}"


def show(value: Any) -> str:
    """As YAML and the command line take it."""
    if isinstance(value, tuple):
        return json.dumps([list(row) for row in value], separators=(",", ":"))
    if isinstance(value, (str, Path)):
        return json.dumps(str(value))
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))
