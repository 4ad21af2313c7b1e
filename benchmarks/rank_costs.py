"""Memory and messages of each rank in several layouts: `python benchmarks/rank_costs.py`.

Each layout is a run of real processes (torchrun, gloo): the random Qwen2.5-VL of memory_estimate.py, two steps of two
micro-batches for each replica. Memory is measured as there. Bytes and calls of the second step are those that the
collectives counted, beside `parallel/traffic.py`, which counts what a step has to send at least. Writes
results/rank_costs.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import status
from memory_estimate import CONFIG, PATCHES, TOKENS, samples

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "dp 2": {"parallel": {"dp": 2}},
    "one process, recompute full": {"train": {"recompute": "full"}},
    "dp 2, zero 3": {"parallel": {"dp": 2, "zero": 3}, "train": {"recompute": "full"}},
    "tp 2": {"parallel": {"tp": 2}},
    "tp 2, sequence": {"parallel": {"tp": 2, "sequence": True}},
    "tp 2, vision shard": {"parallel": {"tp": 2, "vision": "shard"}},
    "tp 4, sequence": {"parallel": {"tp": 4, "sequence": True}},
    "pp 2": {"parallel": {"pp": 2}},
    "pp 2 x tp 2, sequence": {"parallel": {"pp": 2, "tp": 2, "sequence": True}},
    "cp 2, ulysses": {"parallel": {"cp": 2, "cp_algorithm": "ulysses"}},
    "cp 2, ring": {"parallel": {"cp": 2, "cp_algorithm": "ring"}},
    "cp 2, ring, bfloat16": {"parallel": {"cp": 2, "cp_algorithm": "ring"}, "model": {"dtype": "bfloat16"}},
    "pp 2 x cp 2, ring": {"parallel": {"pp": 2, "cp": 2, "cp_algorithm": "ring"}},
    "dp 2 x tp 2, sequence": {"parallel": {"dp": 2, "tp": 2, "sequence": True}},
    "dp 2 x tp 2, bfloat16": {"parallel": {"dp": 2, "tp": 2}, "model": {"dtype": "bfloat16"}},
    "tp 2, recompute full": {"parallel": {"tp": 2}, "train": {"recompute": "full"}},
    "dp 2, LoRA": {"parallel": {"dp": 2}, "lora": {"rank": 16, "targets": ["vision", "projector", "language"]}},
}
MICRO_BATCHES = 2


def recipe_of(name: str, model: str) -> Any:
    """The recipe of a layout."""
    from duetvl.training.recipe.reading import make_recipe

    sections = LAYOUTS[name]
    return make_recipe(
        {
            **sections,
            "model": {"path": model, "freeze": [], "dtype": "float32", **sections.get("model", {})},
            "data": {"train": "-"},
        }
    )


def measure(name: str, model: str) -> dict[str, Any]:
    """On this rank: two steps, and what they took."""
    from duetvl.core.backend import load_backend
    from duetvl.data.loading.loader import Step
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.models.qwen_vl.loading import load_model
    from duetvl.models.qwen_vl.memory import Load, Trained
    from duetvl.parallel.pipeline import placed
    from duetvl.parallel.traffic import step_traffic
    from duetvl.training.lora import adapt, plan_adapters
    from duetvl.training.memory import division_of, estimate
    from duetvl.training.objective import TokenLoss
    from duetvl.training.step import Trainer

    recipe = recipe_of(name, model)
    backend = load_backend("torch_npu", "cpu")
    backend.collectives.start()
    ones = backend.ops.from_numpy(np.ones((64, 64), np.float32), recipe.model.dtype)
    backend.to_numpy(backend.ops.matmul(ones, ones))
    baseline = status("VmRSS")
    config = load_config(model)
    plan = plan_adapters(recipe, config)
    division = division_of(recipe, config, backend.collectives.rank)
    made = load_model(model, backend=backend, dtype=recipe.model.dtype, division=division)
    placed(made, division, backend)
    adapt(made, recipe, plan)
    made.recompute = recipe.train.recompute
    trainer = Trainer(made, TokenLoss(backend.ops), backend, recipe.optim, division=division)
    batches = tuple(made.pack([sample]) for sample in samples(MICRO_BATCHES))
    work = Step(batches, ("-",), numbers=tuple(range(MICRO_BATCHES)))
    for number in range(2):
        before = dict(backend.collectives.traffic), dict(backend.collectives.calls)
        trainer.step(work, 1e-5, number)
    sent, calls = ({k: n - old.get(k, 0) for k, n in now.items()} for now, old in zip(
        (backend.collectives.traffic, backend.collectives.calls), before, strict=True))  # fmt: skip
    load, adapters = Load(TOKENS, batches[0].trained_tokens, PATCHES, PATCHES), plan.adapters if plan else None
    found = estimate(config, recipe, load, MICRO_BATCHES, adapters, division)
    trained = Trained.of(config, recipe.model.dtype, recipe.model.freeze, adapters)
    least = step_traffic(config, trained, division, load, MICRO_BATCHES, recipe.train.recompute)
    row = {"measured": status("VmHWM") - baseline, "estimate": found.peak, "sent": sum(sent.values()), "calls": calls}
    rows = backend.collectives.gather_objects({**row, "least": least.total, "ranks": division.mesh.size})
    backend.collectives.barrier()
    backend.collectives.stop()
    return max(rows, key=lambda one: one["measured"])


def started(name: str, model: Path) -> dict[str, Any]:
    """`measure` on all ranks of a layout: that of the rank with most memory."""
    mesh = recipe_of(name, str(model)).parallel.mesh
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={mesh.size}"]
    command += [__file__, "--one", name, "--model", str(model)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def write(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """The table."""
    import torch

    whole = dict(rows)["one process"]["measured"]
    lines = [
        "# Memory and messages of a rank",
        "",
        "Made by `python benchmarks/rank_costs.py`: a random Qwen2.5-VL of about 110 million parameters, a step of two "
        f"micro-batches of {TOKENS} tokens with a picture of {PATCHES} patches for each replica, real processes over "
        "gloo, one thread each. Memory is that of the rank with most, in MiB, above the imported program; estimated "
        "by `duetvl check`. Share: of one process. Sent: what this rank sends in a step, counted where the "
        "collectives are called, in MiB, beside the least that a ring has to send. On a CPU bfloat16 is summed in "
        "float32, which doubles activations; over nccl and hccl they travel as they are.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, CPU.",
        "",
        "| layout | memory | estimate | difference | share | sent | least | ratio | calls |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in rows:
        mib = {key: row[key] / 2**20 for key in ("measured", "estimate", "sent", "least")}
        ratio = f"{row['sent'] / row['least']:.3f}" if row["least"] else ""
        calls = ", ".join(f"{kind} {n}" for kind, n in sorted(row["calls"].items()) if n)
        off = f"{row['estimate'] / row['measured'] - 1:+.1%}"
        lines.append(
            f"| {name} | {mib['measured']:.0f} | {mib['estimate']:.0f} | {off} | {row['measured'] / whole:.2f} | "
            f"{mib['sent']:.1f} | {mib['least']:.1f} | {ratio} | {calls} |"
        )
    (Path(__file__).parent / "results" / "rank_costs.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure all layouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="one layout by its name; nothing is written")
    arguments = parser.parse_args()
    if arguments.one:
        row = measure(arguments.one, arguments.model)
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write(json.dumps(row) + "\n")
        return
    with tempfile.TemporaryDirectory() as directory:
        from duetvl.models.qwen_vl.config import ModelConfig
        from duetvl.models.qwen_vl.loading import write_random_model

        model = Path(directory) / "model"
        write_random_model(ModelConfig.from_dict(CONFIG), model, seed=0)
        rows = []
        for name in [arguments.only] if arguments.only else LAYOUTS:
            rows.append((name, started(name, model)))
            sys.stdout.write(f"{name} {rows[-1][1]}\n")
            sys.stdout.flush()
        if not arguments.only:
            write(rows)


if __name__ == "__main__":
    main()
