"""One LoRA training step (forward, backward, AdamW on the adapters) against transformers + PEFT.

Every contender runs in a process of its own, in turn, on the same weights, adapters, samples and optimizer settings;
rank 8 on all seven linear layers of the language model's blocks, everything else frozen:

    python benchmarks/lora_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/lora_step.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contender, Contest, Ready, duetvl_sft, ours, size_of, transformers_sft
from harness import SIDES

from duetvl.models.lora import Adapters, Size, initial_values
from duetvl.models.qwen_vl.adapters import layers, linear_shapes
from duetvl.models.qwen_vl.config import ModelConfig, load_config

RANK, ALPHA = 8, 16.0


def plan(config: ModelConfig) -> Adapters:
    """The adapters that all contenders train."""
    return Adapters(dict.fromkeys(layers(config).choose(["language"], ()), Size(RANK, ALPHA)))


def start_values(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Their first numbers, by path."""
    return initial_values(plan(config).shapes(linear_shapes(config)), seed=0)


def duetvl_model(directory: Path, side: str) -> Any:
    """The model with its adapters."""
    import duetvl
    from duetvl.models.qwen_vl.adapters import add_adapters

    backend = duetvl.load_backend(SIDES[side], device="cpu")
    model = duetvl.load_model(directory, backend=backend, dtype="float32")
    add_adapters(model, plan(model.config), seed=0)
    return model


def duetvl_step(directory: Path, side: str, examples: Sequence[dict]) -> Ready:
    """The adapters alone."""
    return duetvl_sft(duetvl_model(directory, side), examples)


def peft_model(directory: Path) -> Any:
    """transformers' model with PEFT's adapters, which start from the same numbers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLForConditionalGeneration

    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    targets = r".*language_model\.layers\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=targets))
    named = dict(model.named_parameters())
    for path, values in start_values(load_config(directory)):
        path = path.removeprefix("model.").replace(".weight", ".default.weight")
        named[f"base_model.model.model.language_model.{path}"].data.copy_(torch.from_numpy(values))
    return model


def peft_step(directory: Path, style: str, examples: Sequence[dict]) -> Ready:
    """The adapters alone."""
    return transformers_sft(peft_model(directory), style, examples)


NEEDS = ("torch", "transformers", "peft")
CONTEST = Contest(
    __file__,
    "LoRA step",
    {
        **ours(duetvl_step),
        "transformers + PEFT, padded batch": Contender(peft_step, "padded", needs=NEEDS),
        "transformers + PEFT, micro-batch 1": Contender(peft_step, "single", needs=NEEDS),
    },
    lambda examples: f"LoRA of rank {RANK}; {size_of(examples)}",
)
rows = CONTEST.rows


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
