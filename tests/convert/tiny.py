"""Small models, a division written down a second time with torch's own operations, and ways to look at files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import NUMPY_DTYPES, TensorSpec
from duetvl.storage.weights_dir import open_weights, write_shards

torch = pytest.importorskip("torch")

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tiny_config(
    family: str = "qwen2_5_vl",
    *,
    layers: int = 4,
    depth: int = 4,
    tied: bool = False,
    heads: int = 8,
    kv_heads: int = 4,
    head_size: int = 8,
    vocabulary: int = 48,
) -> ModelConfig:
    """4 vision heads of 4 numbers."""
    width, thirds = heads * head_size, head_size // 8
    vision: dict[str, Any] = {"depth": depth, "num_heads": 4, "patch_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": width, "in_channels": 3}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": width, "tokens_per_second": 2}
    return ModelConfig.from_dict({
        "model_type": family, "vocab_size": vocabulary, "num_hidden_layers": layers, "hidden_size": width,
        "intermediate_size": 32, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [thirds, thirds, 2 * thirds]}, "tie_word_embeddings": tied,
        "vision_config": vision,
    })  # fmt: skip


def random_bits(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    """Numbers of every kind, as bits; no two tensors are alike."""
    numbers = rng.standard_normal(shape).astype(np.float32)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(NUMPY_DTYPES[dtype])


def write_hf(
    directory: Path, config: ModelConfig, dtype: str = "bfloat16", seed: int = 0, shard_bytes: int = 5 * 10**9
) -> dict[str, np.ndarray]:
    """A model directory with a tokenizer of sorts; returns its bits by name."""
    rng = np.random.default_rng(seed)
    tensors = {name: random_bits(shape, dtype, rng) for name, shape in parameter_shapes(config).items()}
    specs = {name: TensorSpec(dtype, array.shape) for name, array in tensors.items()}
    write_shards(directory, specs, tensors.__getitem__, max_shard_bytes=shard_bytes)
    write_config(config, directory, dtype)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("kept")
    return tensors


def read_hf(directory: Path) -> dict[str, np.ndarray]:
    weights = open_weights(directory)
    return {name: weights.view(name) for name in weights.places}


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(bits.copy().view(np.int16) if dtype == "bfloat16" else bits.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def mm_files(directory: Path, step: str = "release") -> dict[str, Any]:
    """Every file of a checkpoint, as torch loads it."""
    paths = sorted((directory / step).glob("mp_rank_*/model_optim_rng.pt"))
    return {path.parent.name: torch.load(path, weights_only=True, mmap=True) for path in paths}


# -- the contract once more, with torch's operations ------------------------------------------------------------------


def expected_files(
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    text: list[list[int]],
    vision: list[list[int]],
    tp: int,
    canonical: bool = False,
) -> dict[str, Any]:
    """What the files of a division hold, made straight from sections 1.4 to 1.8 of the contract."""
    pp, vpp = len(text[0]), len(text)
    text_flat, vision_flat = list(chain(*text)), list(chain(*vision))
    files: dict[str, Any] = {}
    for rank in range(tp):
        for p in range(pp):
            name = f"mp_rank_{rank:02d}" + (f"_{p:03d}" if pp > 1 else "")
            content: dict[str, Any] = {"checkpoint_version": 3.0}
            for k in range(vpp):
                stage = stage_tensors(tensors, config, text_flat, vision_flat, k * pp + p, pp, canonical)
                section = "model" if vpp == 1 else f"model{k}"
                content[section] = {key: split(key, value, rank, tp, config) for key, value in stage.items()}
            files[name] = content
    return files


def stage_tensors(
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    text: list[int],
    vision: list[int],
    stage: int,
    pp: int,
    canonical: bool,
) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    first_text, last_text = _ends(text)
    first_vision, last_vision = _ends(vision)
    if stage == first_vision:
        out["image_encoder.encoder.patch_embed.proj.weight"] = tensors["visual.patch_embed.proj.weight"]
    for local in range(vision[stage]):
        _vision_layer(out, tensors, config, sum(vision[:stage]) + local, local, canonical)
    if stage == last_vision:
        for leaf in ("weight", "bias"):
            if f"visual.merger.ln_q.{leaf}" in tensors:
                out[f"image_encoder.projector.layernorm.{leaf}"] = tensors[f"visual.merger.ln_q.{leaf}"]
            out[f"image_encoder.projector.encoder.linear_fc1.{leaf}"] = tensors[f"visual.merger.mlp.0.{leaf}"]
            out[f"image_encoder.projector.encoder.linear_fc2.{leaf}"] = tensors[f"visual.merger.mlp.2.{leaf}"]
    if stage == first_text:
        out["text_decoder.embedding.word_embeddings.weight"] = tensors["model.embed_tokens.weight"]
    for local in range(text[stage]):
        _text_layer(out, tensors, config, sum(text[:stage]) + local, local, canonical)
    if stage == last_text:
        out["text_decoder.decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not config.tie_word_embeddings:
            out["text_decoder.output_layer.weight"] = tensors["lm_head.weight"]
        elif pp > 1:
            out["text_decoder.output_layer.weight"] = tensors["model.embed_tokens.weight"]
    return out


def _ends(counts: list[int]) -> tuple[int, int]:
    there = [stage for stage, count in enumerate(counts) if count]
    return there[0], there[-1]


def _vision_layer(
    out: dict[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    n: int,
    local: int,
    canonical: bool,
) -> None:
    mm, hf = f"image_encoder.encoder.blocks.layers.{local}.", f"visual.blocks.{n}."
    names = {
        "input_layernorm": "norm1", "pre_mlp_layernorm": "norm2", "self_attention.linear_proj": "attn.proj",
        "mlp.linear_fc2": "mlp.fc2" if config.vision.mlp == "plain" else "mlp.down_proj",
    }  # fmt: skip
    if config.vision.mlp == "plain":
        names["mlp.linear_fc1"] = "mlp.fc1"
    elif canonical:
        names |= {"mlp.gate_proj": "mlp.gate_proj", "mlp.up_proj": "mlp.up_proj"}
    for leaf in ("weight", "bias"):
        for stored, name in names.items():
            if f"{hf}{name}.{leaf}" in tensors:
                out[f"{mm}{stored}.{leaf}"] = tensors[f"{hf}{name}.{leaf}"]
        qkv = tensors[f"{hf}attn.qkv.{leaf}"]
        if not canonical:
            heads = config.vision.num_heads
            q, k, v = (third.chunk(heads) for third in qkv.chunk(3))
            qkv = torch.cat([part for head in zip(q, k, v, strict=True) for part in head])
        out[f"{mm}self_attention.linear_qkv.{leaf}"] = qkv
        if config.vision.mlp == "gated" and not canonical:
            gate, up = (tensors[f"{hf}mlp.{part}_proj.{leaf}"] for part in ("gate", "up"))
            out[f"{mm}mlp.linear_fc1.{leaf}"] = torch.cat([gate, up])


def _text_layer(
    out: dict[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    config: ModelConfig,
    n: int,
    local: int,
    canonical: bool,
) -> None:
    mm, hf = f"text_decoder.decoder.layers.{local}.", f"model.layers.{n}."
    out[f"{mm}input_layernorm.weight"] = tensors[f"{hf}input_layernorm.weight"]
    out[f"{mm}pre_mlp_layernorm.weight"] = tensors[f"{hf}post_attention_layernorm.weight"]
    out[f"{mm}self_attention.linear_proj.weight"] = tensors[f"{hf}self_attn.o_proj.weight"]
    out[f"{mm}mlp.linear_fc2.weight"] = tensors[f"{hf}mlp.down_proj.weight"]
    for leaf in ("weight", "bias"):
        qkv = [tensors[f"{hf}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
        if canonical:
            out |= {f"{mm}self_attention.{part}_proj.{leaf}": t for part, t in zip("qkv", qkv, strict=True)}
        else:
            groups = zip(*(t.chunk(config.text.num_kv_heads) for t in qkv), strict=True)
            out[f"{mm}self_attention.linear_qkv.{leaf}"] = torch.cat([part for group in groups for part in group])
    gate, up = (tensors[f"{hf}mlp.{part}_proj.weight"] for part in ("gate", "up"))
    if canonical:
        out |= {f"{mm}mlp.gate_proj.weight": gate, f"{mm}mlp.up_proj.weight": up}
    else:
        out[f"{mm}mlp.linear_fc1.weight"] = torch.cat([gate, up])


_ROW = re.compile(
    r".*(word_embeddings|output_layer|linear_qkv|[qkv]_proj|gate_proj|up_proj|projector\.encoder\.linear_fc1)\.(weight|bias)"
)
_GLU = re.compile(r".*(layers\.\d+\.mlp\.linear_fc1)\.(weight|bias)")
_COLUMN = re.compile(r".*(linear_proj|linear_fc2)\.weight")


def split(key: str, value: torch.Tensor, rank: int, tp: int, config: ModelConfig) -> torch.Tensor:
    if _GLU.fullmatch(key) and (key.startswith("text") or config.vision.mlp == "gated"):
        return torch.cat([half.chunk(tp)[rank] for half in value.chunk(2)])
    if _ROW.fullmatch(key) or _GLU.fullmatch(key):
        return value.chunk(tp)[rank]
    return value.chunk(tp, dim=1)[rank] if _COLUMN.fullmatch(key) else value


def assert_files_equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name].keys() == content.keys()
        for section in content.keys() - {"checkpoint_version"}:
            assert found[name][section].keys() == content[section].keys(), (name, section)
            for key, value in content[section].items():
                assert torch.equal(found[name][section][key], value), (name, key)
