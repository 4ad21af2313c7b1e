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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import numpy as np
from harness import Limit, Limits, Row, Seconds

from duetvl.convert.streaming import plan_tensor_file
from duetvl.models.qwen_vl.config import ModelConfig, published_config
from duetvl.models.qwen_vl.loading import write_config
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import plan_shards, write_shards

RESULTS = harness.RESULTS / "convert.md"
TIME_AIM, MEMORY_AIM = 3.0, 1.5e9
SMALL, LARGE = "Qwen2-VL-2B", "Qwen2.5-VL-72B"
TO_MM, RESPLIT = "hf_to_mm, TP2 x PP2", "resplit TP2 x PP2 to one file"
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
    config = published_config(SMALL)
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="convert-") as folder:
        os.chdir(folder)
        size = make_checkpoint(Path("hf"), config)
        copy = harness.least(time_copy() for _ in range(arguments.repeat))
        alone = harness.least(time_copy(sync=False) for _ in range(arguments.repeat))
        taken = [best(name, line, arguments.repeat, arguments.workers) for name, line in cases(config).items()]
        plan = plan_large(Path("large"))
        os.chdir(harness.ROOT)
    text = report(size, (alone.wall, copy.wall), taken, plan, arguments)
    print(text)  # noqa: T201
    if arguments.write:
        RESULTS.write_text(text, encoding="utf-8")
    slow = any(each.seconds.wall > TIME_AIM * copy.wall or each.peak > MEMORY_AIM for each in taken)
    return 1 if slow else 0


@dataclass(frozen=True)
class Taken:
    """The least seconds of a case, VmHWM, and the peak of RssAnon."""

    name: str
    seconds: Seconds
    peak: int
    own: int


def rows(quick: bool, limits: Limits) -> Iterator[Row]:
    """Two of the cases, beside `cp -r` and beside writing as many bytes."""
    config = published_config(SMALL)
    if quick:
        config = replace(config, text=replace(config.text, num_layers=2), vision=replace(config.vision, depth=2))
    with tempfile.TemporaryDirectory(prefix="convert-") as folder:
        before = Path.cwd()
        os.chdir(folder)
        size = make_checkpoint(Path("hf"), config)
        work = f"{size / 1e9:.2f} GB in bfloat16 until it is on the disk"
        limit = Limit("disk", harness.seconds_of_writing(Path(folder), size).wall)
        copy = harness.least(time_copy() for _ in range(2))
        for name, line in cases(config).items():
            if name in (TO_MM, RESPLIT):
                own, command = best(name, line, repeat=2, workers=2).seconds, harness.command_of(__file__)
                title = f"convert, {name.partition(' ')[0].strip(',')}"
                yield Row(title, "host", f"{name}; {work}", own, copy, "`cp -r`", limit, command, clock="wall")
        os.chdir(before)


def cases(config: ModelConfig) -> dict[str, str]:
    """What is converted, in an order in which each finds its source."""
    layers, depth = config.text.num_layers, config.vision.depth
    first = max(1, layers * 3 // 7)

    def split(section: str) -> str:
        stages = (
            f"--cfg.{section}.llm_pp_layers [[{first},{layers - first}]] --cfg.{section}.vit_pp_layers [[{depth},0]]"
        )
        return f"{stages} --cfg.{section}.tp_size 2"

    def whole(section: str) -> str:
        return f"--cfg.{section}.llm_pp_layers [[{layers}]] --cfg.{section}.vit_pp_layers [[{depth}]]"

    between = f"{split('source_parallel_config')} {whole('target_parallel_config')}"
    parted, one = split("parallel_config"), whole("parallel_config")
    return {
        TO_MM: f"hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir hf {parted}",
        RESPLIT: f"resplit --cfg.source_dir mm --cfg.target_dir one {between}",
        "mm_to_hf, TP2 x PP2": f"mm_to_hf --cfg.save_hf_dir back --cfg.mm_dir mm --cfg.hf_config.hf_dir hf {parted}",
        "hf_to_mm, one file": f"hf_to_mm --cfg.mm_dir whole --cfg.hf_config.hf_dir hf {one}",
    }


def make_checkpoint(directory: Path, config: ModelConfig) -> int:
    """Random bytes would take as long as the conversion; a pattern that differs from tensor to tensor does as well."""
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


def of_children(call: Callable[[], object]) -> Seconds:
    """What a call takes the processes that it starts and waits for."""
    before = harness.seconds_of_children()
    wall = harness.timed(call).wall
    return Seconds(harness.seconds_of_children() - before, wall)


def time_copy(sync: bool = True) -> Seconds:
    """`cp -r`, with what is still in memory written out, or alone."""

    def copy() -> None:
        subprocess.run(["cp", "-r", "hf", "copy"], check=True)
        if sync:
            subprocess.run(["sync", "-f", "."], check=True)

    drop_cache()
    seconds = of_children(copy)
    shutil.rmtree("copy")
    return seconds


def best(name: str, line: str, repeat: int, workers: int) -> Taken:
    """The least of some runs; what is written is kept where a later case needs it."""
    words = line.split()
    target = Path(words[words.index(TARGETS[words[0]]) + 1])
    command = [sys.executable, "-c", CHILD, "Qwen2VLConverter", *words, "--cfg.workers", str(workers)]
    memory: list[tuple[int, int]] = []

    def convert() -> None:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        memory.append(json.loads(done.stdout.splitlines()[-1]))

    runs = []
    for _ in range(repeat):
        shutil.rmtree(target, ignore_errors=True)
        drop_cache()
        runs.append(of_children(convert))
    if target.name != "mm":
        shutil.rmtree(target)
    peaks, own = zip(*memory, strict=True)
    return Taken(name, harness.least(runs), max(peaks), max(own))


TARGETS = {"hf_to_mm": "--cfg.mm_dir", "resplit": "--cfg.target_dir", "mm_to_hf": "--cfg.save_hf_dir"}


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
    taken: list[Taken],
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
        "| | seconds | processor s | GB/s | of cp | VmHWM, MB | RssAnon, MB |",
        "|---|---|---|---|---|---|---|",
        f"| `cp -r` and `sync` | {copy[1]:.1f} | | {size / copy[1] / 1e9:.2f} | 1.00 | | |",
    ]
    for each in taken:
        wall = each.seconds.wall
        lines.append(
            f"| {each.name} | {wall:.1f} | {each.seconds.cpu:.1f} | {size / wall / 1e9:.2f} | {wall / copy[1]:.2f} "
            f"| {each.peak / 1e6:.0f} | {each.own / 1e6:.0f} |"
        )
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
