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
from contest import LR, Contest, Step, model_config, padded, samples

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
    return initial_values(plan(), linear_shapes(ModelConfig.from_dict(model_config())), seed=0)


def duetvl_model(directory: Path, framework: str) -> Any:
    """The model with its adapters."""
    import duetvl
    from duetvl.models.qwen_vl.adapters import add_adapters

    backend = duetvl.load_backend(framework, device="cpu")
    model = duetvl.load_model(directory, backend=backend, dtype="float32")
    add_adapters(model, plan(), seed=0)
    return model


def duetvl_step(directory: Path, framework: str) -> Step:
    """One step on packed samples, as the trainer takes it."""
    import duetvl
    from duetvl.core.optimizer import Group

    model = duetvl_model(directory, framework)
    backend = model.backend
    groups = [Group([p for p in model.parameters.values() if p.trainable])]
    state = backend.optimizer.create(groups)
    given = [duetvl.Sample(**sample) for sample in samples()]

    def step() -> float:
        batch = model.pack(given)
        loss, tape = model.forward_loss(batch)
        backend.autograd.backward(tape, [backend.ops.from_numpy(np.ones((), np.float32))])
        scale = 1.0 / batch.trained_tokens
        scale *= min(1.0, 1.0 / (backend.optimizer.grad_norm(groups[0].parameters) * scale + 1e-6))
        backend.optimizer.step(state, groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, grad_scale=scale)
        return float(backend.to_numpy(loss)) / batch.trained_tokens

    return step


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
    model.train()
    named = dict(model.named_parameters())
    for path, values in start_values():
        path = path.removeprefix("model.").replace(".weight", ".default.weight")
        named[f"base_model.model.model.language_model.{path}"].data.copy_(torch.from_numpy(values))
    return model


def peft_step(directory: Path, style: str) -> Step:
    """One step as users of PEFT run it: one padded batch, or one sample at a time."""
    import torch

    model = peft_model(directory)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    given = samples()
    total = sum(int((sample["labels"][1:] != -100).sum()) for sample in given)
    batches = [given] if style == "padded" else [[sample] for sample in given]

    def step() -> float:
        loss_sum = 0.0
        for batch in batches:
            fed = {key: torch.from_numpy(value) for key, value in padded(batch).items()}
            loss = model(**fed, num_items_in_batch=torch.tensor(total), use_cache=False).loss
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum

    return step


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
