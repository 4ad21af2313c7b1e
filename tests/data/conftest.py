"""What the data tests share: a tiny model directory with a tokenizer of the published layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qwen_tokenizer import build_qwen_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def build_tokenizer(*, marked_special: bool = True) -> Any:
    """A byte-level BPE of 300 tokens and the special tokens behind them, split as Qwen2's."""
    tokenizers = pytest.importorskip("tokenizers")
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=byte_level.alphabet()
    )
    corpus = ["system\n user\n assistant\n helpful \n\n im_start im_end image_pad"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    added = [tokenizers.AddedToken(token, special=marked_special, normalized=False) for token in SPECIAL_TOKENS]
    if marked_special:
        tokenizer.add_special_tokens(added)
    else:
        tokenizer.add_tokens(added)
    return tokenizer


def tiny_config(tokenizer: Any, model_type: str = "qwen2_5_vl") -> dict[str, Any]:
    """A config.json that goes with the tokenizer."""
    vision: dict[str, dict[str, Any]] = {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
            "tokens_per_second": 2, "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    return {
        "model_type": model_type,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_config": {"depth": 2, "num_heads": 2, **vision[model_type]},
    }  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_factory() -> Callable[..., Any]:
    """Makes a small tokenizer; `marked_special=False` forgets what is special."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_configs() -> Callable[[str], dict[str, Any]]:
    """The config.json of a tiny model of a type."""
    return lambda model_type: tiny_config(build_tokenizer(), model_type)


@pytest.fixture(scope="session")
def processor_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory from which a processor can be loaded; it has no weights."""
    directory = tmp_path_factory.mktemp("processor")
    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(tiny_config(tokenizer)))
    settings = {"min_pixels": 28 * 28, "max_pixels": 112 * 112, "patch_size": 14, "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the published tokenizer of Qwen2.5-VL, for processors; it has no weights."""
    directory = tmp_path_factory.mktemp("qwen")
    tokenizer = build_qwen_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(tiny_config(tokenizer)))
    settings = {"min_pixels": 28 * 28, "max_pixels": 112 * 112, "patch_size": 14, "merge_size": 2}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory
