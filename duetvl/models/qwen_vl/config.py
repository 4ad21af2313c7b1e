"""Configurations of Qwen2-VL and Qwen2.5-VL: any `config.json` in, the published layout out.

The two families differ in data alone: the norm, the MLP and the windows of the vision tower and the
clock of its videos are fields here, so that no code elsewhere asks for a family's name.

A field that a file lacks takes the default of transformers' configuration class where that default
is the value of every published model, and is an error where it is not: those defaults (a vision
width of 3584, 4 tokens per second, an epsilon of 1e-5, the shape of the 72B model) are no model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from duetvl.core.errors import CheckpointError, ConfigError, did_you_mean

Shape = tuple[int, ...]

# No config.json holds these two: transformers writes them into the code of both vision towers.
_VISION_EPS: Final = 1e-6
_VISION_THETA: Final = 10000.0
_PUBLISHED: Final = Path(__file__).parent / "published"
_REQUIRED: Final = object()


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its merger.

    patch, window: sides in pixels; `window` None: every layer sees the whole frame.
    full_attention_layers: the layers of a tower with windows that see the whole frame.
    tokens_per_second: the clock of videos; None: it counts temporal patches.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    norm: Literal["layer_norm", "rms_norm"]
    mlp: Literal["plain", "gated"]
    activation: str
    channels: int = 3
    patch: int = 14
    temporal: int = 2
    merge: int = 2
    norm_eps: float = _VISION_EPS
    rope_theta: float = _VISION_THETA
    window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        _check_divides("vision_config", "hidden_size", self.hidden_size, "num_heads", self.num_heads)
        if self.head_dim % 4:
            raise ConfigError(
                f"vision_config: a head of {self.head_dim} numbers (hidden_size "
                f"{self.hidden_size} / num_heads {self.num_heads}) is not divisible by 4, as its "
                f"rotary table of height and width needs"
            )
        if self.window is not None and self.window_merged < 1:
            raise ConfigError(
                f"vision_config: window_size {self.window} is smaller than one merged patch "
                f"({self.merge * self.patch} pixels)"
            )

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_row(self) -> int:
        """Numbers in one row of pixels."""
        return self.channels * self.temporal * self.patch * self.patch

    @property
    def merged_size(self) -> int:
        """Numbers in the patches that make one token: the merger's input."""
        return self.hidden_size * self.merge * self.merge

    @property
    def window_merged(self) -> int:
        """Side of a window in merged patches; 0 without windows."""
        return 0 if self.window is None else self.window // self.merge // self.patch

    def sees_frame(self, layer: int) -> bool:
        """Whether this layer attends within the whole frame rather than within windows."""
        return self.window is None or layer in self.full_attention_layers


