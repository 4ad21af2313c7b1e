"""One LoRA training step (forward, backward, AdamW on the adapters) against transformers + PEFT.

Every contender runs in a process of its own, in turn, on the same weights, adapters, samples and optimizer settings;
rank 8 on all seven linear layers of the language model's blocks, everything else frozen:

    python benchmarks/lora_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/lora_step.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contest import Contest, Step, duetvl_sft, model_config, samples, transformers_sft

from duetvl.models.lora import Adapters, Size, initial_values
from duetvl.models.qwen_vl.adapters import layers, linear_shapes
from duetvl.models.qwen_vl.config import ModelConfig

RANK, ALPHA = 8, 16.0


def plan() -> Adapters:
    """The adapters that all contenders train."""
    modules = layers(ModelConfig.from_dict(model_config())).choose(["language"], ())
    return Adapters(dict.fromkeys(modules, Size(RANK, ALPHA)))


def start_values() -> Iterator[tuple[str, np.ndarray]]:
    """Their first numbers, by path."""
    return initial_values(plan().shapes(linear_shapes(ModelConfig.from_dict(model_config()))), seed=0)


def duetvl_model(directory: Path, framework: str) -> Any:
    """The model with its adapters."""
    import duetvl
    from duetvl.models.qwen_vl.adapters import add_adapters

    backend = duetvl.load_backend(framework, device="cpu")
    model = duetvl.load_model(directory, backend=backend, dtype="float32")
    add_adapters(model, plan(), seed=0)
    return model


def duetvl_step(directory: Path, framework: str) -> Step:
    """The adapters alone."""
    return duetvl_sft(duetvl_model(directory, framework))


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
    for path, values in start_values():
        path = path.removeprefix("model.").replace(".weight", ".default.weight")
        named[f"base_model.model.model.language_model.{path}"].data.copy_(torch.from_numpy(values))
    return model


def peft_step(directory: Path, style: str) -> Step:
    """The adapters alone."""
    return transformers_sft(peft_model(directory), style)


CONTEST = Contest(
    __file__,
    {
        "duetvl torch": (duetvl_step, "torch"),
        "duetvl mindspore": (duetvl_step, "mindspore"),
        "transformers + PEFT, padded batch": (peft_step, "padded"),
        "transformers + PEFT, micro-batch 1": (peft_step, "single"),
    },
    f"LoRA of rank {RANK}; eight samples, {sum(len(x['input_ids']) for x in samples())} tokens, longest "
    f"{max(len(x['input_ids']) for x in samples())}",
)


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
