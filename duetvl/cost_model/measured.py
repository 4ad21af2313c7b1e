"""This machine's processor as a row of the table, measured: a matrix product and a copy, by numpy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from duetvl.cost_model.devices import DeviceType, Link, Shares

_SECONDS: Final = 0.05  # that each of both is repeated for
_COPIED: Final = 2**22  # numbers: more than a processor's caches hold
_SHARES: Final = Shares(products=0.4, memory=1.0, links=1.0)  # of the product alone: benchmarks/results/planning.md
_GLOO: Final = Link(bandwidth=0.5e9, latency=1.0e-4)  # of gloo between processes of one machine, measured there too
_HERE: Final = "measured by a matrix product and a copy on this machine"
_BETWEEN: Final = "gloo between processes of one machine: benchmarks/results/planning.md"


def this_cpu(shape: tuple[int, int, int], processes: int = 1) -> DeviceType:
    """What one of `processes` reaches on this machine's processor.

    `shape` is (rows, inner, columns) of the product, best that of the model's own layers: small ones are slower. In
    half precision a processor is taken to be as fast as in float32. Takes a fifth of a second.
    """
    rows, inner, columns = shape
    left, right = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    out = np.empty((rows, columns), np.float32)
    operations = 2.0 * rows * inner * columns / _fastest(lambda: np.matmul(left, right, out=out))
    source, target = np.ones(_COPIED, np.float32), np.empty(_COPIED, np.float32)
    bandwidth = 2.0 * source.nbytes / _fastest(lambda: np.copyto(target, source))
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, int(os.environ.get("OMP_NUM_THREADS", "") or cores))
    share = min(1.0, cores / (processes * threads))
    peaks = dict.fromkeys(("float32", "bfloat16", "float16"), share * operations)
    sources = dict.fromkeys(("memory", "peaks", "bandwidth", "host", "node"), _HERE)
    sources |= dict.fromkeys(("inside", "between", "latency"), _BETWEEN)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    bandwidth = share * bandwidth
    return DeviceType("this cpu", memory, peaks, bandwidth, processes, _GLOO, _GLOO, bandwidth, sources, _SHARES)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of some runs: others may be at work here too."""
    best, end = float("inf"), 0.0
    while not end or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begun)
        end = end or time.perf_counter() + _SECONDS  # what the first run prepares does not count
    return best