@dataclass(frozen=True)
class TextConfig:
    """The language model."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    mrope_section: tuple[int, int, int]  # rotary frequencies that follow time, height and width
    activation: str = "silu"
    rope_theta: float = 1e6
    max_positions: int = 32768

    def __post_init__(self) -> None:
        _check_divides("config", "hidden_size", self.hidden_size, "num_attention_heads", self.num_heads)
        _check_divides(
            "config",
            "num_attention_heads",
            self.num_heads,
            "num_key_value_heads",
            self.num_kv_heads,
        )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"config: mrope_section {list(self.mrope_section)} covers "
                f"{sum(self.mrope_section)} frequencies, a head of {self.head_dim} numbers "
                f"has {self.head_dim / 2:g}"
            )

    @property
    def head_dim(self) -> int:
        """Numbers in one head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class ModelConfig:
    """One model. `extra` keeps what else the source file held, so that writing loses nothing."""

    model_type: str
    vision: VisionConfig
    text: TextConfig
    tie_word_embeddings: bool = False
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    initializer_range: float = 0.02
    dtype: str | None = None  # what the weights on disk are said to be, e.g. "bfloat16"
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision_config makes features of {self.vision.out_hidden_size} numbers, the "
                f"language model takes {self.text.hidden_size}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a parsed `config.json`, flat or nested, of any version of transformers.

        Raises ConfigError, starting with `source`, for a model that duetvl does not implement.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: expected an object, found {type(data).__name__}")
        model_type = data.get("model_type")
        if model_type not in _FAMILIES:
            raise ConfigError(
                f"{source}: model_type is {model_type!r}; duetvl implements {', '.join(map(repr, _FAMILIES))}"
            )
        text = _Section(_text_section(data, source), source)
        _refuse_unimplemented(text)
        vision = _Section(data.get("vision_config"), f"{source}: vision_config")
        top = _Section(data, source)
        try:
            return cls(
                model_type=model_type,
                vision=_FAMILIES[model_type].read(vision, text.integer("hidden_size")),
                text=_read_text(text),
                tie_word_embeddings=_read_tie(data),
                image_token_id=top.integer("image_token_id", 151655),
                video_token_id=top.integer("video_token_id", 151656),
                vision_start_token_id=top.integer("vision_start_token_id", 151652),
                vision_end_token_id=top.integer("vision_end_token_id", 151653),
                initializer_range=text.number("initializer_range", 0.02),
                dtype=_read_dtype(text),
                extra=_extra(text.values, vision.values, _FAMILIES[model_type].keys),
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(source) else f"{source}: {message}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published flat layout, which every version of transformers reads."""
        extra = {key: value for key, value in self.extra.items() if key != "vision_config"}
        family = _FAMILIES[self.model_type]
        vision = family.write(self.vision) | dict(self.extra.get("vision_config", {}))
        dtype = {} if self.dtype is None else {"torch_dtype": self.dtype}
        return {
            "architectures": [family.architecture],
            **extra,
            "model_type": self.model_type,
            **_write_text(self.text),
            "tie_word_embeddings": self.tie_word_embeddings,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "initializer_range": self.initializer_range,
            **dtype,
            "vision_config": vision,
        }


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory.

    Raises CheckpointError when the file cannot be read, ConfigError when duetvl cannot run what it
    describes.
    """
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a local model directory with a config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: has no config.json") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    return ModelConfig.from_dict(data, source=str(path))


def published_names() -> list[str]:
    """Names of the published models whose configurations come with duetvl."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.json"))


def published_config(name: str) -> ModelConfig:
    """The configuration of a published model: `Qwen2.5-VL-7B`, `Qwen/Qwen2.5-VL-7B-Instruct`."""
    short = name.rsplit("/", 1)[-1].removesuffix("-Instruct")
    if short not in published_names():
        raise ConfigError(f"no published configuration {name!r}{did_you_mean(short, published_names())}")
    path = _PUBLISHED / f"{short}.json"
    return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")), source=str(path))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Every parameter by its name in published checkpoints, with its shape there.

    They come in the order of computation. `lm_head.weight` is absent where it is tied to the
    embedding.
    """
    shapes = dict(_vision_shapes(config.vision)) | dict(_text_shapes(config.text))
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.text.vocab_size, config.text.hidden_size)
    return shapes


def count_parameters(shapes: Mapping[str, Shape], prefix: str = "") -> int:
    """Numbers in all parameters whose names start with `prefix`."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def _vision_shapes(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, merged = vision.hidden_size, vision.merged_size
    yield (
        "visual.patch_embed.proj.weight",
        (width, vision.channels, vision.temporal, vision.patch, vision.patch),
    )
    for layer in range(vision.depth):
        block = f"visual.blocks.{layer}"
        yield from _norm_shapes(f"{block}.norm1", vision)
        yield from _linear_shapes(f"{block}.attn.qkv", 3 * width, width)
        yield from _linear_shapes(f"{block}.attn.proj", width, width)
        yield from _norm_shapes(f"{block}.norm2", vision)
        yield from _vision_mlp_shapes(f"{block}.mlp", vision)
    yield from _norm_shapes("visual.merger.ln_q", vision)
    yield from _linear_shapes("visual.merger.mlp.0", merged, merged)
    yield from _linear_shapes("visual.merger.mlp.2", vision.out_hidden_size, merged)


