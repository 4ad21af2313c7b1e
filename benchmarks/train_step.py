"""One training step (forward, backward, AdamW) against transformers, and MindSpore against torch.

Every contender runs in a process of its own, in turn, on the same weights, samples and optimizer settings:

    python benchmarks/train_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/train_step.md.
"""

from __future__ import annotations

from pathlib import Path

from contest import Contest, Step, duetvl_sft, samples, transformers_sft


def duetvl_step(directory: Path, framework: str) -> Step:
    """All parameters."""
    import duetvl

    backend = duetvl.load_backend(framework, device="cpu")
    return duetvl_sft(duetvl.load_model(directory, backend=backend, dtype="float32"))


def transformers_step(directory: Path, style: str) -> Step:
    """All parameters."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    return transformers_sft(model, style)


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
