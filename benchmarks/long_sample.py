"""One long video over ranks of context parallelism: `python benchmarks/long_sample.py [--tokens N] [--layers N]`.

A sample of `--tokens` tokens, nearly all of them of one generated video clip, goes the way of a training
run: it is decoded, packed and trained on for one step, by real processes (torchrun, gloo). The model is a random
Qwen2.5-VL with heads of the published sizes (128 numbers, and 80 in the vision tower), few of them and few layers, in
float32. Memory is that of the rank with most: with a malloc that gives back what is freed (MALLOC_MMAP_THRESHOLD_), the
peak of the resident set in the step above that of the imported program, less the batch, which lies in the host's
memory. `--write` puts the table into results/long_sample.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "training")]

from harness import status  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "cp 4, ulysses": {"cp": 4, "cp_algorithm": "ulysses"},
    "cp 4, ring": {"cp": 4, "cp_algorithm": "ring"},
}
SIDE, MERGED = 448, 256  # of a frame: pixels, and the tokens of two frames
VISION = {
    "depth": 2, "hidden_size": 160, "intermediate_size": 320, "num_heads": 2, "tokens_per_second": 2,
    "fullatt_block_indexes": [1], "out_hidden_size": 512,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
COLUMNS = {
    "memory": "peak", "of one process": "share", "estimate": "estimate", "tape and step": "step", "batch": "batch",
    "loss": "loss", "gradient norm": "norm", "processor s": "processor", "wall s": "wall",
}  # fmt: skip


def write_inputs(place: Path, tokens: int, layers: int) -> None:
    """The model, and a record about a clip whose frames give just under `tokens` tokens."""
    import av
    import tiny_run

    tiny_run.FAMILIES["qwen2_5_vl"]["vision_config"] = VISION
    tiny_run.write_model(place / "model", num_hidden_layers=layers, **SIZES)
    blocks = np.random.default_rng(0)
    with av.open(str(place / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height = stream.width = SIDE
        stream.pix_fmt = "yuv420p"
        for _ in range(2 * ((tokens - 100) // MERGED)):
            coarse = blocks.integers(0, 256, (SIDE // 32, SIDE // 32, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(np.kron(coarse, np.ones((32, 32, 1), np.uint8)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    turns = [("user", "<video>what is shown?"), ("assistant", "squares of many colours")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (place / "data.jsonl").write_text(json.dumps({"messages": messages, "videos": ["clip.mp4"]}) + "\n")


def recipe_of(name: str, place: Path, tokens: int) -> Any:
    """The recipe of a layout."""
    from duetvl.training.recipe.reading import make_recipe

    pixels = {"video_max_pixels": SIDE**2, "video_total_pixels": SIDE**2 * tokens, "video_max_frames": tokens}
    data = {"train": str(place / "data.jsonl"), "pack_tokens": tokens, **pixels}
    sections = {
        "data": data,
        "model": {"path": str(place / "model"), "freeze": []},
        "train": {"global_batch": 1, "steps": 1},
    }
    return make_recipe({**sections, "parallel": LAYOUTS[name], "backend": {"device": "cpu"}})


def measure(name: str, place: Path, tokens: int) -> dict[str, Any]:
    """On this rank: one step on the sample, and what it took; of all ranks that with most memory."""
    from duetvl.core.backend import load_backend
    from duetvl.models.qwen_vl.memory import Load
    from duetvl.training.memory import estimate
    from duetvl.training.sft import prepare
    from duetvl.training.step import Trainer

    recipe, backend = recipe_of(name, place, tokens), load_backend("torch_npu", "cpu")
    backend.collectives.start()
    ones = backend.ops.zeros((64, 64))
    backend.to_numpy(backend.ops.matmul(ones, ones))
    program = status("VmRSS")
    job = prepare(recipe, backend)
    trainer = Trainer(job.model, job.objective, backend, recipe.optim, division=job.division)
    before = status("VmRSS")
    work = loaded(recipe, job, backend, trainer)
    batch, held = status("VmRSS") - before, status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    clock, processor = time.monotonic(), time.process_time()
    result = trainer.step(work, 1e-5, 0)
    wall, processor = time.monotonic() - clock, time.process_time() - processor
    (one,) = work.batches
    load = Load(one.tokens, one.trained_tokens, len(one.pixel_rows), (SIDE // 14) ** 2)
    found = estimate(job.model.config, recipe, load, 1, None, job.division)
    row = {
        "peak": status("VmHWM") - program - batch, "estimate": found.peak, "step": status("VmHWM") - held,
        "batch": batch, "loss": result.loss, "norm": result.grad_norm, "wall": wall, "tokens": one.tokens,
    }  # fmt: skip
    rows = backend.collectives.gather_objects({**row, "processor": processor})
    backend.collectives.stop()
    return {**max(rows, key=lambda one: one["peak"]), "processor": sum(one["processor"] for one in rows)}


def loaded(recipe: Any, job: Any, backend: Any, trainer: Any) -> Any:
    """The step of a training run's data."""
    from duetvl.data.loading.peers import Peers
    from duetvl.training.feed import DataSets, Feed

    engine = backend.collectives
    peers = Peers.meet(recipe.parallel.mesh, engine.rank, engine.meeting_host(), trainer.ranks.each)
    feed = Feed(recipe, DataSets(recipe.data), job.encoder, peers=peers)
    with feed.started(1):
        return feed.next_step()


