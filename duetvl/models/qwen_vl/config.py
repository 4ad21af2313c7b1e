"""Configurations of Qwen2-VL and Qwen2.5-VL: any `config.json` in, the published layout out.

The two families differ in data alone: the norm, the MLP and the windows of the vision tower and the
clock of its videos are fields here, so that no code elsewhere asks for a family's name. What the keys of the files
mean is in `config_json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from duetvl.core.errors import CheckpointError, ConfigError, did_you_mean, shown
from duetvl.models.qwen_vl import config_json
from duetvl.models.qwen_vl.config_json import FAMILIES, VISION_THETA, read_fields, write_fields
from duetvl.storage.files import read_json

_VISION_EPS: Final = 1e-6  # no config.json holds it: transformers writes it into the code of both vision towers
_PUBLISHED: Final = Path(__file__).parent / "published"


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
    rope_theta: float = VISION_THETA
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
        model_type = config_json.Section(data, source).values.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(map(repr, FAMILIES))
            raise ConfigError(f"{source}: model_type is {shown(model_type)}; duetvl implements {known}")
        family, text = FAMILIES[model_type], config_json.text_section(data, source)
        fields = read_fields(config_json.TEXT, text)
        try:
            language = TextConfig(**fields)
            _check_head_dim(text.values.get("head_dim"), language)
            return cls(
                model_type=model_type,
                vision=VisionConfig(**family.read_vision(data, source, language.hidden_size)),
                text=language,
                tie_word_embeddings=config_json.read_tie(data, source),
                **read_fields(config_json.TOP, text),
                extra=config_json.extra(family, data, text),
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(source) else f"{source}: {message}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published flat layout, which every version of transformers reads."""
        rest = dict(self.extra)
        family, vision_rest = FAMILIES[self.model_type], rest.pop("vision_config", {})
        return {
            "architectures": [family.architecture],
            **rest,
            "model_type": self.model_type,
            **write_fields(config_json.TEXT, self.text),
            "tie_word_embeddings": self.tie_word_embeddings,
            **write_fields(config_json.TOP, self),
            "vision_config": {**write_fields(family.vision, self.vision), **vision_rest},
        }


def load_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a model directory.

    Raises CheckpointError when the file cannot be read, ConfigError when duetvl cannot run what it
    describes.
    """
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a local model directory with a config.json")
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json")
    return ModelConfig.from_dict(read_json(path, CheckpointError), source=str(path))


def published_names() -> list[str]:
    """Names of the published models whose configurations come with duetvl."""
    return sorted(path.stem for path in _PUBLISHED.glob("*.json"))


def published_config(name: str) -> ModelConfig:
    """The configuration of a published model: `Qwen2.5-VL-7B`, `Qwen/Qwen2.5-VL-7B-Instruct`."""
    short = name.rsplit("/", 1)[-1].removesuffix("-Instruct")
    if short not in published_names():
        raise ConfigError(f"no published configuration {name!r}{did_you_mean(short, published_names())}")
    path = _PUBLISHED / f"{short}.json"
    return ModelConfig.from_dict(read_json(path, CheckpointError), source=str(path))


def _check_divides(where: str, name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value % by:
        raise ConfigError(f"{where}: {name} {value} is not divisible by {by_name} {by}")


def _check_head_dim(given: Any, text: TextConfig) -> None:
    if given not in (None, text.head_dim):
        raise ConfigError(
            f"config: head_dim {shown(given)} differs from hidden_size / num_attention_heads "
            f"({text.head_dim}); duetvl implements equal ones"
        )
