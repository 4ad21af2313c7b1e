"""A tiny Qwen2.5-VL to train from nothing: its config, its tokenizer and its processor settings.

The structure is the published models': windowed vision attention with some full blocks, patch
merging, multimodal rotary positions, grouped-query attention, tied embeddings, and the special
tokens behind the ordinary vocabulary in the published order. Only the sizes are small. Weights are
made by the library from `initializer_range`.

    python scripts/demo/tiny_model.py build/tiny
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ORDINARY_TOKENS = 370
VOCAB_SIZE = ORDINARY_TOKENS + len(SPECIAL_TOKENS)

# Qwen2's split of text into words: contractions, letters with one leading mark, single digits,
# punctuation, line ends, spaces.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML with the default system text; of a picture or video it writes one pad token, which the
# processor repeats as often as needed.
CHAT_TEMPLATE = """
{%- macro show(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' + show(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".strip()

ANSWERS = (
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "black",
    "circle",
    "square",
    "triangle",
    "cross",
)
# The merges are learnt from these lines, so what the demo says is mostly whole words.
CORPUS = (
    "system\n",
    "user\n",
    "assistant\n",
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "What colour do you see?",
    "Which colour is it?",
    "What shape do you see?",
    "Which shape is it?",
    "How many shapes do you see?",
    "How many are there?",
    "Where do you see it?",
    "Where is the shape?",
    "How many corners has a triangle?",
    "How many corners has a square?",
    *ANSWERS * 2,
)


def token_id(token: str) -> int:
    """The id of a special token."""
    return ORDINARY_TOKENS + SPECIAL_TOKENS.index(token)


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE whose merges come from CORPUS, special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=ORDINARY_TOKENS,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if tokenizer.get_vocab_size() != ORDINARY_TOKENS:
        raise ValueError(f"BPE gave {tokenizer.get_vocab_size()} tokens, not {ORDINARY_TOKENS}")
    return tokenizer


def tiny_config() -> dict[str, Any]:
    """The model's `config.json`, in the flat form of the published Qwen2.5-VL checkpoints."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_token_id": token_id("<|vision_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # Trained from nothing in a few hundred steps, so the weights start large: with the usual
        # 0.02 the narrow layers pass too little on, and the pictures are not seen for a long time.
        "initializer_range": 0.1,
        "max_position_embeddings": 2048,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-06,
        # With the published 1e6 the height and width sections, the last of 8 frequencies, hardly
        # turn over a picture that is two tokens wide.
        "rope_theta": 5.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    }


def preprocessor_config() -> dict[str, Any]:
    """The picture processor's settings: small pictures keep their size."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": 28 * 28,
        "max_pixels": 280 * 280,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        # Pixels within 0.2 of zero: a patch has 1,176 of them, nearly all alike, and at unit scale
        # the patch embedding drowns what the blocks add and moves too far in each step.
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [2.5, 2.5, 2.5],
    }


def generation_config() -> dict[str, Any]:
    """Greedy answers that end with the turn."""
    return {
        "bos_token_id": token_id("<|endoftext|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "do_sample": False,
    }


def tokenizer_config() -> dict[str, Any]:
    """What `transformers.AutoTokenizer` needs beside tokenizer.json."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "unk_token": None,
    }


def write_tokenizer(directory: Path) -> None:
    """Write the tokenizer with its settings and those of pictures and generation."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.model.save(str(directory))  # vocab.json and merges.txt: the ordinary tokens
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", tokenizer_config())
    write_json(directory / "preprocessor_config.json", preprocessor_config())
    write_json(directory / "generation_config.json", generation_config())


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write one settings file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: everything of the tiny model except its weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    write_tokenizer(directory)
    write_json(directory / "config.json", tiny_config())
    sys.stdout.write(f"{directory}\n")


if __name__ == "__main__":
    main()