def started(name: str, place: Path, tokens: int) -> dict[str, Any]:
    """`measure` on all ranks of a layout."""
    size = recipe_of(name, place, tokens).parallel.mesh.size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", __file__]
    command += ["--one", name, "--place", str(place), "--tokens", str(tokens)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return found


def report(rows: dict[str, dict[str, Any]], command: str) -> str:
    """The page."""
    import torch
    from harness import processor_name

    tokens = next(iter(rows.values()))["tokens"]
    lines = [
        "# A long video over ranks",
        "",
        f"`OMP_NUM_THREADS=1 python {command}` on {processor_name()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; load {os.getloadavg()[0]:.1f} at the end. One sample of {tokens} tokens, nearly all of "
        "them of one video, one training step. Memory in MiB, of the rank with most, above the imported program and "
        "the batch, beside the estimate of `duetvl check`; how much of it comes and goes with the step; the batch as "
        "it lies in the host's memory: the frames as bytes, all of them on each rank. Seconds of the processors are "
        "those of all ranks together. Beyond a quarter are the weights and the rows of them that a rank updates; and "
        "where four ranks exchange heads for rows and the model has two key heads, each of these is on two ranks.",
        "",
        f"| layout | {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    whole = next(iter(rows.values()))["peak"]
    for name, row in rows.items():
        row = {**row, "share": row["peak"] / whole}
        lines.append(f"| {name} | {' | '.join(cell(key, row[key]) for key in COLUMNS.values())} |")
    return "\n".join(lines) + "\n"


def cell(key: str, value: float) -> str:
    """A number as the table has it."""
    if key in ("peak", "estimate", "step", "batch"):
        return f"{value / 2**20:.0f}"
    return f"{value:.3f}" if key == "share" else f"{value:.6f}" if key in ("loss", "norm") else f"{value:.0f}"


def main() -> None:
    """Measure all layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=1, help="of the language model")
    parser.add_argument("--only", help="one layout by its name")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    say = partial(print, flush=True)
    if arguments.one:
        row = measure(arguments.one, arguments.place, arguments.tokens)
        if os.environ["RANK"] == "0":
            say(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), arguments.tokens, arguments.layers)
        rows = {}
        for name in [arguments.only] if arguments.only else LAYOUTS:
            rows[name] = started(name, Path(directory), arguments.tokens)
            page = report(rows, " ".join(["benchmarks/long_sample.py", *sys.argv[1:]]))
            if arguments.write:
                (ROOT / "benchmarks" / "results" / "long_sample.md").write_text(page)
            say(name, rows[name])
    say(page)


if __name__ == "__main__":
    main()
