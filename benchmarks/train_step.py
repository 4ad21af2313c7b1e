"""One training step (forward, backward, AdamW) against transformers, and MindSpore against torch.

Every contender runs in a process of its own, in turn, on the same weights, samples and optimizer settings:

    python benchmarks/train_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/train_step.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from contest import LR, Contest, Step, padded, samples


def duetvl_step(directory: Path, framework: str) -> Step:
    """One step on packed samples, as the trainer takes it."""
    import duetvl
    from duetvl.core.optimizer import Group

    backend = duetvl.load_backend(framework, device="cpu")
    model = duetvl.load_model(directory, backend=backend, dtype="float32")
    parameters = list(model.parameters.values())
    groups = [Group(parameters)]
    state = backend.optimizer.create(groups)
    given = [duetvl.Sample(**sample) for sample in samples()]

    def step() -> float:
        batch = model.pack(given)
        loss, tape = model.forward_loss(batch)
        backend.autograd.backward(tape, [backend.ops.from_numpy(np.ones((), np.float32))])
        scale = 1.0 / batch.trained_tokens
        norm = backend.optimizer.grad_norm(parameters) * scale
        scale *= min(1.0, 1.0 / norm)
        backend.optimizer.step(state, groups, lr=LR, betas=(0.9, 0.999), eps=1e-8, grad_scale=scale)
        return float(backend.to_numpy(loss)) / batch.trained_tokens

    return step


def transformers_step(directory: Path, style: str) -> Step:
    """One step as users of transformers run it: one padded batch, or one sample at a time."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
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
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum

    return step


CONTEST = Contest(
    __file__,
    {
        "duetvl torch": (duetvl_step, "torch"),
        "duetvl mindspore": (duetvl_step, "mindspore"),
        "transformers, padded batch": (transformers_step, "padded"),
        "transformers, micro-batch 1": (transformers_step, "single"),
    },
    f"Eight samples, {sum(len(x['input_ids']) for x in samples())} tokens, longest "
    f"{max(len(x['input_ids']) for x in samples())}",
)


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
