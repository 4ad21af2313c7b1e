"""`config.json` of both families as a table: which key is which field, how it is read, and how it is written.

A key that a file lacks takes the default of transformers' configuration class where that default is the value of every
published model, and is an error where it is not: those defaults (a vision width of 3584, 4 tokens per second, an
epsilon of 1e-5, the shape of the 72B model) are no model's. transformers 4.45 to 4.49 leave out what equals a default
of the vision tower's class, so in a file of theirs every absent key has that value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from duetvl.core.errors import ConfigError, shown

# Far beyond any model; what is larger is a damaged file, and would fill the memory before a weight is read.
MOST_LAYERS: Final = 1000
MOST: Final = 2**24
LARGEST: Final = 1e12

VISION_THETA: Final = 10000.0  # in no config.json before transformers 5, which has it in the code of both towers
_REQUIRED: Final = object()


class Section:
    """One object of the file, read key by key with errors that name the key."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, found {shown(values)}")
        self.values = values
        self.where = where

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise ConfigError(f"{self.where}: {key} is missing")
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, least: int = 0, most: int = MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, expected an integer from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, most: float = LARGEST) -> float:
        """A positive number of at most `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, expected a positive number of at most {most:g}")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of numbers of layers, or of so few others."""
        value = self.get(key, default)
        fits = isinstance(value, list | tuple) and len(value) <= MOST_LAYERS
        if not fits or any(type(item) is not int or not 0 <= item <= MOST for item in value):
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, expected a list of integers from 0 to {MOST}")
        return tuple(value)

    def choice(self, key: str, default: str, known: Sequence[str]) -> str:
        """One of the words that are implemented."""
        value = self.get(key, default)
        if value not in known:
            raise ConfigError(f"{self.where}: {key} {shown(value)} is not implemented; known: {', '.join(known)}")
        return str(value)

    def flag(self, key: str) -> bool | None:
        """true or false; None where the key is absent or null."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, expected true or false")
        return value


@dataclass(frozen=True)
class Key:
    """A key of the file and the field that it is. `write` makes its value of the whole configuration or part."""

    name: str
    field: str
    read: Callable[[Section], Any]
    write: Callable[[Any], Any]


def read_fields(keys: Sequence[Key], section: Section) -> dict[str, Any]:
    """The fields of a table by name. Raises ConfigError."""
    return {key.field: key.read(section) for key in keys}


def write_fields(keys: Sequence[Key], value: Any) -> dict[str, Any]:
    """The keys of a table with the values of a configuration; those without a value are left out."""
    written = {key.name: key.write(value) for key in keys}
    return {name: one for name, one in written.items() if one is not None}


def _plain(name: str, field: str, read: Callable[[Section], Any]) -> Key:
    return Key(name, field, read, lambda value: getattr(value, field))


def _size(name: str, field: str, default: Any = _REQUIRED, most: int = MOST) -> Key:
    return _plain(name, field, lambda section: section.integer(name, default, 1, most))


def _number(name: str, field: str, default: Any = _REQUIRED, most: float = LARGEST) -> Key:
    return _plain(name, field, lambda section: section.number(name, default, most))


def _token(name: str, default: int) -> Key:
    return _plain(name, name, lambda section: section.integer(name, default))


def _choice(name: str, field: str, default: str, *others: str) -> Key:
    return _plain(name, field, lambda section: section.choice(name, default, (default, *others)))


# -- the vision tower -------------------------------------------------------------------------------------------------


def _vision_theta(vision: Section) -> float:
    """transformers 5.20 and later write it."""
    rope = Section(vision.get("rope_parameters", {}), f"{vision.where}: rope_parameters")
    rope.choice("rope_type", "axial", ("axial", "default"))
    return rope.number("rope_theta", VISION_THETA)


def _write_vision_theta(vision: Any) -> dict[str, Any] | None:
    theta = vision.rope_theta
    return None if theta == VISION_THETA else {"rope_type": "axial", "rope_theta": theta}


def _channels(vision: Section) -> int:
    return vision.integer("in_channels", vision.get("in_chans", 3), 1)


def _plain_mlp(vision: Section) -> int:
    width = int(vision.integer("embed_dim", least=1) * vision.number("mlp_ratio", 4))
    if not 1 <= width <= MOST:
        raise ConfigError(f"{vision.where}: mlp_ratio {vision.get('mlp_ratio', 4)} makes an MLP of {width} numbers")
    return width


def _write_ratio(vision: Any) -> float:
    width, inner = vision.hidden_size, vision.intermediate_size
    ratio = inner // width if inner % width == 0 else inner / width
    # transformers truncates the product, so stay clear of the edge
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


_VISION: Final = (
    _size("depth", "depth", most=MOST_LAYERS),
    _size("num_heads", "num_heads"),
    _plain("in_channels", "channels", _channels),
    _size("patch_size", "patch", 14),
    _size("temporal_patch_size", "temporal", 2),
    _size("spatial_merge_size", "merge", 2),
    Key("rope_parameters", "rope_theta", _vision_theta, _write_vision_theta),
)
# Here `hidden_size` is the language model's width; the tower's own is `embed_dim`.
_QWEN2_VISION: Final = (
    *_VISION,
    _choice("hidden_act", "activation", "quick_gelu", "gelu"),
    _size("embed_dim", "hidden_size"),
    Key("mlp_ratio", "intermediate_size", _plain_mlp, _write_ratio),
    _size("hidden_size", "out_hidden_size"),
)
_QWEN2_5_VISION: Final = (
    *_VISION,
    _choice("hidden_act", "activation", "silu"),
    _size("hidden_size", "hidden_size"),
    _size("intermediate_size", "intermediate_size"),
    _size("out_hidden_size", "out_hidden_size"),
    _size("window_size", "window", 112),
    Key(
        "fullatt_block_indexes",
        "full_attention_layers",
        lambda vision: vision.integers("fullatt_block_indexes", (7, 15, 23, 31)),
        lambda vision: list(vision.full_attention_layers),
    ),
    _number("tokens_per_second", "tokens_per_second", most=1000),
)


@dataclass(frozen=True)
class Family:
    """How one family's config.json describes its vision tower.

    fixed: fields that no key says. width: the key that is the language model's width where it is absent. defaults:
    those of the class in transformers 4.45 to 4.49.
    """

    architecture: str
    vision: tuple[Key, ...]
    fixed: Mapping[str, Any]
    width: str
    defaults: Mapping[str, Any]

    def read_vision(self, data: Mapping[str, Any], source: str, text_width: int) -> dict[str, Any]:
        """The fields of `vision_config`."""
        values = Section(data.get("vision_config"), f"{source}: vision_config").values
        known = self.defaults if _leaves_out_defaults(data) else {self.width: text_width}
        return {**self.fixed, **read_fields(self.vision, Section({**known, **values}, f"{source}: vision_config"))}


FAMILIES: Final = {
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _QWEN2_VISION,
        {"norm": "layer_norm", "mlp": "plain"},
        "hidden_size",
        {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN2_5_VISION,
        {"norm": "rms_norm", "mlp": "gated"},
        "out_hidden_size",
        {
            "depth": 32,
            "hidden_size": 3584,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "tokens_per_second": 4,
        },
    ),
}


def version(data: Mapping[str, Any]) -> tuple[int, int]:
    """The release of transformers that wrote a file, such as (4, 49); of a development version the one before, and
    (0, 0) where the file does not say."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.\d+)?(\.dev)?", str(data.get("transformers_version")))
    return (int(found[1]), int(found[2]) - bool(found[3])) if found else (0, 0)


