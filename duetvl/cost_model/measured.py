"""This device as a row of the table, measured: a matrix product and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.cost_model.devices import DeviceType, Link, Shares

_SECONDS: Final = 0.05  # that each of both is repeated for
_COPIED: Final = 2**23  # numbers: more than a processor's caches hold
_GLOO: Final = Link(bandwidth=1.0e9, latency=1.0e-4)  # measured: benchmarks/results/planning.md

Tensor = Any


def measured(backend: Backend, dtype: str, shape: tuple[int, int, int]) -> DeviceType:
    """What this process reaches here: products of (rows, inner) and (inner, columns) in a dtype, and copies.

    `shape` is (rows, inner, columns), best those of the model's own layers: a device is slower at small ones. The
    links are those between processes on one machine. Takes a fifth of a second.
    """
    rows, inner, columns = shape
    ops = backend.ops
    left, right = (ops.from_numpy(np.ones(size, np.float32), dtype) for size in ((rows, inner), (inner, columns)))
    operations = 2.0 * rows * inner * columns / _fastest(backend, lambda: ops.matmul(left, right))
    numbers = ops.from_numpy(np.ones(_COPIED, np.float32), "float32")
    bandwidth = 2.0 * 4 * _COPIED / _fastest(backend, lambda: -numbers)
    here = "measured by a matrix product and a copy on this device"
    sources = dict.fromkeys(("peaks", "bandwidth", "memory"), here)
    sources |= dict.fromkeys(("inside", "between", "latency", "host", "node"), "assumed: processes on one machine")
    name = f"this {backend.device.name}"
    return DeviceType(
        name,
        backend.device.total_memory(),
        {dtype: operations},
        bandwidth,
        1024,
        _GLOO,
        _GLOO,
        bandwidth / 2,
        sources,
        Shares(1.0, 1.0, 1.0),
    )


def shared(device: DeviceType, processes: int) -> DeviceType:
    """The same where so many processes share it evenly, all of which it takes to use it up."""
    peaks = {dtype: operations / processes for dtype, operations in device.peaks.items()}
    return replace(device, peaks=peaks, bandwidth=device.bandwidth / processes)


def _fastest(backend: Backend, run: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of some runs: others may be at work here too."""
    best, end = float("inf"), 0.0
    while not end or time.perf_counter() < end:
        begun = time.perf_counter()
        run()
        backend.device.synchronize()
        best = min(best, time.perf_counter() - begun)
        end = end or time.perf_counter() + _SECONDS  # what the first run prepares does not count
    return best
