"""Peak memory and time of loading a checkpoint of the shape of Qwen2-VL-2B (4.4 GB of bfloat16), on each backend.

    python benchmarks/load_memory.py [--model Qwen2-VL-2B] [--directory /tmp] [--backends torch_npu,mindspore]

The checkpoint is made here (in shards, so as on the hub), and removed afterwards. Every load has a fresh process and a
cold page cache. What counts is anonymous memory, RssAnon of /proc/self/status, sampled every 5 ms: beyond what the
process had before loading, against the model's size in the dtype it is loaded in. Pages of the mapped file are not the
process's own, the kernel takes them back at will; their peak is shown beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from harness import RESULTS as PAGES
from harness import apart, processor_name, status

from duetvl.core.backend import load_backend
from duetvl.models.qwen_vl.config import load_config, published_config
from duetvl.models.qwen_vl.parameters import count_parameters, parameter_shapes
from duetvl.models.qwen_vl.weights import open_model_weights
from duetvl.storage.tensor_files import TensorSpec
from duetvl.storage.weights_dir import load_parameters, write_shards

RESULTS = PAGES / "load_memory.md"
AIM = 1.15
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def main() -> int:
    """Make the checkpoint, measure every case, write the table."""
    arguments = read_arguments()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))  # noqa: T201
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        make_checkpoint(Path(folder), arguments.model)
        cases = [(b, d) for b in arguments.backends.split(",") for d in arguments.dtypes.split(",")]
        rows = [run_case(folder, backend, dtype) for backend, dtype in cases]
    text = report(arguments.model, rows)
    print(text)  # noqa: T201
    if arguments.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if all(row["ratio"] <= AIM for row in rows) else 1


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen2-VL-2B", help="a published configuration")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where there is room for the checkpoint")
    parser.add_argument("--backends", default="torch_npu,mindspore")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--case", nargs=3, metavar=("FOLDER", "BACKEND", "DTYPE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(folder: Path, model: str) -> None:
    """Random bits that are small finite numbers, from one block of noise at various offsets: quick to make."""
    config = published_config(model)
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    specs = {name: TensorSpec("bfloat16", shape) for name, shape in parameter_shapes(config).items()}
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).view(np.uint32) >> 16

    def fetch(name: str) -> np.ndarray:
        count = specs[name].nbytes // 2
        return np.resize(np.roll(noise.astype(np.uint16), len(name)), count).reshape(specs[name].shape)

    write_shards(folder, specs, fetch, max_shard_bytes=2 * 10**9)


def run_case(folder: str, backend: str, dtype: str) -> dict[str, float]:
    """Measure in a fresh process, with the files out of the page cache."""
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return apart(__file__, "--case", folder, backend, dtype, threads=os.cpu_count() or 1)


def measure(folder: str, name: str, dtype: str) -> dict[str, float | str]:
    """Load once in this process."""
    config = load_config(folder)
    shapes = parameter_shapes(config)
    size = count_parameters(shapes) * BYTES[dtype]
    backend = load_backend(name, "cpu")
    before = status("RssAnon")
    started = time.perf_counter()
    with peaks("RssAnon", "RssFile") as found:
        loaded = load_parameters(shapes, open_model_weights(folder, config), backend, dtype)
        seconds = time.perf_counter() - started
    assert len(loaded) == len(shapes)
    peak = found["RssAnon"] - before
    return {
        "backend": name,
        "framework": backend.capabilities.framework,
        "dtype": dtype,
        "size": size,
        "peak": peak,
        "ratio": peak / size,
        "before": before,
        "file": found["RssFile"],
        "seconds": seconds,
        "load": os.getloadavg()[0],
    }


@contextmanager
def peaks(*fields: str) -> Iterator[dict[str, int]]:
    """The largest value of each field while the block runs."""
    found, done = {field: status(field) for field in fields}, threading.Event()

    def look() -> None:
        found.update({field: max(value, status(field)) for field, value in found.items()})

    watcher = threading.Thread(target=lambda: repeat(look, done))
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()


def repeat(call: Callable[[], None], done: threading.Event) -> None:
    """Call every 5 ms until done."""
    while not done.wait(0.005):
        call()


def report(model: str, rows: list[dict[str, float]]) -> str:
    """The table, with the machine and the command."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        "# Loading a checkpoint: peak memory and time",
        "",
        f"`python {' '.join(sys.argv)}` on {processor_name()}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB of "
        f"memory, {platform.system()}, Python {platform.python_version()}. {model} in random bfloat16, shards of 2 GB, "
        f"page cache cold. Before: anonymous memory of the process with its framework. Peak: anonymous memory beyond "
        f"that. "
        f"Machine load: processes that wanted a core in the last minute; seconds mean little where it is above the "
        f"number of cores. Aim: at most {AIM} times the model's size in the loaded dtype.",
        "",
        "| backend | framework | dtype | model, GB | peak, GB | ratio | before, GB | mapped file, GB | seconds "
        "| machine load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size, peak, before, file = (f"{row[key] / 1e9:.3f}" for key in ("size", "peak", "before", "file"))
        lines.append(
            f"| {row['backend']} | {row['framework']} | {row['dtype']} | {size} | {peak} | {row['ratio']:.3f} "
            f"| {before} | {file} | {row['seconds']:.1f} | {row['load']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
