"""How fast the device multiplies, reads and writes: figures to set others against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from duetvl.core.backend import Backend
from duetvl.doctor.check import Check

SECONDS = 0.5  # of repeating
CPU_SECONDS = 0.15  # whose calls take as long as they seem to


def measure_speed(backend: Backend) -> Iterator[Check]:
    """Matrix products in each dtype, a copy within the device's memory, and one to the device."""
    small = backend.device.name.startswith("cpu")
    ops, device = backend.ops, backend.device
    size = 768 if small else 8192
    time_of = partial(seconds_of, backend, seconds=CPU_SECONDS if small else SECONDS)
    half = "bfloat16" if device.supports("bfloat16") else "float16"
    for dtype in ("float32", half):
        a, b = (ops.cast(ops.zeros((size, size)) + number, dtype) for number in (1.0, 0.5))
        seconds = time_of(partial(ops.matmul, a, b))
        yield _figure(f"matmul {size} x {size} {dtype}", 2 * size**3 / seconds / 1e12, "TFLOP/s")
    numbers = 2**22 if small else 2**28
    x = ops.zeros((numbers,))
    yield _figure("x + 1, read and written", 8 * numbers / time_of(lambda: x + 1.0) / 1e9, "GB/s")
    host = np.ones(min(numbers, 2**26), np.float32)
    seconds = time_of(lambda: ops.from_numpy(host) + 0.0)
    yield _figure("host to device", host.nbytes / seconds / 1e9, "GB/s")


def seconds_of(backend: Backend, run: Callable[[], object], seconds: float = SECONDS) -> float:
    """Of one call, the device's work included: the mean of as many as fit, after one for warming up."""
    run()
    backend.device.synchronize()
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        run()
        count += 1
        if count % 10 == 0:
            backend.device.synchronize()  # a queue of calls ahead of the device would be counted as none
    backend.device.synchronize()
    return (time.perf_counter() - start) / count


def _figure(name: str, value: float, unit: str) -> Check:
    return Check("speed", name, value > 0, figure=f"{value:.3g} {unit}")
