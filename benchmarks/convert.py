"""Time and memory of mm-convert on a checkpoint of the shape of Qwen2-VL-2B, against `cp -r` of the same bytes.

    python benchmarks/convert.py [--directory /tmp] [--repeat 2] [--write]

The checkpoint is made here (4.4 GB of bfloat16, in shards as on the hub) and removed afterwards; it takes three times
its size on disk. Every case starts with a cold page cache where that may be dropped (root), and ends when all is on
disk: `cp -r` is followed by `sync`, as mm-convert waits for its files too; the time of `cp -r` alone is told beside.
Memory is VmHWM of the converting process, which includes mapped pages of files, and the peak of RssAnon, which does
not. Last, a plan for the shape of Qwen2.5-VL-72B, in sparse files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from duetvl.convert.streaming import plan_tensor_file
from duetvl.models.qwen_vl.config import published_config
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import plan_shards, write_shards

RESULTS = Path(__file__).parent / "results" / "convert.md"
TIME_AIM, MEMORY_AIM = 3.0, 1.5e9
SMALL, LARGE = "Qwen2-VL-2B", "Qwen2.5-VL-72B"
SPLIT = "llm_pp_layers [[12,16]] --cfg.{0}.vit_pp_layers [[32,0]] --cfg.{0}.tp_size 2"
WHOLE = "llm_pp_layers [[28]] --cfg.{0}.vit_pp_layers [[32]]"
CHILD = """
import sys, threading, time, json
peak, stop = [0], threading.Event()
def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], field("RssAnon"))
threading.Thread(target=watch, daemon=True).start()
from duetvl.convert.cli import main
code = main(sys.argv[1:])
print(json.dumps([field("VmHWM"), peak[0]]))
sys.exit(code)
"""


def main() -> int:
    """Make the checkpoint, measure every case, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default="/tmp")
    parser.add_argument("--repeat", type=int, default=2, help="the fastest of so many runs counts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="convert-") as folder:
        os.chdir(folder)
        size = make_checkpoint(Path("hf"))
        copy = min(time_copy() for _ in range(arguments.repeat))
        rows = [best(name, line, arguments) for name, line in cases().items()]
        plan = plan_large(Path("large"))
    text = report(size, copy, rows, plan, arguments)
    print(text)  # noqa: T201
    if arguments.write:
        RESULTS.write_text(text, encoding="utf-8")
    slow = any(seconds > TIME_AIM * copy[1] or peak > MEMORY_AIM for _, seconds, peak, _ in rows)
    return 1 if slow else 0


def cases() -> dict[str, str]:
    """What is converted, in an order in which each finds its source."""
    one, two = (f"--cfg.parallel_config.{part.format('parallel_config')}" for part in (SPLIT, WHOLE))
    source = f"--cfg.source_parallel_config.{SPLIT.format('source_parallel_config')}"
    target = f"--cfg.target_parallel_config.{WHOLE.format('target_parallel_config')}"
    return {
        "hf_to_mm, TP2 x PP2": f"hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir hf {one}",
        "resplit TP2 x PP2 to one file": f"resplit --cfg.source_dir mm --cfg.target_dir one {source} {target}",
        "mm_to_hf, TP2 x PP2": f"mm_to_hf --cfg.save_hf_dir back --cfg.mm_dir mm --cfg.hf_config.hf_dir hf {one}",
        "hf_to_mm, one file": f"hf_to_mm --cfg.mm_dir whole --cfg.hf_config.hf_dir hf {two}",
    }


def make_checkpoint(directory: Path) -> int:
    """Random bytes would take as long as the conversion; a pattern that differs from tensor to tensor does as well."""
    config = published_config(SMALL)
    shapes = parameter_shapes(config)
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in shapes.items()}
    numbers = dict(zip(shapes, range(len(shapes)), strict=True))

    def fetch(name: str) -> np.ndarray:
        count = int(np.prod(shapes[name]))
        mixed = np.arange(numbers[name], count + numbers[name], dtype=np.uint32) * np.uint32(2654435761)
        return (mixed >> 16).astype(np.uint16).reshape(shapes[name])

    write_shards(directory, specs, fetch, max_shard_bytes=4 * 10**9)
    write_config(config, directory, "bfloat16")
    return sum(path.stat().st_size for path in directory.iterdir())


