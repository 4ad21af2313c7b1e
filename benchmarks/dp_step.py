"""A training step over two ranks of one thread each, beside one process of two threads, on both backends.

    python benchmarks/dp_step.py [--repeats 5] [--write]

Ranks divide the packs of a step and the update (ZeRO-1). Besides wall and processor seconds it counts, at the protocol
of collectives, what each rank calls and sends in a step, and puts the least that it could send beside it: of the
gradients in float32 and of the weights in their own dtype the share that other ranks own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from contest import model_config, samples

RESULTS = Path(__file__).parent / "results" / "dp_step.md"
BACKENDS = ("torch_npu", "mindspore")
RANKS = 2
SAMPLES = 5
WARM = 2  # steps before those that are measured


def small_config() -> dict[str, Any]:
    """Qwen2.5-VL of a few million parameters."""
    given = model_config()
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision = given["vision_config"] | {"depth": 2, "out_hidden_size": 128, "fullatt_block_indexes": [1]}
    return {**given, **sizes, "vision_config": vision}


def model_of(backend: Any) -> Any:
    """The same random weights on every rank."""
    from duetvl.core.params import Parameter
    from duetvl.core.random import philox
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.model import QwenVL
    from duetvl.models.qwen_vl.parameters import parameter_shapes

    def tensor(path: str, shape: tuple[int, ...]) -> Any:
        array = philox(0, path).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        return backend.ops.from_numpy(array if len(shape) > 1 else 1 + array)

    config = ModelConfig.from_dict(small_config())
    return QwenVL(config, backend, {p: Parameter(p, tensor(p, s)) for p, s in parameter_shapes(config).items()})


def measure(name: str, repeats: int) -> dict[str, Any]:
    """What this rank took for a step, and what it sent."""
    import duetvl
    from duetvl.core.backend import load_backend
    from duetvl.core.mesh import Mesh
    from duetvl.data.loading.loader import Step
    from duetvl.data.loading.packing import assign
    from duetvl.parallel.division import Division
    from duetvl.training.objective import TokenLoss
    from duetvl.training.recipe.sections import OptimSection
    from duetvl.training.step import Trainer

    backend = load_backend(name, device="cpu")
    counted = backend.collectives
    counted.start()
    model = model_of(backend)
    packs = [model.pack([duetvl.Sample(**sample)]) for sample in samples()[:SAMPLES]]
    own = assign([(batch.tokens, len(batch.pixel_rows)) for batch in packs], counted.size)[counted.rank]
    step = Step(tuple(packs[i] for i in own), (), numbers=tuple(own))
    division = Division(Mesh(dp=counted.size), rank=counted.rank)
    trainer = Trainer(model, TokenLoss(backend.ops), backend, OptimSection(), division=division)
    wall, processor, losses = [], [], []
    for number in range(WARM + repeats):
        counted.traffic.clear(), counted.calls.clear()
        before = time.perf_counter(), time.process_time()
        losses.append(trainer.step(step, 1e-5, number).loss)
        wall.append(time.perf_counter() - before[0])
        processor.append(time.process_time() - before[1])
    found = {
        "wall": statistics.median(wall[WARM:]),
        "processor": statistics.median(processor[WARM:]),
        "loss": losses[-1],
        "bytes": dict(counted.traffic),
        "calls": dict(counted.calls),
        "numbers": sum(int(np.prod(p.shape)) for p in trainer.trained),
    }
    every = counted.gather_objects(found)
    counted.stop()
    return {**found, "processor": sum(each["processor"] for each in every)}


def run(name: str, ranks: int, repeats: int) -> dict[str, Any]:
    """The figures of one process with as many threads as there would be ranks, or of these ranks."""
    tools = Path(sys.executable).parent
    with socket.socket() as probe, tempfile.TemporaryDirectory() as place:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        program = [str(Path(__file__).resolve()), "--repeats", str(repeats), "--inside", name, f"{place}/found"]
        msrun = [f"--worker_num={ranks}", f"--local_worker_num={ranks}", f"--master_port={port}", "--join=True"]
        starts = {
            "torch_npu": [str(tools / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={port}"],
            "mindspore": [str(tools / "msrun"), *msrun, f"--log_dir={place}/log"],
        }
        command = [*(starts[name] if ranks > 1 else [sys.executable]), *program]
        threads = str(1 if ranks > 1 else RANKS)
        path = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        limits = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "GLOG_v": "4"}
        probe.close()
        subprocess.run(
            command,
            env={**os.environ, **path, **limits},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=place,
        )
        return json.loads(Path(f"{place}/found").read_text())


def table(found: dict[tuple[str, int], dict[str, Any]], repeats: int) -> str:
    """The figures as markdown, with the machine and the command."""
    lines = [
        "| | wall s per step | processor s per step | calls per rank | MB sent per rank | least MB | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, ranks), x in found.items():
        what = f"{name}, {ranks} ranks x 1 thread" if ranks > 1 else f"{name}, 1 process x {RANKS} threads"
        calls = ", ".join(f"{count} {call}" for call, count in x["calls"].items()) or "none"
        least = x["numbers"] * (4 + 4) * (ranks - 1) / ranks
        lines.append(
            f"| {what} | {x['wall']:.2f} | {x['processor']:.2f} | {calls} | {sum(x['bytes'].values()) / 1e6:.2f} "
            f"| {least / 1e6:.2f} | {x['loss']:.5f} |"
        )
    numbers = next(iter(found.values()))["numbers"]
    load = os.getloadavg()[0]
    return "\n".join(
        [
            *lines,
            "",
            f"{numbers / 1e6:.1f} million parameters, float32; the first {SAMPLES} samples of `contest.py`, each a "
            f"pack; median of {repeats} steps after {WARM}. Processor seconds are of all ranks together.",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; load average at the "
            f"end {load:.1f}.",
            f"Command: `python benchmarks/dp_step.py --repeats {repeats} --write`",
            "",
        ]
    )


def main() -> None:
    """Every contender in processes of its own; print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", nargs=2, metavar=("BACKEND", "FILE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        name, file = chosen.inside
        found = measure(name, chosen.repeats)
        if int(os.environ.get("RANK", os.environ.get("MS_NODE_ID", "0")) or 0) == 0:
            Path(file).write_text(json.dumps(found), encoding="utf-8")
        return
    report = table(
        {(name, ranks): run(name, ranks, chosen.repeats) for name in chosen.only for ranks in (1, RANKS)},
        chosen.repeats,
    )
    print(report)  # noqa: T201
    if chosen.write:
        RESULTS.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
