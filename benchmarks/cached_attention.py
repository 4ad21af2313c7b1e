"""Attention to the key-value cache on a CPU: one layer of decoding and of prefill, heads of Qwen2-VL-2B.

    python benchmarks/cached_attention.py [--repeats 5] [--write]

Processor time, one thread, the best of the repeats, all contenders in one process on the same numbers. The baseline is
torch's own attention, a call for each sequence, in the two ways in which a model library calls it. `--write` puts the
tables into benchmarks/results/cached_attention.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from harness import processor_name

from duetvl.core.backend import Backend, load_backend
from duetvl.core.kv_cache import Append

RESULTS = Path(__file__).parent / "results" / "cached_attention.md"
HEADS, GROUPS, SIZE = 12, 2, 128
SEQUENCES = 16


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    report = "\n\n".join([decoding(given.repeats), prefill(given.repeats)])
    print(report)  # noqa: T201
    if given.write:
        RESULTS.write_text(f"# Cached attention\n\n{machine()}\n\n{report}\n")


def decoding(repeats: int) -> str:
    """One new row for each of 16 sequences."""
    lines = ["## Decoding, milliseconds a layer for 16 sequences", "", "| | " + " | ".join(map(label, CASES)) + " |"]
    lines.append("|---|" + "---|" * len(CASES))
    for name, contender in DECODERS.items():
        found = [best(contender(rows, dtype), repeats) for rows, dtype in CASES]
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * seconds:.1f}" for seconds in found) + " |")
    return "\n".join(lines)


def prefill(repeats: int) -> str:
    """All rows of one sequence at once: the causal call that fits no chunk, against the form that fits all."""
    lines = ["## Prefill, milliseconds a layer for one sequence", "", "| rows, dtype | torch's causal call | cached |"]
    lines.append("|---|---|---|")
    for rows in (256, 1024, 4096):
        for dtype in ("float32", "bfloat16"):
            found = [best(make(rows, dtype), repeats) for make in (causal_call, cached_prefill)]
            lines.append(f"| {rows}, {dtype} | {1e3 * found[0]:.1f} | {1e3 * found[1]:.1f} |")
    return "\n".join(lines)


CASES = [(rows, dtype) for dtype in ("float32", "bfloat16") for rows in (40, 640, 2048)]


def label(case: tuple[int, str]) -> str:
    """The head of a column."""
    return f"{case[0]} rows, {case[1]}"


# -- contenders ------------------------------------------------------------------------------------------------------


def drawn(be: Backend, rows: int, heads: int, dtype: str, seed: int) -> Any:
    """Normal numbers (rows, heads, 128)."""
    array = np.random.default_rng(seed).standard_normal((rows, heads, SIZE), dtype=np.float32)
    return be.ops.from_numpy(array, dtype)


def cached(name: str, order: str) -> Callable[[int, str], Callable[[], Any]]:
    """Decoding through the cache: blocks of a sequence in a row or in no order, sequences equally far apart or not."""

    def make(rows: int, dtype: str) -> Callable[[], Any]:
        be = load_backend(name, device="cpu")
        kv, each = be.kv_cache, -(-rows // be.kv_cache.block_size)
        total = SEQUENCES * (each + 2)
        cache = kv.cache_create(
            layers=1, blocks=total, block_size=kv.block_size, kv_heads=GROUPS, head_size=SIZE, dtype=dtype
        )
        k, v = (drawn(be, total * kv.block_size, GROUPS, dtype, seed) for seed in (1, 2))
        whole = Append(np.arange(total, dtype=np.int32)[None], np.array([0]), np.array([total * kv.block_size]))
        kv.cache_append(cache, 0, k, v, kv.plan(cache, whole))
        gaps = np.arange(SEQUENCES) % 2 if order == "apart" else np.zeros(SEQUENCES, int)
        tables = (np.arange(SEQUENCES) * (each + 1) + gaps)[:, None] + np.arange(each)
        if order == "none":
            tables = np.random.default_rng(3).permutation(total)[: SEQUENCES * each].reshape(SEQUENCES, each)
        append = Append(tables.astype(np.int32), np.full(SEQUENCES, rows - 1), np.ones(SEQUENCES, np.int64))
        plan, q = kv.plan(cache, append), drawn(be, SEQUENCES, HEADS, dtype, 4)
        return lambda: kv.attention_cached(q, cache, 0, plan)

    return make


def grouped_call(rows: int, dtype: str) -> Callable[[], Any]:
    """torch's `enable_gqa`, a call for each sequence."""
    import torch

    be = load_backend("torch_npu", device="cpu")
    k, v = (drawn(be, SEQUENCES * (rows + 64), GROUPS, dtype, seed) for seed in (1, 2))
    q = drawn(be, SEQUENCES, HEADS, dtype, 4)

    def run() -> Any:
        outs = []
        for s in range(SEQUENCES):
            held = slice(s * (rows + 64), s * (rows + 64) + rows)
            given = (x.transpose(0, 1)[None] for x in (q[s : s + 1], k[held], v[held]))
            outs.append(torch.nn.functional.scaled_dot_product_attention(*given, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outs)

    return run


def causal_call(rows: int, dtype: str) -> Callable[[], Any]:
    """torch's flash attention over a whole prompt, keys repeated for the heads of a group."""
    import torch

    be = load_backend("torch_npu", device="cpu")
    q, k, v = (drawn(be, rows, heads, dtype, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS)))

    def run() -> Any:
        wide = (x.transpose(0, 1)[None].repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], *wide, is_causal=True)
        return out[0].transpose(0, 1).contiguous()

    return run


