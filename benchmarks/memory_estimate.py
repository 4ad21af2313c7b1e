"""Compare `training/memory.py` with what runs on torch's CPU backend take: `python benchmarks/memory_estimate.py`.

Each recipe runs in processes of its own: a random Qwen2.5-VL of about 110 million parameters, two steps of two
micro-batches. Measured is the peak resident set (VmHWM) less the resident set after everything is imported and a small
product was made, once with glibc's default malloc, which keeps much of what is freed, and once with one that gives it
back (MALLOC_MMAP_THRESHOLD_). Writes results/memory_estimate.md; the status is 1 where an estimate is off by more than
15%.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import status

TOKENS, PATCHES = 512, 576
ALLOWED, THRESHOLD = 0.15, "262144"
CONFIG = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
    "vision_start_token_id": 15001,
    "vision_end_token_id": 15002,
    "image_token_id": 15003,
    "video_token_id": 15004,
    "vision_config": {
        "depth": 8,
        "hidden_size": 384,
        "intermediate_size": 1152,
        "out_hidden_size": 768,
        "num_heads": 6,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [3, 7],
    },
}
RECIPES = {
    "float32": {},
    "float32, one micro-batch": {"micro_batches": 1},
    "bfloat16": {"model.dtype": "bfloat16"},
    "recompute full": {"train.recompute": "full"},
    "vision frozen": {"model.freeze": ["vision"]},
    "LoRA of all linear layers, rank 16": {"lora": {"rank": 16, "targets": ["vision", "projector", "language"]}},
    "recompute selective": {"train.recompute": "selective"},
    "LoRA, bfloat16, recompute full": {"lora": {"rank": 16}, "model.dtype": "bfloat16", "train.recompute": "full"},
}


def recipe_of(name: str, model: str) -> tuple[Any, int]:
    """A recipe, and how many micro-batches a step has."""
    from duetvl.training.recipe.reading import make_recipe

    sections: dict = {"model": {"path": model, "freeze": [], "dtype": "float32"}, "data": {"train": "-"}}
    for key, value in RECIPES[name].items():
        section, dot, field = key.partition(".")
        if dot:
            sections.setdefault(section, {})[field] = value
        elif section != "micro_batches":
            sections[section] = value
    return make_recipe(sections), RECIPES[name].get("micro_batches", 2)


def samples(count: int) -> Iterator[Any]:
    """Each a picture and text of which the second half is trained."""
    from duetvl.core.batch import IGNORE, Sample

    rng = np.random.default_rng(0)
    merged = PATCHES // 4
    for number in range(count):
        text = rng.integers(0, 15000, TOKENS - merged - 2)
        ids = np.concatenate([[15001], np.full(merged, 15003), [15002], text])
        labels = np.where(np.arange(TOKENS) < TOKENS // 2, IGNORE, ids)
        pixels = rng.standard_normal((PATCHES, 3 * 2 * 14 * 14), dtype=np.float32)
        yield Sample(ids, labels, pixels, np.array([[1, 24, PATCHES // 24]]), id=str(number))


def measure(name: str, model: str) -> dict[str, float]:
    """In this process: run the recipe, and what its peak was."""
    from duetvl.core.backend import load_backend
    from duetvl.data.loading.loader import Step
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.models.qwen_vl.loading import load_model
    from duetvl.models.qwen_vl.memory import Load
    from duetvl.training.lora import adapt, plan_adapters
    from duetvl.training.memory import IMPORTED, estimate
    from duetvl.training.objective import TokenLoss
    from duetvl.training.step import Trainer

    recipe, micro_batches = recipe_of(name, model)
    backend = load_backend("torch_npu", "cpu")
    ones = backend.ops.from_numpy(np.ones((64, 64), np.float32), recipe.model.dtype)
    backend.to_numpy(backend.ops.matmul(ones, ones))
    baseline = status("VmRSS")
    config = load_config(model)
    plan = plan_adapters(recipe, config)
    made = load_model(model, backend=backend, dtype=recipe.model.dtype)
    adapt(made, recipe, plan)
    made.recompute = recipe.train.recompute
    trainer = Trainer(made, TokenLoss(backend.ops), backend, recipe.optim)
    batches = tuple(made.pack([sample]) for sample in samples(micro_batches))
    work = Step(batches, ("-",), None)
    for number in range(2):
        trainer.step(work, 1e-5, number)
    load = Load(TOKENS, batches[0].trained_tokens, PATCHES)
    found = estimate(config, recipe, load, micro_batches, plan.adapters if plan else None)
    expected = found.process - IMPORTED
    return {"measured": status("VmHWM") - baseline, "imported": baseline, **vars(found), "expected": expected}


def both(name: str, model: Path) -> dict[str, float]:
    """`measure` in two processes, which differ in malloc."""
    command = [sys.executable, __file__, "--one", name, "--model", str(model)]
    environments = ({**os.environ, "MALLOC_MMAP_THRESHOLD_": THRESHOLD}, dict(os.environ))
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"{name} failed")
    found, default = (json.loads(answer.splitlines()[-1]) for answer in answers)
    back = {"expected_back": found["expected"], "measured_back": found["measured"]}
    return {**default, **back}


def main() -> int:
    """Measure all recipes; 1 where an estimate is off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="one recipe by its name; nothing is written")
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(measure(arguments.one, arguments.model)) + "\n")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        from duetvl.models.qwen_vl.config import ModelConfig
        from duetvl.models.qwen_vl.loading import write_random_model

        model = Path(directory) / "model"
        write_random_model(ModelConfig.from_dict(CONFIG), model, seed=0)
        rows = []
        for name in [arguments.only] if arguments.only else RECIPES:
            rows.append((name, both(name, model)))
            sys.stdout.write(f"{name} {rows[-1][1]}\n")
            sys.stdout.flush()
            if not arguments.only:
                write(rows)
    return 1 if any(abs(off(row, which)) > ALLOWED for _, row in rows for which in ("", "_back")) else 0


