"""One DPO step with LoRA (policy and reference, backward, AdamW on the adapters) against transformers + PEFT.

Four pairs of answers to prompts with pictures; the reference is the model without its adapter. The contender of
transformers follows TRL's DPOTrainer: chosen and rejected sequences are concatenated into one padded batch, with each
picture twice, whole logits are computed, and log-probabilities are gathered from their log-softmax.

    python benchmarks/dpo_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/dpo_step.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from contest import LR, Contest, Step, clipped_update, padded, samples, torch_adamw
from lora_step import duetvl_model, peft_model

BETA = 0.1
PAIRS = (1, 2, 4, 5)  # samples of the shared set that have pictures


def pairs() -> list[tuple[dict, dict]]:
    """Chosen and rejected samples: the same prompt and pictures, answers of different words and lengths."""
    rng, all_samples = np.random.default_rng(11), samples()
    found = []
    for number in PAIRS:
        chosen = all_samples[number]
        start = int(np.argmax(chosen["labels"] != -100))
        answer = rng.integers(10, 32000, max(4, (len(chosen["labels"]) - start) * 2 // 3))
        ids = np.concatenate([chosen["input_ids"][:start], answer])
        rejected = {**chosen, "input_ids": ids, "labels": np.concatenate([np.full(start, -100), answer])}
        found.append((chosen, rejected))
    return found


def duetvl_step(directory: Path, framework: str) -> Step:
    """One step as the trainer takes it: pairs packed, their pictures encoded once."""
    import duetvl
    from duetvl.core.batch import Pair
    from duetvl.data.loading import loader
    from duetvl.parallel.passes import InOrder
    from duetvl.training.preference.dpo import PreferenceObjective, reference_of
    from duetvl.training.recipe.sections import DpoSection, OptimSection
    from duetvl.training.step import Trainer

    model = duetvl_model(directory, framework)
    reference = reference_of(InOrder(model.without_adapters(), model.backend), model.backend.ops)
    objective = PreferenceObjective(DpoSection(beta=BETA), model.backend)
    trainer = Trainer(model, objective, model.backend, OptimSection(lr=LR), reference=reference)
    no_pixels: dict[str, Any] = {"pixel_values": None}
    given = [Pair(duetvl.Sample(**a), duetvl.Sample(**{**b, **no_pixels})) for a, b in pairs()]

    def step() -> float:
        batch = model.pack(given)
        result = trainer.step(loader.Step((batch,), batch.sample_ids, {}), LR)
        assert result is not None
        return result.loss

    return step


def trl_step(directory: Path, style: str) -> Step:
    """One step in TRL's way."""
    import torch

    model = peft_model(directory)
    model.train()
    optimizer = torch_adamw(model)
    given = pairs()
    groups = [given] if style == "padded" else [[pair] for pair in given]

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
            loss = -torch.nn.functional.logsigmoid(BETA * gap).sum() / len(given)
            loss.backward()
            loss_sum += loss.item()
        clipped_update(optimizer)
        return loss_sum

    return step


CONTEST = Contest(
    __file__,
    {
        "duetvl torch": (duetvl_step, "torch"),
        "duetvl mindspore": (duetvl_step, "mindspore"),
        "transformers + PEFT, padded batch": (trl_step, "padded"),
        "transformers + PEFT, a pair at a time": (trl_step, "single"),
    },
    f"DPO with LoRA; four pairs, {sum(len(x['input_ids']) for pair in pairs() for x in pair)} tokens",
)


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
