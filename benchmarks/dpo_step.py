"""One DPO step with LoRA (policy and reference, backward, AdamW on the adapters) against transformers + PEFT.

Four pairs of answers to prompts with pictures; the reference is the model without its adapter. The contender of
transformers follows TRL's DPOTrainer: chosen and rejected sequences are concatenated into one padded batch, with each
picture twice, whole logits are computed, and log-probabilities are gathered from their log-softmax.

    python benchmarks/dpo_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/dpo_step.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from contest import LR, Contender, Contest, Ready, clipped_update, ours, padded, torch_adamw
from lora_step import NEEDS, duetvl_model, peft_model

BETA = 0.1
PAIRS = (1, 2, 4, 5)  # samples of the shared set that have pictures, where it is so large


def pairs(examples: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Chosen and rejected samples: the same prompt and pictures, answers of different words and lengths."""
    rng, found = np.random.default_rng(11), []
    for number in (number for number in PAIRS if number < len(examples)):
        chosen = examples[number]
        start = int(np.argmax(chosen["labels"] != -100))
        answer = rng.integers(10, 32000, max(4, (len(chosen["labels"]) - start) * 2 // 3))
        ids = np.concatenate([chosen["input_ids"][:start], answer])
        rejected = {**chosen, "input_ids": ids, "labels": np.concatenate([np.full(start, -100), answer])}
        found.append((chosen, rejected))
    return found


def duetvl_step(directory: Path, side: str, examples: Sequence[dict]) -> Ready:
    """One step as the trainer takes it: pairs packed, their pictures encoded once."""
    import duetvl
    from duetvl.core.batch import Pair
    from duetvl.data.loading import loader
    from duetvl.models.qwen_vl.flops import inference_flops, training_flops
    from duetvl.parallel.passes import InOrder
    from duetvl.training.preference.dpo import PreferenceObjective, reference_of
    from duetvl.training.recipe.sections import DpoSection, OptimSection
    from duetvl.training.step import Trainer

    model = duetvl_model(directory, side)
    reference = reference_of(InOrder(model.without_adapters(), model.backend), model.backend.ops)
    objective = PreferenceObjective(DpoSection(beta=BETA), model.backend)
    trainer = Trainer(model, objective, model.backend, OptimSection(lr=LR), reference=reference)
    no_pixels: dict[str, Any] = {"pixel_values": None}
    compared = [Pair(duetvl.Sample(**a), duetvl.Sample(**{**b, **no_pixels})) for a, b in pairs(examples)]

    def step() -> float:
        batch = model.pack(compared)
        result = trainer.step(loader.Step((batch,), batch.sample_ids, {}), LR)
        assert result is not None
        return result.loss

    batch = model.pack(compared)
    flops = training_flops(model.config, model.parameters, batch) + inference_flops(model.config, batch)
    return Ready(step, flops)


def trl_step(directory: Path, style: str, examples: Sequence[dict]) -> Ready:
    """One step in TRL's way."""
    import torch

    model = peft_model(directory)
    model.train()
    optimizer = torch_adamw(model)
    compared = pairs(examples)
    groups = [compared] if style == "padded" else [[pair] for pair in compared]

    def answer_sums(fed: dict[str, Any]) -> Any:
        labels = fed["labels"][:, 1:]
        inputs = {key: value for key, value in fed.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        mask = labels != -100
        chosen = labels.masked_fill(~mask, 0).unsqueeze(2)
        return (torch.gather(logits.log_softmax(-1), 2, chosen).squeeze(2) * mask).sum(1)

    def step() -> float:
        loss_sum = 0.0
        for group in groups:
            rows = [chosen for chosen, _ in group] + [rejected for _, rejected in group]
            fed = {key: torch.from_numpy(value) for key, value in padded(rows).items()}
            with torch.no_grad(), model.disable_adapter():
                reference = answer_sums(fed)
            ratios = answer_sums(fed) - reference
            gap = ratios[: len(group)] - ratios[len(group) :]
            loss = -torch.nn.functional.logsigmoid(BETA * gap).sum() / len(compared)
            loss.backward()
            loss_sum += loss.item()
        clipped_update(optimizer)
        return loss_sum

    return Ready(step)


def describe(examples: Sequence[dict]) -> str:
    """How many pairs there are, and how long."""
    lengths = [len(answer["input_ids"]) for pair in pairs(examples) for answer in pair]
    return f"DPO with LoRA; {len(lengths) // 2} pairs of {sum(lengths)} tokens"


CONTEST = Contest(
    __file__,
    "DPO step",
    {
        **ours(duetvl_step),
        "TRL's way on transformers + PEFT (imitated), padded batch": Contender(trl_step, "padded", needs=NEEDS),
        "TRL's way on transformers + PEFT (imitated), a pair at a time": Contender(trl_step, "single", needs=NEEDS),
    },
    describe,
)
rows = CONTEST.rows


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
