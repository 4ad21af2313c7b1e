"""A tiny Qwen2.5-VL with pictures and questions about them: the smallest real run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.loading import write_random_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def tokenizer() -> Tokenizer:
    """One token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL + MEDIA])
    return made


QWEN2_5 = {
    "model_type": "qwen2_5_vl",
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 2,
        "tokens_per_second": 2, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2_vl",
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2},
}
FAMILIES = {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN2_5}


def config(family: str = "qwen2_5_vl", **sizes: Any) -> ModelConfig:
    """`sizes` replace those of the language model; the vision tower's features follow its width."""
    letters = tokenizer()
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    ids = {name: letters.token_to_id(f"<|{name}|>") for name in names}
    vision = FAMILIES[family]["vision_config"]
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    return ModelConfig.from_dict(
        {
            **FAMILIES[family],
            "vision_config": {**vision, out: sizes.get("hidden_size", vision[out])},
            "vocab_size": letters.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "vision_start_token_id": ids["vision_start"],
            "vision_end_token_id": ids["vision_end"],
            "image_token_id": ids["image_pad"],
            "video_token_id": ids["video_pad"],
            **sizes,
        }
    )


def write_model(target: Path, std: float = 0.02, family: str = "qwen2_5_vl", **sizes: Any) -> Path:
    def settings(directory: Path) -> None:
        tokenizer().save(str(directory / "tokenizer.json"))
        sizes = {"min_pixels": 28 * 28, "max_pixels": 112 * 112, "patch_size": 14, "merge_size": 2}
        (directory / "preprocessor_config.json").write_text(json.dumps(sizes))

    write_random_model(replace(config(family, **sizes), initializer_range=std), target, seed=1, settings=settings)
    return target


def write_data(directory: Path, count: int = 12) -> Path:
    """Pictures of one colour, and every third record without a picture."""
    records = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 3]
        question, images = "say hello", []
        if number % 3:
            images = [f"{name}{number}.png"]
            Image.new("RGB", (28 + 28 * (number % 4), 56), colour).save(directory / images[0])
            question = "<image>which colour?"
        answer = name if images else "hello"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        records.append({"messages": messages, "images": images})
    file = directory / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_recipe(directory: Path, std: float = 0.02) -> Path:
    """A recipe with its model, of weights so large, and data, all in `directory`."""
    write_model(directory / "model", std)
    write_data(directory)
    recipe = {
        "model": {"path": str(directory / "model"), "freeze": []},
        "data": {
            "train": str(directory / "data.jsonl"),
            "val": str(directory / "data.jsonl"),
            "pack_tokens": 250,
        },
        "train": {"output_dir": str(directory / "runs" / "{recipe}"), "global_batch": 4, "steps": 4},
        "optim": {"lr": 1e-3},
        "log": {"tensorboard": False, "plot": False},
        "backend": {"device": "cpu"},
    }
    file = directory / "tiny.json"
    file.write_text(json.dumps(recipe, indent=1))
    return file
