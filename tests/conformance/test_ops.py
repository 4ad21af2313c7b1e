"""Every operation, forward and gradient, against float64, on every backend and dtype."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from duetvl.core.backend import Backend
from duetvl.core.composed import ComposedOps
from duetvl.core.composed import ops as composed
from duetvl.core.ops import Ops

from .cases import Case, all_cases, normal
from .reference import rounded
from .tolerances import complaint

CASES = all_cases()
# What ComposedOps gives every backend, and a backend may override.
COARSE = [case for case in CASES if case.op in vars(ComposedOps)]
BLOCKED = [case for case in COARSE if case.op in ("attention", "linear_cross_entropy", "linear_logprobs")]


def ident(value: Any) -> str:
    return value.id if isinstance(value, Case) else str(value)


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_op_equals_reference(be: Backend, case: Case) -> None:
    check(be, be.ops, case, dtypes_for(be, case))


@pytest.mark.parametrize("case", COARSE, ids=ident)
def test_composed_default_equals_reference(be: Backend, case: Case) -> None:
    """A backend's kernels and the defaults that they replace agree, as both agree with the reference."""
    check(be, composed_only(be), case, ("float32",))


@pytest.mark.parametrize("case", BLOCKED, ids=ident)
def test_blocks_equal_reference(be: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With budgets so small that everything is computed in many blocks."""
    monkeypatch.setattr(composed, "SCORE_BUDGET", 64)
    monkeypatch.setattr(composed, "LOGIT_BUDGET", 64)
    monkeypatch.setattr(composed, "LEAST_ROWS", 5)
    check(be, composed_only(be), case, ("float32",))
    check(be, be.ops, case, dtypes_for(be, case))


def dtypes_for(be: Backend, case: Case) -> tuple[str, ...]:
    return tuple(d for d in case.dtypes if not (case.surface and d in be.capabilities.storage_only))


def composed_only(be: Backend) -> Ops:
    """The backend's small functions with the composed coarse ones, as a new backend starts out."""
    defaults = {name: value for name, value in vars(ComposedOps).items() if not name.startswith("__")}
    kind = type("ComposedOnly", (type(be.ops),), defaults)
    ops = copy.copy(be.ops)
    ops.__dict__.pop("_swiglu", None)  # made once for an instance
    ops.__class__ = kind
    return ops


def check(be: Backend, ops: Any, case: Case, dtypes: tuple[str, ...]) -> None:
    complaints = [
        complaint(case.op, dtype, be.name, what, ours, expected, case.exponent)
        for dtype in dtypes
        for what, ours, expected in compared(be, ops, case, dtype)
    ]
    assert not any(complaints), "\n".join(filter(None, complaints))


def compared(be: Backend, ops: Any, case: Case, dtype: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, ours, expected) of each output and, for differentiable cases, each gradient."""
    if any(0 in array.shape for array in case.arrays):
        soil_memory(be)
    exact = [torch.tensor(rounded(a, dtype) if a.dtype.kind == "f" else a) for a in case.arrays]
    leaves = [x.requires_grad_(case.differentiable) for x in exact if x.dtype == torch.float64]
    expected = as_tuple(case.expected(*exact))

    def run(*floats: Any) -> Any:
        left = iter(floats)
        return case.run(ops, *(next(left) if a.dtype.kind == "f" else ops.from_numpy(a) for a in case.arrays))

    floats = [ops.from_numpy(a, dtype) for a in case.arrays if a.dtype.kind == "f"]
    outputs, tape = be.autograd.run_stage(run, floats, [])
    pairs = [
        (f"output {i}", ops.to_numpy(y), y64.detach().numpy())
        for i, (y, y64) in enumerate(zip(outputs, expected, strict=True))
    ]
    if not case.differentiable:
        return pairs
    dtypes = [ops.dtype_of(y) for y in outputs]
    pulls = [rounded(normal(*y.shape, seed=9 + i), d) for i, (y, d) in enumerate(zip(expected, dtypes, strict=True))]
    found = be.autograd.backward(
        tape, [ops.from_numpy(c, d) if on else None for c, d, on in zip(pulls, dtypes, case.pulled, strict=True)]
    )
    assert [ops.dtype_of(d) for d in found] == [dtype] * len(floats)
    scalar = sum((y * torch.tensor(c)).sum() for y, c, on in zip(expected, pulls, case.pulled, strict=True) if on)
    wanted = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)
    return pairs + [
        (f"gradient {i}", ops.to_numpy(d), d64.numpy()) for i, (d, d64) in enumerate(zip(found, wanted, strict=True))
    ]


def as_tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def soil_memory(be: Backend) -> None:
    """Fill and free memory of many sizes: a kernel that leaves its result unwritten then shows."""
    for size in (1, 4, 8, 16, 32, 64, 128, 256):
        _ = [be.ops.zeros((size,)) + 777.0 for _ in range(3)]