def off(row: dict[str, float], which: str) -> float:
    """By which part an estimate differs from what was measured."""
    return row[f"expected{which}"] / row[f"measured{which}"] - 1


def write(rows: list[tuple[str, dict[str, float]]]) -> None:
    """The table."""
    import torch

    from duetvl.training.memory import RUNNING

    parts = ("weights", "gradients", "optimizer", "activations", "passing")
    imported = max(row["imported"] for _, row in rows) / 2**20
    lines = [
        "# Memory: estimated and measured",
        "",
        "Made by `python benchmarks/memory_estimate.py`: a random Qwen2.5-VL of about 110 million parameters, two "
        f"steps of two micro-batches of {TOKENS} tokens with a picture of {PATCHES} patches, each recipe in a process "
        f"of its own. Measured is the peak resident set above that of the imported program, which is {imported:.0f} "
        f"MiB; estimated are the tensors at the peak, {RUNNING / 2**20:.0f} MiB that the program takes more while it "
        "runs, and what glibc's malloc keeps of freed memory. The last three columns are with "
        f"MALLOC_MMAP_THRESHOLD_={THRESHOLD}, so that nothing is kept. MiB.",
        "",
        f"torch {torch.__version__}, {' '.join(platform.libc_ver())}, {platform.machine()}, CPU, 1 thread.",
        "",
        f"| recipe | {' | '.join(parts)} | tensors at the peak | kept | estimate | measured | difference "
        "| estimate, nothing kept | measured | difference |",
        f"|---|{'---:|' * (len(parts) + 8)}",
    ]
    for name, row in rows:
        cells = [f"{row[part] / 2**20:.0f}" for part in (*parts, "peak", "kept")]
        for which in ("", "_back"):
            cells += [f"{row[f'{kind}{which}'] / 2**20:.0f}" for kind in ("expected", "measured")]
            cells.append(f"{off(row, which):+.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (Path(__file__).parent / "results" / "memory_estimate.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
