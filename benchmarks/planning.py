"""What `duetvl plan` says beside what runs take: `python benchmarks/planning.py`.

Layouts that the search proposes for small random Qwen2.5-VL on 2 and 4 devices are run in real processes (torchrun,
gloo), each with the same four samples a step. Memory is measured as in rank_costs.py, on the rank with most. Seconds
are those of the fastest of some steps, which are made in turn over all layouts of as many processes, so that what else
the machine does meets all of them. Writes results/planning.md.
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

SAMPLES, ROUNDS = 4, 5


def model_of(width: int, layers: int) -> dict[str, Any]:
    """memory_estimate.py's model with another width and depth; heads of 64."""
    vision = {**CONFIG["vision_config"], "depth": layers // 2, "hidden_size": width // 2, "num_heads": width // 128}
    vision |= {"intermediate_size": 3 * width // 2, "out_hidden_size": width, "fullatt_block_indexes": [1]}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    return {**CONFIG, **sizes, **heads, "vision_config": vision}


LARGE, SMALL = model_of(512, 8), model_of(256, 4)  # for memory, and for seconds
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
    model_section = {"path": model, "dtype": "float32", "freeze": []}
    return make_recipe({**sections, "model": model_section, "data": data, "train": train})


def processes_of(sections: dict[str, Any]) -> int:
    """How many a layout takes."""
    size: int = recipe_of(sections, "-").parallel.mesh.size
    return size


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


def prepared(sections: dict[str, Any], model: str, backend: Any) -> tuple[Any, Any]:
    """A trainer for a layout, and the work of a step."""
    from duetvl.data.loading.loader import Step
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.models.qwen_vl.loading import load_model
    from duetvl.parallel.pipeline import placed
    from duetvl.training.memory import division_of
    from duetvl.training.objective import TokenLoss
    from duetvl.training.step import Trainer

    recipe = recipe_of(sections, model)
    division = division_of(recipe, load_config(model), backend.collectives.rank)
    made = load_model(model, backend=backend, dtype=recipe.model.dtype, division=division)
    placed(made, division, backend)
    made.recompute = recipe.train.recompute
    trainer = Trainer(made, TokenLoss(backend.ops), backend, recipe.optim, division=division)
    count = SAMPLES // division.mesh.dp
    batches = tuple(made.pack([sample]) for sample in samples(count))
    return trainer, Step(batches, ("-",), numbers=tuple(range(count)))


def opened() -> Any:
    """The backend, started, with what it loads at its first product."""
    from duetvl.core.backend import load_backend

    backend = load_backend("torch_npu", "cpu")
    backend.collectives.start()
    ones = backend.ops.from_numpy(np.ones((64, 64), np.float32))
    backend.to_numpy(backend.ops.matmul(ones, ones))
    return backend


def memory(sections: dict[str, Any], model: str) -> int:
    """Two steps of a layout: bytes of the rank with most."""
    backend = opened()
    baseline = status("VmRSS")
    trainer, work = prepared(sections, model, backend)
    for number in range(2):
        trainer.step(work, 1e-5, number)
    found = max(backend.collectives.gather_objects(status("VmHWM") - baseline))
    backend.collectives.barrier()
    backend.collectives.stop()
    return found


def seconds(names: list[str], model: str) -> dict[str, list[list[float]]]:
    """Steps of some layouts of as many processes, in turn: what each took, and how long the busiest rank had a
    processor in it; without the first step."""
    backend = opened()
    layouts = {name: prepared(TIMED[name], model, backend) for name in names}
    found: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(ROUNDS + 1):
        for name, (trainer, work) in layouts.items():
            backend.collectives.barrier()
            begun, computed = time.perf_counter(), time.process_time()
            trainer.step(work, 1e-5, number)
            own = time.perf_counter() - begun, time.process_time() - computed
            told = backend.collectives.gather_objects(own)
            found[name].append([max(part) for part in zip(*told, strict=True)])
    backend.collectives.barrier()
    backend.collectives.stop()
    return {name: times[1:] for name, times in found.items()}


def link() -> dict[str, float]:
    """Bytes a second of a sum over two processes, and seconds of a round of a small one."""
    backend = opened()
    found = {}
    for name, numbers in (("small", 16), ("large", 2**22)):
        x = backend.ops.from_numpy(np.ones(numbers, np.float32))
        times = []
        for _ in range(50):
            backend.collectives.barrier()
            begun = time.perf_counter()
            backend.collectives.all_reduce(x)
            times.append(time.perf_counter() - begun)
        found[name] = min(times[5:])
    backend.collectives.barrier()
    backend.collectives.stop()
    return {"latency": found["small"] / 2, "bandwidth": 4 * 2**22 / (found["large"] - found["small"])}


# -- in the program ----------------------------------------------------------------------------------------------------


def started(what: str, model: str, processes: int, detail: Any = None) -> Any:
    """What rank 0 measures of `memory`, `seconds` or `link` in this number of processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    words = [__file__, "--what", what, "--model", model, "--detail", json.dumps(detail)]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    if done.returncode or not lines:
        raise SystemExit(f"{what} {detail}: {done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix("found "))


def proposed(model: str) -> list[tuple[str, dict[str, Any], int]]:
    """Layouts of the search, at most four on 2, on 3 and on 4 devices: the first of each kind, with its memory."""
    from duetvl.cost_model.measured import this_cpu
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.planning.search import Search, Wish, degrees
    from duetvl.planning.table import sections_of
    from duetvl.training.memory import RUNNING

    config, found = load_config(model), []
    for devices in (2, 3, 4):
        device = this_cpu((TOKENS, 768, 2304), devices)
        wish = Wish(recipe_of({}, model), config, devices, device, 2**40, [size()])
        kinds: dict[Any, Any] = {}
        for one in Search(wish).best(1000):
            parallel = one.recipe.parallel
            kinds.setdefault((degrees(parallel), parallel.zero), one)
        for (name, zero), one in list(kinds.items())[:4]:
            words = f"{name}{' zero 3' * (zero == 3)}, recompute {one.recipe.train.recompute}"
            found.append((words, sections_of(one), one.memory.peak + RUNNING))
    return found


def expected(sections: dict[str, Any], model: str) -> Any:
    """A step by the cost model."""
    from duetvl.models.qwen_vl.config import load_config
    from duetvl.training.expected import expected_step

    return expected_step(recipe_of(sections, model), load_config(model), None, [size()])


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
    wire = started("link", small, 2)
    times: dict[str, list[list[float]]] = {}
    for processes in (1, 2):
        names = [name for name, sections in TIMED.items() if processes_of(sections) == processes]
        times |= started("seconds", small, processes, names)
        say(str(times))
    measured = []
    for name, sections, estimate in proposed(large):
        taken = started("memory", large, processes_of(sections), sections)
        measured.append((name, estimate, taken))
        say(f"{name}: {estimate} {taken}")
    steps = {name: expected(sections, small) for name, sections in TIMED.items()}
    told = {name: step.seconds for name, step in steps.items()}
    busy = {name: step.seconds - step.waiting for name, step in steps.items()}
    took, computed = ({name: min(one[part] for one in times[name]) for name in TIMED} for part in (0, 1))
    off = [estimate / taken - 1 for _, estimate, taken in measured]
    correlations = [spearman(list(a.values()), list(b.values())) for a, b in ((told, took), (busy, computed))]
    lines = [
        "# What a plan says beside what runs take",
        "",
        f"Made by `python benchmarks/planning.py`: random Qwen2.5-VL in float32, of width {LARGE['hidden_size']} and "
        f"{LARGE['num_hidden_layers']} layers for memory, {SMALL['hidden_size']} and {SMALL['num_hidden_layers']} for "
        f"seconds; {SAMPLES} samples a step of {TOKENS} tokens with a picture of {PATCHES} patches, one a micro-batch; "
        f"real processes over gloo, one thread each. {platform.machine()}, {os.cpu_count()} cores; the load of the "
        f"machine was {began:.1f} before and {os.getloadavg()[1]:.1f} after.",
        "",
        "## Memory of proposals",
        "",
        f"Of the rank with most, in MiB above the imported program: {sum(abs(one) <= 0.15 for one in off)} of "
        f"{len(off)} estimates are within 15%, the largest difference is {max(map(abs, off)):.0%}. As in "
        "`duetvl check`, an estimate is of the tensors and of what a running program takes besides; the processes give "
        "freed memory back (`MALLOC_MMAP_THRESHOLD_`). [rank_costs.md](rank_costs.md) has other layouts of a larger "
        "model.",
        "",
        "| layout | estimate | measured | difference |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {estimate / 2**20:.0f} | {taken / 2**20:.0f} | {estimate / taken - 1:+.1%} |"
            for name, estimate, taken in measured
        ),
        "",
        "## Seconds of eight layouts",
        "",
        f"Expected by the cost model with this processor measured, and the fastest of {ROUNDS} steps, which were made "
        f"in turn over the layouts. Beside it how long the busiest rank had a processor, and what is expected of that: "
        f"all but its wait for other stages. On a machine that others use the second pair says more. The rank "
        f"correlations (Spearman) are {correlations[0]:.2f} and {correlations[1]:.2f}.",
        "",
        "| layout | expected | measured | busiest rank, expected | measured | measured / expected |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {told[name]:.2f} | {took[name]:.2f} | {busy[name]:.2f} | {computed[name]:.2f} | "
            f"{computed[name] / busy[name]:.2f} |"
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
    for word in ("what", "model", "detail"):
        parser.add_argument(f"--{word}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what:
        detail = json.loads(args.detail)
        asked = {"memory": lambda: memory(detail, args.model), "seconds": lambda: seconds(detail, args.model)}
        found = asked.get(args.what, link)()
        if os.environ["RANK"] == "0":
            say(f"found {json.dumps(found)}")
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
