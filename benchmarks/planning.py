"""What `duetvl plan` says beside what runs take: `python benchmarks/planning.py`.

Layouts that the search proposes for small random Qwen2.5-VL on 2 and 4 devices are run in real processes (torchrun,
gloo), each with the same four samples a step. Memory is measured as in rank_costs.py, on the rank with most. Seconds
are those of the fastest step of several starts, in turn over all layouts, so that what else the machine does meets all
of them. Writes results/planning.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory_estimate import CONFIG, PATCHES, TOKENS, samples, status

SAMPLES, STEPS, STARTS = 4, 4, 2


def model_of(width: int, layers: int) -> dict[str, Any]:
    """memory_estimate.py's model with another width and depth; heads of 64."""
    vision = {**CONFIG["vision_config"], "depth": layers // 2, "hidden_size": width // 2, "num_heads": width // 128}
    vision |= {"intermediate_size": 3 * width // 2, "out_hidden_size": width, "fullatt_block_indexes": [1]}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    return {**CONFIG, **sizes, **heads, "vision_config": vision}


LARGE, SMALL = model_of(512, 8), model_of(256, 8)  # for memory, and for seconds
TIMED: dict[str, dict[str, Any]] = {  # eight layouts of the same work on at most two processes
    "one process": {},
    "one process, recompute full": {"train": {"recompute": "full"}},
    "dp 2": {"parallel": {"dp": 2}},
    "dp 2, recompute full": {"parallel": {"dp": 2}, "train": {"recompute": "full"}},
    "dp 2, zero 3": {"parallel": {"dp": 2, "zero": 3}, "train": {"recompute": "full"}},
    "tp 2": {"parallel": {"tp": 2, "sequence": True}},
    "cp 2": {"parallel": {"cp": 2}},
    "pp 2": {"parallel": {"pp": 2}},
}


def recipe_of(sections: dict[str, Any], model: str) -> Any:
    """A recipe of the benchmark's samples, one a micro-batch."""
    from duetvl.training.recipe.reading import make_recipe

    data = {"train": "-", "pack_tokens": TOKENS}
    train = {"global_batch": SAMPLES, **sections.get("train", {})}
    return make_recipe({**sections, "model": {"path": model}, "data": data, "train": train})


def size() -> Any:
    """Of a sample."""
    from duetvl.training.expected import SampleSize

    side = int(PATCHES**0.5)
    return SampleSize(TOKENS // 2, (TOKENS,), np.array([[1, side, side]]))


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# -- on each rank ------------------------------------------------------------------------------------------------------


def measure(sections: dict[str, Any], model: str, steps: int) -> dict[str, Any]:
    """Some steps: the memory of the rank with most, and the seconds of the fastest."""
    from duetvl.core.backend import load_backend
    from duetvl.data.loading.loader import Step
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.models.qwen_vl.loading import load_model
    from duetvl.parallel.pipeline import placed
    from duetvl.training.memory import division_of
    from duetvl.training.objective import TokenLoss
    from duetvl.training.step import Trainer

    recipe = recipe_of(sections, model)
    backend = load_backend("torch_npu", "cpu")
    backend.collectives.start()
    ones = backend.ops.from_numpy(np.ones((64, 64), np.float32), recipe.model.dtype)
    backend.to_numpy(backend.ops.matmul(ones, ones))
    baseline = status("VmRSS")
    division = division_of(recipe, load_config(model), backend.collectives.rank)
    made = load_model(model, backend=backend, dtype=recipe.model.dtype, division=division)
    placed(made, division, backend)
    made.recompute = recipe.train.recompute
    trainer = Trainer(made, TokenLoss(backend.ops), backend, recipe.optim, division=division)
    count = SAMPLES // division.mesh.dp
    batches = tuple(made.pack([sample]) for sample in samples(count))
    work = Step(batches, ("-",), numbers=tuple(range(count)))
    seconds = []
    for number in range(steps):
        backend.collectives.barrier()
        begun = time.perf_counter()
        trainer.step(work, 1e-5, number)
        seconds.append(time.perf_counter() - begun)
    own = {"memory": status("VmHWM") - baseline, "seconds": min(seconds[1:] or seconds)}
    rows = backend.collectives.gather_objects(own)
    backend.collectives.barrier()
    backend.collectives.stop()
    return {"memory": max(row["memory"] for row in rows), "seconds": max(row["seconds"] for row in rows)}


def link() -> dict[str, Any]:
    """Bytes a second of a sum over two processes, and seconds of a small one."""
    from duetvl.core.backend import load_backend

    backend = load_backend("torch_npu", "cpu")
    backend.collectives.start()
    found = {}
    for name, numbers in (("small", 16), ("large", 2**22)):
        x = backend.ops.from_numpy(np.ones(numbers, np.float32))
        seconds = []
        for _ in range(30):
            backend.collectives.barrier()
            begun = time.perf_counter()
            backend.collectives.all_reduce(x)
            seconds.append(time.perf_counter() - begun)
        found[name] = min(seconds[5:])
    backend.collectives.barrier()
    backend.collectives.stop()
    return {"latency": found["small"] / 2, "bandwidth": 4 * 2**22 / (found["large"] - found["small"])}


# -- in the program ----------------------------------------------------------------------------------------------------


def started(words: list[str], processes: int) -> dict[str, Any]:
    """What rank 0 says of this file run with these words on so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def run(sections: dict[str, Any], model: str, steps: int) -> dict[str, Any]:
    """`measure` in the processes of a layout."""
    mesh = recipe_of(sections, model).parallel.mesh
    return started(["--one", json.dumps(sections), "--model", model, "--steps", str(steps)], mesh.size)


def proposed(model: str) -> list[tuple[str, dict[str, Any], int]]:
    """Ten layouts of the search, five on 2 devices and five on 4: the first of each kind, with its memory."""
    from duetvl.cost_model.measured import this_cpu
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.planning.search import Search, Wish, degrees
    from duetvl.planning.table import sections_of

    config, found = load_config(model), []
    for devices in (2, 4):
        device = this_cpu((TOKENS, 768, 2304), devices)
        wish = Wish(recipe_of({}, model), config, devices, device, 2**40, [size()])
        kinds: dict[Any, Any] = {}
        for one in Search(wish).best(1000):
            parallel = one.recipe.parallel
            kinds.setdefault((degrees(parallel), parallel.zero), one)
        for (name, zero), one in list(kinds.items())[:5]:
            words = f"{name}{' zero 3' * (zero == 3)}, recompute {one.recipe.train.recompute}"
            found.append((words, sections_of(one), one.memory.peak))
    return found


def expected(sections: dict[str, Any], model: str) -> float:
    """Seconds of a step by the cost model."""
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.training.expected import expected_step

    return expected_step(recipe_of(sections, model), load_config(model), None, [size()]).seconds


def ranks_of(numbers: list[float]) -> list[int]:
    """The place of each in ascending order."""
    order = sorted(range(len(numbers)), key=lambda n: numbers[n])
    return [order.index(n) for n in range(len(numbers))]


def spearman(one: list[float], other: list[float]) -> float:
    """The rank correlation of two lists without ties."""
    return float(np.corrcoef(ranks_of(one), ranks_of(other))[0, 1])


def page(large: str, small: str) -> str:
    """results/planning.md"""
    began = os.getloadavg()[1]
    wire = started(["--link"], 2)
    times: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(STARTS):
        for name, sections in TIMED.items():
            times[name].append(run(sections, small, STEPS)["seconds"])
            say(f"{name} {times[name][-1]:.2f} s")
    memory = []
    for name, sections, estimate in proposed(large):
        taken = run(sections, large, 2)["memory"]
        memory.append((name, estimate, taken))
        say(f"{name} {estimate} {taken}")
    told = {name: expected(sections, small) for name, sections in TIMED.items()}
    took = {name: min(seconds) for name, seconds in times.items()}
    off = [estimate / taken - 1 for _, estimate, taken in memory]
    correlation = spearman(list(told.values()), list(took.values()))
    lines = [
        "# What a plan says beside what runs take",
        "",
        f"Made by `python benchmarks/planning.py`: random Qwen2.5-VL in float32, of widths {LARGE['hidden_size']} for "
        f"memory and {SMALL['hidden_size']} for seconds, both with {LARGE['num_hidden_layers']} layers; {SAMPLES} "
        f"samples a step of {TOKENS} tokens with a picture of {PATCHES} patches, one a micro-batch; real processes "
        f"over gloo, one thread each. {platform.machine()}, {os.cpu_count()} cores; the load of the machine was "
        f"{began:.1f} before and {os.getloadavg()[1]:.1f} after: others were at work on it.",
        "",
        "## Memory of ten proposals",
        "",
        f"Of the rank with most, in MiB above the imported program. The largest difference is "
        f"{max(map(abs, off)):.1%}.",
        "",
        "| layout | estimate | measured | difference |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {estimate / 2**20:.0f} | {taken / 2**20:.0f} | {estimate / taken - 1:+.1%} |"
            for name, estimate, taken in memory
        ),
        "",
        "## Seconds of eight layouts",
        "",
        f"Expected by the cost model with this processor measured, and the fastest of {STEPS - 1} steps in each of "
        f"{STARTS} starts. The rank correlation (Spearman) of both columns is {correlation:.2f}.",
        "",
        "| layout | expected | measured | measured / expected | starts |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {name} | {told[name]:.2f} | {took[name]:.2f} | {took[name] / told[name]:.2f} | "
            f"{', '.join(f'{one:.2f}' for one in times[name])} |"
            for name in TIMED
        ),
        "",
        f"Two processes over gloo here: {wire['bandwidth'] / 1e9:.2f} GB/s in a sum of 16 MB, "
        f"{wire['latency'] * 1e6:.0f} microseconds for each round of a small one.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """One layout in a rank, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.link or args.one:
        found = link() if args.link else measure(json.loads(args.one), args.model, args.steps)
        if os.environ["RANK"] == "0":
            say(json.dumps(found))
        return
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.loading import write_random_model

    with tempfile.TemporaryDirectory() as directory:
        places = [str(Path(directory) / name) for name in ("large", "small")]
        for config, place in zip((LARGE, SMALL), places, strict=True):
            write_random_model(ModelConfig.from_dict(config), Path(place), seed=0)
        text = page(*places)
    target = Path(__file__).parent / "results" / "planning.md"
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
