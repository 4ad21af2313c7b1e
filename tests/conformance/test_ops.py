"""Every operation, forward and gradient, against float64, on every backend and dtype."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from duetvl.core.backend import Backend, load_backend
from duetvl.core.composed import ComposedOps
from duetvl.core.composed import attention as composed_attention
from duetvl.core.composed import ops as composed
from duetvl.core.composed.attention import ComposedAttention
from duetvl.core.errors import ConfigError
from duetvl.core.ops import Ops
from duetvl.core.spans import Spans

from .cases import Case, all_cases, normal
from .reference import attention, rounded
from .test_signatures import operations
from .tolerances import TOLERANCES, complaint, error

torch = pytest.importorskip("torch")

CASES = all_cases()
# What ComposedOps gives every backend, and a backend may override.
DEFAULTS = {
    name: value
    for kind in (ComposedAttention, ComposedOps)
    for name, value in vars(kind).items()
    if not name.startswith("__")
}
COARSE = [case for case in CASES if case.op in DEFAULTS]
BLOCKED = [case for case in COARSE if case.op.startswith(("attention", "linear_cross_entropy", "linear_logprobs"))]


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
    in_test_conversion = {"from_numpy", "to_numpy", "dtype_of", "cast", "zeros", "assign", "write_slice"}
    elsewhere = in_test_conversion | {"attention_grad"}  # the gradient of every case of attention
    assert not set(operations(Ops)) - {case.op for case in CASES} - elsewhere


@pytest.mark.parametrize("case", BLOCKED, ids=ident)
def test_blocks_equal_reference(be: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With budgets so small that everything is computed in many blocks."""
    monkeypatch.setattr(composed_attention, "SCORE_BUDGET", 64)
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


@pytest.mark.parametrize(
    ("q", "k", "v", "spans", "complaint"),
    [
        ((5, 7, 16), (5, 2, 16), None, Spans.of_lengths([5], causal=True), "7 query heads with 2 key-value groups"),
        ((5, 2, 16), (5, 4, 16), None, Spans.of_lengths([5], causal=True), "2 query heads with 4 key-value groups"),
        ((5, 4, 16), (5, 2, 8), None, Spans.of_lengths([5], causal=True), "the head size of q"),
        ((5, 4, 16), (5, 2, 16), (5, 1, 16), Spans.of_lengths([5], causal=True), "k and v must have one shape"),
        ((5, 4, 16), (5, 2, 16), None, Spans.of_lengths([4], causal=True), "spans of 4 and 4"),
        ((5, 4, 16), (6, 2, 16), None, Spans.of_lengths([5], causal=True), "spans of 5 and 5"),
        ((5, 4, 16), (6, 2, 16), None, Spans.of_lengths([5], [5], causal=False), "spans of 5 and 5"),
    ],
)
def test_attention_refuses_what_does_not_fit_together(
    be: Backend, q: Any, k: Any, v: Any, spans: Spans, complaint: str
) -> None:
    for ops in (be.ops, composed_only(be)):
        tensors = [ops.zeros(shape) for shape in (q, k, v or k)]
        with pytest.raises(ConfigError, match=complaint):
            ops.attention(*tensors, spans)
        with pytest.raises(ConfigError, match=complaint):
            ops.attention_grad(tensors[0], *tensors, tensors[0], ops.zeros((q[1], q[0])), spans)


def test_attention_in_pieces_of_keys_is_attention(be: Backend) -> None:
    """As a ring does it: earlier keys are seen in full, the rows' own causally; some sequences have none of either."""
    rows, keys = np.array([4, 3, 0, 6]), np.array([9, 3, 5, 6])
    q, k, v, dout = (normal(n, h, 16, seed=i) for i, (n, h) in enumerate(((13, 4), (23, 2), (23, 2), (13, 4))))
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    exact, _ = attention(*leaves, rows, True, keys)
    wanted = torch.autograd.grad((exact * torch.tensor(dout)).sum(), leaves)
    own = np.concatenate([np.arange(end - n, end) for end, n in zip(np.cumsum(keys), rows, strict=True)])
    earlier = np.setdiff1d(np.arange(23), own)
    pieces = (
        (earlier, Spans.of_lengths(rows, keys - rows, causal=False)),
        (own, Spans.of_lengths(rows, causal=True)),
    )
    ops = be.ops
    q_, dout_ = (ops.from_numpy(x, "float32") for x in (q, dout))
    calls = [(*(ops.from_numpy(x[at], "float32") for x in (k, v)), spans) for at, spans in pieces]
    found = [[be.to_numpy(x) for x in ops.attention(q_, *call)] for call in calls]
    lse = np.logaddexp(found[0][1], found[1][1])
    out = sum((o * np.exp(m - lse).T[:, :, None] for o, m in found), np.zeros(q.shape))
    assert error(out, exact.detach().numpy()) < TOLERANCES["attention"].float32
    joined = (ops.from_numpy(out, "float32"), ops.from_numpy(lse))
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for (at, _), (piece_k, piece_v, spans) in zip(pieces, calls, strict=True):
        parts = ops.attention_grad(dout_, q_, piece_k, piece_v, *joined, spans)
        dq, dk[at], dv[at] = dq + be.to_numpy(parts[0]), be.to_numpy(parts[1]), be.to_numpy(parts[2])
    for ours, theirs in zip((dq, dk, dv), wanted, strict=True):
        assert error(ours, theirs.numpy()) < TOLERANCES["attention"].float32


def test_linear_logprobs_grad_computes_what_is_needed(be: Backend) -> None:
    ops = be.ops
    h, w, labels = ops.zeros((3, 4)), ops.zeros((5, 4)), ops.zeros((3,), "int32")
    for needs in ((True, False), (False, True)):
        found = ops.linear_logprobs_grad(ops.zeros((3,)), h, w, labels, ops.zeros((3,)), needs)
        assert tuple(x is not None for x in found) == needs


def test_dropout_refuses_row_numbers_that_are_not_those_of_its_rows(be: Backend) -> None:
    with pytest.raises(ConfigError, match=r"4 rows with row numbers of shape \(3,\)"):
        be.ops.dropout(be.ops.zeros((2, 2, 8)), 0.5, (1,), np.arange(3))


def test_dropout_of_parts_is_dropout_of_the_whole(be: Backend) -> None:
    """Rows dealt out to ranks in any order, and columns cut in two."""
    x = normal(12, 10).astype(np.float32)
    whole = be.to_numpy(be.ops.dropout(be.ops.from_numpy(x), 0.5, (3, 1)))
    for rows in (np.array([11, 3, 4, 0]), np.arange(5, 9)):
        for columns in (slice(0, 6), slice(6, 10)):
            part = be.ops.from_numpy(np.ascontiguousarray(x[rows, columns]))
            found = be.to_numpy(be.ops.dropout(part, 0.5, (3, 1), rows, columns.start))
            np.testing.assert_array_equal(found, whole[rows, columns])


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
    kind = type("ComposedOnly", (type(be.ops),), dict(DEFAULTS))
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
        (f"gradient {i}", ops.to_numpy(d), d64.detach().numpy())
        for i, (d, d64) in enumerate(zip(found, wanted, strict=True))
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
