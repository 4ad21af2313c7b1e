"""One training step (forward, backward, AdamW) against transformers, and MindSpore against torch.

Every contender runs in a process of its own, in turn, on the same weights, samples and optimizer settings:

    python benchmarks/train_step.py [--repeats 5] [--threads 2] [--write]

`--write` puts the table and what it ran on into benchmarks/results/train_step.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from contest import Contender, Contest, Ready, duetvl_sft, ours, size_of, transformers_sft
from harness import SIDES


def duetvl_step(directory: Path, side: str, examples: Sequence[dict]) -> Ready:
    """All parameters."""
    import duetvl

    backend = duetvl.load_backend(SIDES[side], device="cpu")
    return duetvl_sft(duetvl.load_model(directory, backend=backend, dtype="float32"), examples)


def transformers_step(directory: Path, style: str, examples: Sequence[dict]) -> Ready:
    """All parameters."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    return transformers_sft(model, style, examples)


NEEDS = ("torch", "transformers")
CONTEST = Contest(
    __file__,
    "training step",
    {
        **ours(duetvl_step),
        "transformers, padded batch": Contender(transformers_step, "padded", needs=NEEDS),
        "transformers, micro-batch 1": Contender(transformers_step, "single", needs=NEEDS),
    },
    size_of,
)
rows = CONTEST.rows


if __name__ == "__main__":
    CONTEST.main(__doc__ or "")