def _vision_mlp_shapes(name: str, vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, inner = vision.hidden_size, vision.intermediate_size
    gated = vision.mlp == "gated"
    for part in ("gate_proj", "up_proj") if gated else ("fc1",):
        yield from _linear_shapes(f"{name}.{part}", inner, width)
    yield from _linear_shapes(f"{name}.{'down_proj' if gated else 'fc2'}", width, inner)


def _norm_shapes(name: str, vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (vision.hidden_size,)
    if vision.norm == "layer_norm":
        yield f"{name}.bias", (vision.hidden_size,)


def _linear_shapes(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _text_shapes(text: TextConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, kv_width = (
        text.hidden_size,
        text.intermediate_size,
        text.num_kv_heads * text.head_dim,
    )
    yield "model.embed_tokens.weight", (text.vocab_size, width)
    for layer in range(text.num_layers):
        block = f"model.layers.{layer}"
        yield f"{block}.input_layernorm.weight", (width,)
        yield from _linear_shapes(f"{block}.self_attn.q_proj", width, width)
        yield from _linear_shapes(f"{block}.self_attn.k_proj", kv_width, width)
        yield from _linear_shapes(f"{block}.self_attn.v_proj", kv_width, width)
        yield from _linear_shapes(f"{block}.self_attn.o_proj", width, width, bias=False)
        yield f"{block}.post_attention_layernorm.weight", (width,)
        yield from _linear_shapes(f"{block}.mlp.gate_proj", inner, width, bias=False)
        yield from _linear_shapes(f"{block}.mlp.up_proj", inner, width, bias=False)
        yield from _linear_shapes(f"{block}.mlp.down_proj", width, inner, bias=False)
    yield "model.norm.weight", (width,)


def _check_divides(where: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value % by:
        raise ConfigError(f"{where}: {name} {value} is not divisible by {by_name} {by}")


class _Section:
    """One object of the file, read key by key with errors that name the key."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, found {values!r}")
        self.values = values
        self.where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: {key} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 0) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected an integer from {minimum} up")
        return value

    def size(self, key: str, default: Any = _REQUIRED) -> int:
        return self.integer(key, default, minimum=1)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a positive number")
        return value

    def integers(self, key: str, default: Any = _REQUIRED) -> tuple[int, ...]:
        value = self._get(key, default)
        if not isinstance(value, Sequence) or any(type(item) is not int for item in value):
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a list of integers")
        return tuple(value)

    def choice(self, key: str, default: Any, known: Sequence[str]) -> str:
        value = self._get(key, default)
        if value not in known:
            raise ConfigError(f"{self.where}: {key} {value!r} is not implemented; known: {', '.join(known)}")
        return str(value)


# Keys that become fields. All other keys travel through `ModelConfig.extra`.
_TEXT_KEYS: Final = {
    "model_type", "text_config", "vision_config", "vocab_size", "num_hidden_layers", "hidden_size",
    "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "hidden_act",
    "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings",
    "tie_word_embeddings", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "initializer_range", "dtype", "torch_dtype",
    "layer_types",  # derived: full attention in every layer
}  # fmt: skip
_VISION_KEYS: Final = frozenset({
    "model_type", "depth", "hidden_size", "hidden_act", "num_heads", "in_channels", "patch_size",
    "spatial_merge_size", "temporal_patch_size",
})  # fmt: skip


def _text_section(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The language model's keys, flat or in `text_config`, which wins as in transformers."""
    nested = data.get("text_config")
    if nested is None:
        return dict(data)
    if not isinstance(nested, Mapping):
        raise ConfigError(f"{source}: text_config: expected an object, found {nested!r}")
    return {
        **data,
        **{key: value for key, value in nested.items() if value is not None or key not in data},
    }


def _refuse_unimplemented(text: _Section) -> None:
    """One clear line for each thing a config may ask for that this code would silently not do."""
    layer_types = text.values.get("layer_types") or ()
    if text.values.get("use_sliding_window") or "sliding_attention" in layer_types:
        raise ConfigError(f"{text.where}: use_sliding_window is not implemented; no published model uses it")
    if text.values.get("quantization_config"):
        raise ConfigError(f"{text.where}: quantized weights (quantization_config) are not implemented")
    for key, neutral in (("attention_dropout", 0), ("partial_rotary_factor", 1)):
        if (text.values.get(key) or neutral) != neutral:
            raise ConfigError(f"{text.where}: {key} {text.values[key]} is not implemented; only {neutral} is")


def _read_text(text: _Section) -> TextConfig:
    theta, sections = _read_rope(text)
    heads = text.size("num_attention_heads")
    config = TextConfig(
        vocab_size=text.size("vocab_size"),
        num_layers=text.size("num_hidden_layers"),
        hidden_size=text.size("hidden_size"),
        intermediate_size=text.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=text.size("num_key_value_heads", _default_kv_heads(text, heads)),
        norm_eps=text.number("rms_norm_eps"),
        mrope_section=sections,
        activation=text.choice("hidden_act", "silu", ("silu",)),
        rope_theta=theta,
        max_positions=text.size("max_position_embeddings", 32768),
    )
    if text.values.get("head_dim") not in (None, config.head_dim):
        raise ConfigError(
            f"{text.where}: head_dim {text.values['head_dim']} differs from hidden_size / "
            f"num_attention_heads ({config.head_dim}); duetvl implements equal ones"
        )
    return config


def _default_kv_heads(text: _Section, heads: int) -> Any:
    """An explicit null means one per head, in transformers as here; a missing key is an error."""
    return heads if "num_key_value_heads" in text.values else _REQUIRED


def _read_rope(text: _Section) -> tuple[float, tuple[int, int, int]]:
    """Base and sections from `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    key = "rope_scaling" if text.values.get("rope_scaling") else "rope_parameters"
    if not text.values.get(key):
        raise ConfigError(f"{text.where}: rope_scaling is missing; it holds mrope_section")
    rope = _Section(text.values[key], f"{text.where}: {key}")
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ("mrope", "default"):
        raise ConfigError(f"{rope.where}: rope type {kind!r} is not implemented; known: mrope, default")
    sections = rope.integers("mrope_section")
    if len(sections) != 3:
        raise ConfigError(f"{rope.where}: mrope_section {list(sections)} needs three numbers: time, height, width")
    theta = rope.number("rope_theta", text.number("rope_theta", 1e6))
    return theta, (sections[0], sections[1], sections[2])


def _write_text(text: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "num_hidden_layers": text.num_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.norm_eps,
        "hidden_act": text.activation,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "max_position_embeddings": text.max_positions,
    }


def _read_tie(data: Mapping[str, Any]) -> bool:
    """Which of two flags counts: in transformers 4 the language model's, in 5 the outer one."""
    nested = data.get("text_config") or {}
    found = [place["tie_word_embeddings"] for place in (nested, data) if "tie_word_embeddings" in place]
    major = str(data.get("transformers_version", "4")).split(".")[0]
    return bool(found[-1 if major.isdigit() and int(major) >= 5 else 0]) if found else False


def _read_dtype(text: _Section) -> str | None:
    value = text.values.get("torch_dtype") or text.values.get("dtype")
    return None if value is None else str(value).removeprefix("torch.")


def _extra(text: Mapping[str, Any], vision: Mapping[str, Any], vision_keys: frozenset[str]) -> dict[str, Any]:
    extra = {key: value for key, value in text.items() if key not in _TEXT_KEYS}
    rest = {key: value for key, value in vision.items() if key not in vision_keys}
    return extra | ({"vision_config": rest} if rest else {})


def _common_vision(vision: _Section) -> dict[str, Any]:
    return {
        "depth": vision.size("depth"),
        "num_heads": vision.size("num_heads"),
        "channels": vision.size("in_channels", vision.values.get("in_chans") or 3),
        "patch": vision.size("patch_size", 14),
        "temporal": vision.size("temporal_patch_size", 2),
        "merge": vision.size("spatial_merge_size", 2),
    }


def _write_common_vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "depth": vision.depth,
        "num_heads": vision.num_heads,
        "hidden_act": vision.activation,
        "in_channels": vision.channels,
        "patch_size": vision.patch,
        "temporal_patch_size": vision.temporal,
        "spatial_merge_size": vision.merge,
    }


def _read_qwen2_vision(vision: _Section, text_width: int) -> VisionConfig:
    """Here `hidden_size` is the language model's width, the tower's own is `embed_dim`."""
    width = vision.size("embed_dim")
    return VisionConfig(
        **_common_vision(vision),
        hidden_size=width,
        intermediate_size=int(width * vision.number("mlp_ratio", 4)),
        out_hidden_size=vision.size("hidden_size", text_width),
        norm="layer_norm",
        mlp="plain",
        activation=vision.choice("hidden_act", "quick_gelu", ("quick_gelu", "gelu")),
    )


def _write_qwen2_vision(vision: VisionConfig) -> dict[str, Any]:
    width, inner = vision.hidden_size, vision.intermediate_size
    ratio = inner // width if inner % width == 0 else inner / width
    if int(width * ratio) != inner:  # transformers truncates the product, so stay clear of the edge
        ratio = (inner + 0.5) / width
    names = {"embed_dim": width, "hidden_size": vision.out_hidden_size, "mlp_ratio": ratio}
    return _write_common_vision(vision) | names


def _read_qwen2_5_vision(vision: _Section, text_width: int) -> VisionConfig:
    return VisionConfig(
        **_common_vision(vision),
        hidden_size=vision.size("hidden_size"),
        intermediate_size=vision.size("intermediate_size"),
        out_hidden_size=vision.size("out_hidden_size", text_width),
        norm="rms_norm",
        mlp="gated",
        activation=vision.choice("hidden_act", "silu", ("silu",)),
        window=vision.size("window_size", 112),
        full_attention_layers=vision.integers("fullatt_block_indexes", (7, 15, 23, 31)),
        tokens_per_second=vision.number("tokens_per_second"),
    )


def _write_qwen2_5_vision(vision: VisionConfig) -> dict[str, Any]:
    return _write_common_vision(vision) | {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "out_hidden_size": vision.out_hidden_size,
        "window_size": vision.window,
        "fullatt_block_indexes": list(vision.full_attention_layers),
        "tokens_per_second": vision.tokens_per_second,
    }


@dataclass(frozen=True)
class _Layout:
    """How one family's config.json describes its vision tower."""

    architecture: str
    read: Callable[[_Section, int], VisionConfig]
    write: Callable[[VisionConfig], dict[str, Any]]
    keys: frozenset[str]


_FAMILIES: Final = {
    "qwen2_vl": _Layout(
        "Qwen2VLForConditionalGeneration",
        _read_qwen2_vision,
        _write_qwen2_vision,
        _VISION_KEYS | {"embed_dim", "mlp_ratio"},
    ),
    "qwen2_5_vl": _Layout(
        "Qwen2_5_VLForConditionalGeneration",
        _read_qwen2_5_vision,
        _write_qwen2_5_vision,
        _VISION_KEYS
        | {
            "intermediate_size",
            "out_hidden_size",
            "window_size",
            "fullatt_block_indexes",
            "tokens_per_second",
        },
    ),
}
