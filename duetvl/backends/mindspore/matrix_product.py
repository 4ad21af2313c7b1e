"""Products of float32 matrices by oneDNN, from the library that MindSpore's wheel brings; by numpy where it has none.

numpy's OpenBLAS does not use AVX-512 on processors of all makers: on an AMD EPYC it reaches 120 GFLOP/s a core where
oneDNN's `dnnl_sgemm`, a public C function, reaches 250. Unlike MindSpore's own product it keeps nothing for the shapes
that it has met.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

Array = np.ndarray

FEW_ROWS: Final = range(8, 65)  # of these (b^T a^T)^T takes 0.4 to 0.9 of the time of a b
WORTH_A_CALL: Final = 1 << 20  # multiplications: what numpy does in the time that Python needs for the call
WORTH_DIVIDING: Final = 1 << 23  # multiplications: less is done sooner than it is handed to other threads


def product(a: Array, b: Array) -> Array:
    """a (M, K) times b (K, N), float32, as a new array (M, N) in C order."""
    sgemm = _sgemm()
    if sgemm is None or len(a) == 1 or 0 in (*a.shape, *b.shape):  # a single row is as fast as memory, by either
        return np.matmul(a, b)
    if len(a) in FEW_ROWS and b.shape[1] > len(a):
        return np.ascontiguousarray(_divided(sgemm, b.T, a.T).T)
    return _divided(sgemm, a, b)


def products(a: Array, b: Array) -> Array:
    """Matrices a (..., M, K) times matrices b (..., K, N) of the same leading axes, as a new array (..., M, N)."""
    if a.shape[-2] * a.shape[-1] * b.shape[-1] < WORTH_A_CALL:
        return np.matmul(a, b)
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.float32)
    for place in np.ndindex(a.shape[:-2]):
        y[place] = product(a[place], b[place])
    return y


Sgemm = Callable[..., int]


@cache
def _sgemm() -> Sgemm | None:
    """`dnnl_sgemm` of the library beside MindSpore's own, which is in memory already."""
    package = find_spec("mindspore")
    if package is None or package.origin is None:
        return None
    for path in sorted((Path(package.origin).parent / "lib").glob("libdnnl.so*")):
        sgemm: Any = getattr(ctypes.CDLL(str(path)), "dnnl_sgemm", None)
        if sgemm is not None:
            size, number, array = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
            flag = ctypes.c_char
            sgemm.argtypes = [
                flag, flag, size, size, size, number, array, size, array, size, number, array, size,
            ]  # fmt: skip
            return sgemm
    return None


def _divided(sgemm: Sgemm, a: Array, b: Array) -> Array:
    """a b, its longer axis cut into a part for each thread: the function itself has one."""
    a, b = _plain(a), _plain(b)
    y = np.empty((a.shape[0], b.shape[1]), np.float32)
    count = _threads() if y.size * a.shape[1] >= WORTH_DIVIDING else 1
    if count == 1:
        _multiply(sgemm, a, b, y)
        return y
    axis = int(y.shape[1] > y.shape[0])
    ends = [y.shape[axis] * part // count for part in range(count + 1)]
    cuts = [slice(start, stop) for start, stop in pairwise(ends)]
    parts = [(a, b[:, cut], y[:, cut]) if axis else (a[cut], b, y[cut]) for cut in cuts]
    for _ in _pool(count).map(lambda part: _multiply(sgemm, *part), parts):
        pass
    return y


def _multiply(sgemm: Sgemm, a: Array, b: Array, y: Array) -> None:
    (rows, inner), columns = a.shape, b.shape[1]
    (a_flag, a_step), (b_flag, b_step) = _layout(a), _layout(b)
    failed = sgemm(
        a_flag, b_flag, rows, columns, inner, 1.0, a.ctypes.data, a_step, b.ctypes.data, b_step, 0.0, y.ctypes.data,
        y.strides[0] // 4,
    )  # fmt: skip
    if failed:
        raise RuntimeError(f"oneDNN's product of {a.shape} and {b.shape} failed with status {failed}")


def _plain(x: Array) -> Array:
    """`x`, or a copy of it where neither its rows nor its columns lie in one piece."""
    x = np.asarray(x, np.float32)
    rows, columns = x.shape
    by_rows = x.strides[1] == 4 and (x.strides[0] >= 4 * columns or rows == 1)
    by_columns = x.strides[0] == 4 and (x.strides[1] >= 4 * rows or columns == 1)
    whole = x.strides[0] % 4 == 0 and x.strides[1] % 4 == 0
    return x if whole and (by_rows or by_columns) else np.ascontiguousarray(x)


def _layout(x: Array) -> tuple[bytes, int]:
    """Whether `_plain` x lies by rows (N) or transposed (T), and the numbers from one to the next."""
    rows, columns = x.shape
    if x.strides[1] == 4 and (x.strides[0] >= 4 * columns or rows == 1):
        return b"N", max(x.strides[0] // 4, columns)
    return b"T", max(x.strides[1] // 4, rows)


@cache
def _threads() -> int:
    """As many as OpenMP would take."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="product")