def cached_prefill(rows: int, dtype: str) -> Callable[[], Any]:
    """The same through the cache, writing it included."""
    be = load_backend("torch_npu", device="cpu")
    kv, blocks = be.kv_cache, -(-rows // be.kv_cache.block_size)
    cache = kv.cache_create(
        layers=1, blocks=blocks, block_size=kv.block_size, kv_heads=GROUPS, head_size=SIZE, dtype=dtype
    )
    q, k, v = (drawn(be, rows, heads, dtype, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS)))
    plan = kv.plan(cache, Append(np.arange(blocks, dtype=np.int32)[None], np.array([0]), np.array([rows])))

    def run() -> Any:
        kv.cache_append(cache, 0, k, v, plan)
        return kv.attention_cached(q, cache, 0, plan)

    return run


DECODERS: dict[str, Callable[[int, str], Callable[[], Any]]] = {
    "torch, `enable_gqa`": grouped_call,
    "duetvl torch, sequences equally far apart: one call": cached("torch_npu", "even"),
    "duetvl torch, sequences anywhere: a call each": cached("torch_npu", "apart"),
    "duetvl torch, blocks in no order: gathered": cached("torch_npu", "none"),
    "duetvl mindspore": cached("mindspore", "even"),
}


# -- measuring -------------------------------------------------------------------------------------------------------


def best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of processor time of one call: the best of the repeats, each over at least 0.1 s."""
    run()
    found = []
    for _ in range(repeats):
        calls, start = 0, time.process_time()
        while (spent := time.process_time() - start) < 0.1:
            run()
            calls += 1
        found.append(spent / calls)
    return min(found)


def machine() -> str:
    """What it ran on, and how."""
    import mindspore
    import torch

    return (
        f"`python {' '.join(['benchmarks/cached_attention.py', *sys.argv[1:]])}` on {processor_name()}, one thread of "
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"mindspore {mindspore.__version__}, numpy {np.__version__}; load {os.getloadavg()[0]:.1f} at the end. "
        f"{HEADS} heads, {GROUPS} key-value heads, size {SIZE}."
    )


if __name__ == "__main__":
    main()