def time_copy() -> tuple[float, float]:
    """Seconds of `cp -r`, alone and with what is still in memory written out."""
    drop_cache()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", "hf", "copy"], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", "-f", "."], check=True)
    done = time.perf_counter()
    shutil.rmtree("copy")
    return copied - started, done - started


def best(name: str, line: str, arguments: argparse.Namespace) -> tuple[str, float, int, int]:
    """Name, seconds, VmHWM, peak RssAnon; what is written is kept where a later case needs it."""
    target = Path(
        next(
            word for flag, word in zip(line.split(), line.split()[1:], strict=False) if flag in TARGETS[line.split()[0]]
        )
    )
    runs = []
    for _ in range(arguments.repeat):
        shutil.rmtree(target, ignore_errors=True)
        drop_cache()
        words = ["Qwen2VLConverter", *line.split(), "--cfg.workers", str(arguments.workers)]
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", CHILD, *words], check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - started
        runs.append((seconds, *json.loads(done.stdout.splitlines()[-1])))
    if target.name != "mm":
        shutil.rmtree(target)
    return name, min(run[0] for run in runs), max(run[1] for run in runs), max(run[2] for run in runs)


TARGETS = {"hf_to_mm": ["--cfg.mm_dir"], "resplit": ["--cfg.target_dir"], "mm_to_hf": ["--cfg.save_hf_dir"]}


def plan_large(directory: Path) -> str:
    """What --cfg.dry_run says of 72B on two tensor-parallel ranks and eight stages."""
    config = published_config(LARGE)
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in parameter_shapes(config).items()}
    shards = plan_shards(specs, 4 * 10**9)
    directory.mkdir()
    for number, names in enumerate(shards, 1):
        planned = plan_tensor_file({name: specs[name] for name in names}, {"format": "pt"})
        with open(directory / f"model-{number:05}-of-{len(shards):05}.safetensors", "wb") as handle:
            handle.truncate(planned.size)
            for position, data in planned.fixed:
                handle.seek(position)
                handle.write(data)
    write_config(config, directory, "bfloat16")
    layers = "llm_pp_layers [[6,11,11,11,11,11,11,8]] --cfg.parallel_config.vit_pp_layers [[32,0,0,0,0,0,0,0]]"
    division = f"--cfg.parallel_config.{layers} --cfg.parallel_config.tp_size 2"
    line = f"hf_to_mm --cfg.mm_dir x --cfg.hf_config.hf_dir large {division}"
    words = ["Qwen2_5_VLConverter", *line.split(), "--cfg.dry_run", "--cfg.workers", "2"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    peak = json.loads(lines[-1])[0] / 1e6
    told = [text for text in lines[:-1] if "pipeline rank" in text or "mp_rank_00_000" in text]
    return "\n".join([*told, lines[-2], f"(planned in {time.perf_counter() - started:.1f} s, VmHWM {peak:.0f} MB)"])


def drop_cache() -> None:
    """Reading starts from the disk, where this is allowed."""
    subprocess.run(["sync"], check=True)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def report(
    size: int,
    copy: tuple[float, float],
    rows: list[tuple[str, float, int, int]],
    plan: str,
    arguments: argparse.Namespace,
) -> str:
    """The table, with machine and command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        "# mm-convert against cp",
        "",
        f"`python benchmarks/convert.py --repeat {arguments.repeat} --workers {arguments.workers} --write` on "
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}; load {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"Shape of {SMALL}: {size / 1e9:.2f} GB. All times include waiting for the disk; `cp -r` alone, without: "
        f"{copy[0]:.1f} s. Aims: at most {TIME_AIM:g} times `cp -r`, peak memory below {MEMORY_AIM / 1e9:g} GB.",
        "",
        "| | seconds | GB/s | of cp | VmHWM, MB | RssAnon, MB |",
        "|---|---|---|---|---|---|",
        f"| `cp -r` and `sync` | {copy[1]:.1f} | {size / copy[1] / 1e9:.2f} | 1.00 | | |",
    ]
    for name, seconds, peak, own in rows:
        rate, ratio = size / seconds / 1e9, seconds / copy[1]
        lines.append(f"| {name} | {seconds:.1f} | {rate:.2f} | {ratio:.2f} | {peak / 1e6:.0f} | {own / 1e6:.0f} |")
    lines += [
        "",
        f"What `--cfg.dry_run` says of the shape of {LARGE}, TP2 x PP8 (sparse files):",
        "",
        "```",
        plan,
        "```",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
