"""Every operation, forward and gradient, against float64, on every backend and dtype."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from duetvl.core.backend import Backend, load_backend
from duetvl.core.composed import ComposedOps
from duetvl.core.composed import ops as composed
from duetvl.core.ops import Ops
from duetvl.core.spans import Spans

from .cases import Case, all_cases, normal
from .reference import attention, rounded
from .test_signatures import operations
from .tolerances import TOLERANCES, complaint, error

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


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_mindspore_functions_of_every_device_equal_reference(case: Case) -> None:
    """What Ascend inherits: MindSpore's own kernels, most of which the CPU has too, though numpy's are faster there."""
    pytest.importorskip("mindspore")
    be = load_backend("mindspore", device="cpu")
    from duetvl.backends.mindspore.ops import MindSporeOps

    check(be, MindSporeOps(be.autograd), case, ("float32",))


def test_every_operation_has_a_case() -> None:
    in_test_conversion = {"from_numpy", "to_numpy", "dtype_of", "cast", "zeros", "assign", "write_slice", "write_rows"}
    elsewhere = in_test_conversion | {"attention_grad"}  # the gradient of every case of attention
    assert not set(operations(Ops)) - {case.op for case in CASES} - elsewhere


@pytest.mark.parametrize("case", BLOCKED, ids=ident)
def test_blocks_equal_reference(be: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With budgets so small that everything is computed in many blocks."""
    monkeypatch.setattr(composed, "SCORE_BUDGET", 64)
    monkeypatch.setattr(composed, "LOGIT_BUDGET", 64)
    monkeypatch.setattr(composed, "LEAST_ROWS", 5)
    if be.name == "mindspore":
        monkeypatch.setattr("duetvl.backends.mindspore.numpy_kernels.BLOCK_SCORES", 64)
        monkeypatch.setattr("duetvl.backends.mindspore.numpy_kernels.CAUSAL_ROWS", 3)
    check(be, composed_only(be), case, ("float32",))
    check(be, be.ops, case, dtypes_for(be, case))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_attention_grad_takes_out_and_lse_of_more_keys(be: Backend, causal: bool) -> None:
    """As ring attention uses it: the keys come in two halves, the second one full, with one softmax over both."""
    count, heads, groups, size = 21, 4, 2, 16
    q, k_1, v_1, k_2, v_2, dout = (
        normal(count, n, size, seed=i) for i, n in enumerate((heads, groups, groups, groups, groups, heads))
    )
    leaves = [torch.tensor(x).requires_grad_() for x in (q, k_1, v_1, k_2, v_2)]
    first = attention(*leaves[:3], (count,), causal)
    second = attention(leaves[0], *leaves[3:], (count,), False)
    lse = torch.logaddexp(first[1], second[1])
    parts = (out * torch.exp(m - lse).T[:, :, None] for out, m in (first, second))
    out = sum(parts, torch.zeros(count, heads, size))
    wanted = torch.autograd.grad((out * torch.tensor(dout)).sum(), leaves)
    ops = be.ops
    given = [ops.from_numpy(x.detach().numpy(), "float32") for x in (torch.tensor(dout), *leaves, out, lse)]
    for kernel in (ops, composed_only(be)):
        dq_1, *found_1 = kernel.attention_grad(
            given[0], given[1], given[2], given[3], *given[6:], Spans.of_lengths([count], causal=causal)
        )
        dq_2, *found_2 = kernel.attention_grad(
            given[0], given[1], given[4], given[5], *given[6:], Spans.of_lengths([count], causal=False)
        )
        for ours, exact in zip((dq_1 + dq_2, *found_1, *found_2), wanted, strict=True):
            assert error(be.to_numpy(ours), exact.numpy()) < TOLERANCES["attention"].float32


def test_gradients_of_saturated_attention_are_finite(be: Backend) -> None:
    """Scores of ten thousand: exponentials of everything but the largest vanish, and nothing overflows."""
    q, k, v = (be.ops.from_numpy(normal(40, 2, 16, seed=i) * 100, "float32") for i in range(3))
    for causal in (True, False):
        spans = Spans.of_lengths([40], causal=causal)
        for ops in (be.ops, composed_only(be)):
            (out, lse), tape = be.autograd.run_stage(
                lambda _, q, k, v, ops=ops, spans=spans: ops.attention(q, k, v, spans), [q, k, v], []
            )
            found = be.autograd.backward(tape, [out * 0.0 + 1.0, None])
            assert all(np.isfinite(be.to_numpy(x)).all() for x in (out, lse, *found))


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
    outputs, tape = be.autograd.run_stage(lambda _, *xs: run(*xs), floats, [])
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


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_the_same_when_recomputed(be: Backend) -> None:
    """The mask is hashed again for the second pass and for the gradient: nothing of it is kept."""
    x = normal(9, 33)

    def twice(make: Any) -> list[np.ndarray]:
        def run(x: Any) -> Any:
            return be.ops.sum(make(lambda x: be.ops.dropout(x * x, 0.4, (1, 2, 3)), x))

        value, (gradient,) = be.autograd.value_and_grad(run, [be.ops.from_numpy(x, "float32")])
        return [be.to_numpy(value), be.to_numpy(gradient)]

    plain, again = twice(lambda fn, x: fn(x)), twice(be.autograd.checkpoint)
    assert np.array_equal(plain[0], again[0]) and np.array_equal(plain[1], again[1])
    assert 0.2 < (plain[1] == 0).mean() < 0.6


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_the_share_that_is_asked_for(be: Backend, p: float) -> None:
    """In the whole, in every row and column, and independently of the neighbours and of another key's."""
    rows, columns = 400, 500
    ones = be.ops.from_numpy(np.ones((rows, columns), np.float32))
    one, other = (be.to_numpy(be.ops.dropout(ones, p, (7, n))) == 0 for n in (0, 1))
    spread = np.sqrt(p * (1 - p))
    assert abs(one.mean() - p) < 5 * spread / np.sqrt(one.size)
    for axis, count in ((0, rows), (1, columns)):
        assert np.abs(one.mean(axis) - p).max() < 5 * spread / np.sqrt(count)
    for shifted in (one[1:, :], one[:, 1:], other):
        part = one[: shifted.shape[0], : shifted.shape[1]]
        assert abs(((part - p) * (shifted - p)).mean()) < 5 * spread**2 / np.sqrt(part.size)