def _leaves_out_defaults(data: Mapping[str, Any]) -> bool:
    """(4, 44): development versions of 4.45 have both families' first classes."""
    return (4, 44) <= version(data) <= (4, 49)


# -- the language model -----------------------------------------------------------------------------------------------


def _kv_heads(text: Section) -> int:
    """An explicit null means one per head, in transformers as here; a missing key is an error."""
    null = "num_key_value_heads" in text.values
    return text.integer("num_key_value_heads", text.get("num_attention_heads") if null else _REQUIRED, 1)


def _rope(text: Section) -> Section:
    """`rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    key = "rope_scaling" if text.values.get("rope_scaling") else "rope_parameters"
    if not text.values.get(key):
        raise ConfigError(f"{text.where}: rope_scaling is missing; it holds mrope_section")
    rope = Section(text.values[key], f"{text.where}: {key}")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ("mrope", "default"):
        raise ConfigError(f"{rope.where}: rope type {shown(kind)} is not implemented; known: mrope, default")
    return rope


def _rope_theta(text: Section) -> float:
    return _rope(text).number("rope_theta", text.number("rope_theta", 1e6))


def _mrope_section(text: Section) -> tuple[int, ...]:
    rope = _rope(text)
    sections = rope.integers("mrope_section")
    if len(sections) != 3:
        raise ConfigError(f"{rope.where}: mrope_section {list(sections)} needs three numbers: time, height, width")
    return sections


TEXT: Final = (
    _size("vocab_size", "vocab_size"),
    _size("num_hidden_layers", "num_layers", most=MOST_LAYERS),
    _size("hidden_size", "hidden_size"),
    _size("intermediate_size", "intermediate_size"),
    _size("num_attention_heads", "num_heads"),
    _plain("num_key_value_heads", "num_kv_heads", _kv_heads),
    _number("rms_norm_eps", "norm_eps"),
    _choice("hidden_act", "activation", "silu"),
    _plain("rope_theta", "rope_theta", _rope_theta),
    Key(
        "rope_scaling",
        "mrope_section",
        _mrope_section,
        lambda text: {"type": "mrope", "mrope_section": list(text.mrope_section)},
    ),
    _size("max_position_embeddings", "max_positions", 32768, most=2**40),
)


# -- the whole --------------------------------------------------------------------------------------------------------


def _dtype(top: Section) -> str | None:
    value = top.values.get("torch_dtype") or top.values.get("dtype")
    return None if value is None else str(value).removeprefix("torch.")


# Read from the keys of the language model, in which `text_config` has its say.
TOP: Final = (
    _token("image_token_id", 151655),
    _token("video_token_id", 151656),
    _token("vision_start_token_id", 151652),
    _token("vision_end_token_id", 151653),
    _number("initializer_range", "initializer_range", 0.02),
    _plain("torch_dtype", "dtype", _dtype),
)
# Read as well, and derived or written from elsewhere.
_ALSO: Final = {
    "model_type", "text_config", "vision_config", "tie_word_embeddings", "dtype", "rope_parameters", "layer_types",
}  # fmt: skip


def text_section(data: Mapping[str, Any], source: str) -> Section:
    """The language model's keys, flat or in `text_config`, which wins as in transformers.

    Raises ConfigError for what a file may ask for that this code would silently not do.
    """
    nested = Section(data.get("text_config") or {}, f"{source}: text_config").values
    text = Section({**data, **{key: one for key, one in nested.items() if one is not None or key not in data}}, source)
    layer_types = text.values.get("layer_types") or ()
    sliding = isinstance(layer_types, list | tuple) and "sliding_attention" in layer_types
    if text.values.get("use_sliding_window") or sliding:
        raise ConfigError(f"{source}: use_sliding_window is not implemented; no published model uses it")
    if text.values.get("quantization_config"):
        raise ConfigError(f"{source}: quantized weights (quantization_config) are not implemented")
    for key, neutral in (("attention_dropout", 0), ("partial_rotary_factor", 1)):
        value = text.get(key, neutral)
        if value != neutral:
            raise ConfigError(f"{source}: {key} {shown(value)} is not implemented; only {neutral} is")
    return text


def read_tie(data: Mapping[str, Any], source: str) -> bool:
    """Which of two flags counts: in transformers 4 the language model's, in 5 the outer one."""
    places = (Section(data.get("text_config") or {}, f"{source}: text_config"), Section(data, source))
    found = [flag for place in places if (flag := place.flag("tie_word_embeddings")) is not None]
    return found[-1 if version(data)[0] >= 5 else 0] if found else False


def extra(family: Family, data: Mapping[str, Any], text: Section) -> dict[str, Any]:
    """What a file holds beside the fields, `vision_config` included."""
    fields = _ALSO | {key.name for key in (*TEXT, *TOP)}
    vision_fields = {"model_type"} | {key.name for key in family.vision}
    rest = {key: value for key, value in data["vision_config"].items() if key not in vision_fields}
    kept = {key: value for key, value in text.values.items() if key not in fields}
    return kept | ({"vision_config": rest} if rest else {})
