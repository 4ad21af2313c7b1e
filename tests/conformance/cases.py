"""Operations with inputs: what the forward and gradient tests run on every backend."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from duetvl.core.ops import Ops
from duetvl.core.spans import Spans

from . import reference

torch = pytest.importorskip("torch")

COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
ALL = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Case:
    """`run(ops, *tensors)` should equal `expected(*float64 torch tensors)`.

    Floating arrays take the dtype under test and are differentiated, if `differentiable`; integer and boolean ones
    keep theirs. `pulled` says through which outputs a gradient comes. `exponent` is the size of the largest argument
    of an exponential: rounding it costs as many times more. `surface`: tests what a tensor can do by itself.
    """

    op: str
    label: str
    arrays: tuple[np.ndarray, ...]
    run: Callable[..., Any]
    expected: Callable[..., Any]
    differentiable: bool = True
    pulled: tuple[bool, ...] = (True,)
    dtypes: tuple[str, ...] = ALL
    exponent: float = 1.0
    surface: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape) * scale


def integers(below: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(0, below, size=shape).astype(np.int32)


def elementwise() -> Iterator[Case]:
    functions: dict[str, Callable[..., Any]] = {
        "exp": torch.exp,
        "sigmoid": reference.sigmoid,
        "silu": reference.silu,
        "gelu": reference.gelu,
        "quick_gelu": reference.quick_gelu,
    }
    for shape in ((), (7,), (3, 5, 8), (0, 4)):
        x = normal(*shape, scale=2.0)
        for name, expected in functions.items():
            yield Case(name, f"{shape}", (x,), lambda ops, x, name=name: getattr(ops, name)(x), expected)
        positive = np.abs(x) + 0.1
        yield Case("log", f"{shape}", (positive,), lambda ops, x: ops.log(x), torch.log)
        yield Case("rsqrt", f"{shape}", (positive,), lambda ops, x: ops.rsqrt(x), lambda x: x**-0.5)
        yield Case(
            "swiglu", f"{shape}", (x, normal(*shape, seed=1)), lambda ops, a, b: ops.swiglu(a, b),
            lambda a, b: reference.silu(a) * b,
        )  # fmt: skip
        yield Case(
            "where", f"{shape}", (np.asarray(x > 0), x, normal(*shape, seed=1)),
            lambda ops, c, a, b: ops.where(c, a, b), reference.where,
        )  # fmt: skip
    for name, at in (("silu", 60.0), ("sigmoid", 90.0), ("gelu", 30.0), ("quick_gelu", 60.0)):
        x = np.array([-at, -20.0, 0.0, 20.0, at])
        yield Case(name, "far out", (x,), lambda ops, x, name=name: getattr(ops, name)(x), functions[name])


def arithmetic() -> Iterator[Case]:
    """The surface that a tensor itself has."""
    signs: dict[str, Callable[..., Any]] = {
        "add": lambda a, b: a + b,
        "subtract": lambda a, b: a - b,
        "multiply": lambda a, b: a * b,
        "divide": lambda a, b: a / b,
    }
    far = normal(4, 5, seed=2)
    far = far + np.sign(far)
    for name, f in signs.items():
        for label, a, b in (
            ("same", normal(4, 5), far),
            ("row", normal(4, 5), far[0]),
            ("column", normal(4, 5), far[:, :1]),
            ("both ways", normal(4, 1), far[:1]),
            ("scalar tensor", normal(4, 5), far[0, 0]),
            ("empty", normal(0, 5), far[0]),
        ):
            yield Case(name, label, (a, np.asarray(b)), lambda ops, a, b, f=f: f(a, b), f, surface=True)
        for label, g in (("number right", lambda x, f=f: f(x, 2.5)), ("number left", lambda x, f=f: f(2.5, x))):
            yield Case(name, label, (far,), lambda ops, x, g=g: g(x), g, surface=True)
    yield Case("negative", "", (far,), lambda ops, x: -x, lambda x: -x, surface=True)
    yield Case(
        "compare", "", (far, normal(4, 5)), lambda ops, a, b: tuple(f(a, b) for f in COMPARISONS),
        lambda a, b: tuple(f(a, b) for f in COMPARISONS), differentiable=False, surface=True,
    )  # fmt: skip
    cuts: dict[str, Callable[..., Any]] = {
        "rows": lambda x: x[1:3],
        "columns": lambda x: x[:, 2:],
        "one row": lambda x: x[1],
        "negative": lambda x: x[-2:],
        "step": lambda x: x[::2],
        "new axis": lambda x: x[:, None, :],
        "element": lambda x: x[2, 3],
        "ellipsis": lambda x: x[..., :2],
        "empty": lambda x: x[2:2],
    }
    for label, cut in cuts.items():
        yield Case("slice", label, (far,), lambda ops, x, cut=cut: cut(x), cut, surface=True)


def reductions() -> Iterator[Case]:
    for shape, axis in (((4, 5), 0), ((4, 5), -1), ((2, 3, 7), 1), ((0, 5), 0), ((1000, 3), 0)):
        for keep in (False, True):
            label, x = f"{shape} {axis} {keep}", normal(*shape)
            yield Case(
                "sum", label, (x,), lambda ops, x, a=axis, k=keep: ops.sum(x, a, k),
                lambda x, a=axis, k=keep: x.sum(a, keepdim=k),
            )  # fmt: skip
            if shape[0]:
                yield Case(
                    "mean", label, (x,), lambda ops, x, a=axis, k=keep: ops.mean(x, a, k),
                    lambda x, a=axis, k=keep: x.mean(a, keepdim=k),
                )  # fmt: skip
                yield Case(
                    "max", label, (x,), lambda ops, x, a=axis, k=keep: ops.max(x, a, k),
                    lambda x, a=axis, k=keep: x.amax(a, keepdim=k), differentiable=False,
                )  # fmt: skip
        if shape[0]:
            yield Case(
                "argmax", f"{shape} {axis}", (normal(*shape),), lambda ops, x, a=axis: ops.argmax(x, a),
                lambda x, a=axis: x.argmax(a), differentiable=False,
            )  # fmt: skip
    for shape in ((4, 5), (), (0, 3)):
        yield Case("sum", f"all {shape}", (normal(*shape),), lambda ops, x: ops.sum(x), torch.sum)
    equals = np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    yield Case(
        "argmax", "first of equals", (equals,), lambda ops, x: ops.argmax(x, 1), lambda x: torch.tensor([1, 0]),
        differentiable=False,
    )  # fmt: skip


def shapes() -> Iterator[Case]:
    for label, new in (("merge", (6, 4)), ("infer", (2, -1)), ("split", (2, 3, 2, 2)), ("flat", (-1,))):
        x = normal(2, 3, 4)
        yield Case("reshape", label, (x,), lambda ops, x, s=new: ops.reshape(x, s), lambda x, s=new: x.reshape(s))
        yield Case(
            "reshape", f"{label} of a view", (x,),
            lambda ops, x, s=new: ops.reshape(ops.reshape(ops.transpose(x, (1, 0, 2)), (2, 3, 4)), s),
            lambda x, s=new: x.permute(1, 0, 2).reshape(s),
        )  # fmt: skip
    for label, new in (("no rows", (-1, 2, 2)), ("no rows wider", (-1, 8)), ("no rows flat", (-1,))):
        yield Case(
            "reshape", label, (normal(0, 4),), lambda ops, x, s=new: ops.reshape(x, s), lambda x, s=new: x.reshape(s)
        )
    yield Case("reshape", "to 0-d", (normal(1, 1),), lambda ops, x: ops.reshape(x, ()), lambda x: x.reshape(()))
    for axes in ((1, 0, 2), (2, 1, 0), (0, 2, 1), (0, 1, 2), (1, 2, 0)):
        yield Case(
            "transpose", f"{axes}", (normal(2, 3, 4),), lambda ops, x, a=axes: ops.transpose(x, a),
            lambda x, a=axes: x.permute(a),
        )  # fmt: skip
    for old, new in (((1, 4), (3, 4)), ((4,), (2, 3, 4)), ((2, 1, 3), (2, 5, 3)), ((), (2, 2))):
        yield Case(
            "broadcast_to", f"{old} {new}", (normal(*old),), lambda ops, x, s=new: ops.broadcast_to(x, s),
            lambda x, s=new: x.expand(s),
        )  # fmt: skip
    for label, rows, axis in (
        ("rows", (2, 3, 1), 0), ("with an empty piece", (2, 0, 3), 0), ("only empty", (0, 0), 0), ("one", (3,), 0),
        ("first empty", (0, 2), 0),
    ):  # fmt: skip
        pieces = tuple(normal(n, 4, seed=i) for i, n in enumerate(rows))
        yield Case("concat", label, pieces, lambda ops, *xs, a=axis: ops.concat(xs, a), lambda *xs: torch.cat(xs, 0))
    pieces = (normal(2, 3), normal(2, 0), normal(2, 4))
    yield Case("concat", "columns", pieces, lambda ops, *xs: ops.concat(xs, -1), lambda *xs: torch.cat(xs, -1))
    for label, sizes, axis in (
        ("rows", (1, 2, 4), 0), ("with an empty piece", (3, 0, 4), 0), ("columns", (2, 4), -1), ("one", (7,), 0),
        ("equal", (3, 3), 1),
    ):  # fmt: skip
        yield Case(
            "split", label, (normal(7, 6),), lambda ops, x, s=sizes, a=axis: ops.split(x, s, a),
            lambda x, s=sizes, a=axis: torch.split(x, list(s), a), pulled=(True,) * len(sizes),
        )  # fmt: skip
    yield Case(
        "split", "one piece used", (normal(7, 6),), lambda ops, x: ops.split(x, (2, 3, 2), 0)[1],
        lambda x: x[2:5],
    )  # fmt: skip


def matrices() -> Iterator[Case]:
    for lead in ((), (3,), (2, 3), (0,)):
        for ta, tb in ((False, False), (False, True), (True, False), (True, True)):
            a = normal(*lead, *((7, 5) if ta else (5, 7)))
            b = normal(*lead, *((4, 7) if tb else (7, 4)), seed=1)
            yield Case(
                "matmul", f"{lead} {ta} {tb}", (a, b),
                lambda ops, a, b, ta=ta, tb=tb: ops.matmul(a, b, transpose_a=ta, transpose_b=tb),
                lambda a, b, ta=ta, tb=tb: torch.matmul(a.mT if ta else a, b.mT if tb else b),
            )  # fmt: skip
    yield Case("matmul", "no rows", (normal(0, 5), normal(5, 3)), lambda ops, a, b: ops.matmul(a, b), torch.matmul)
    long = (normal(3, 4096), normal(4096, 2, seed=1))
    yield Case("matmul", "long sums", long, lambda ops, a, b: ops.matmul(a, b), torch.matmul)
    for shape in ((5, 7), (2, 3, 7), (7,), (0, 7), (1, 7)):
        x, w, b = normal(*shape), normal(4, 7, seed=1), normal(4, seed=2)
        yield Case("linear", f"{shape}", (x, w), lambda ops, x, w: ops.linear(x, w), lambda x, w: x @ w.T)
        yield Case(
            "linear", f"{shape} bias", (x, w, b), lambda ops, x, w, b: ops.linear(x, w, b), lambda x, w, b: x @ w.T + b
        )


def rows() -> Iterator[Case]:
    for shape in ((6, 4), (6,), (6, 2, 3)):
        for label, index in (
            ("all", [5, 0, 3]), ("repeated", [2, 2, 2, 0, 5, 2]), ("none", []), ("one", [4]),
        ):  # fmt: skip
            chosen = np.array(index, np.int32)
            yield Case(
                "take_rows", f"{shape} {label}", (normal(*shape), chosen), lambda ops, x, i: ops.take_rows(x, i),
                lambda x, i: x[i.long()],
            )  # fmt: skip
            if label != "repeated":
                new = normal(len(index), *shape[1:], seed=1)
                yield Case(
                    "scatter_rows", f"{shape} {label}", (normal(*shape), chosen, new),
                    lambda ops, x, i, r: ops.scatter_rows(x, i, r), reference.scatter_rows,
                )  # fmt: skip
    yield Case(
        "take_rows", "of none", (normal(0, 4), np.zeros(0, np.int32)), lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: x[i.long()],
    )  # fmt: skip
    yield Case(
        "take_rows", "without elements", (normal(3, 0, 4), np.array([2, 0, 0, 1], np.int32)),
        lambda ops, x, i: ops.take_rows(x, i), lambda x, i: x[i.long()],
    )  # fmt: skip
    many = integers(50, 3000)
    yield Case(
        "take_rows", "many repeats", (normal(50, 8), many), lambda ops, x, i: ops.take_rows(x, i),
        lambda x, i: x[i.long()], dtypes=("float32",),
    )  # fmt: skip
    for shape in ((6, 4), (2, 3, 5), (4,)):
        yield Case(
            "gather_last", f"{shape}", (normal(*shape), integers(shape[-1], *shape[:-1])),
            lambda ops, x, i: ops.gather_last(x, i), reference.gather_last,
        )  # fmt: skip
    index = np.array([3, 0, 0], np.int32)
    column = torch.nn.functional.one_hot(torch.tensor(index).long(), 5)
    yield Case(
        "add_at_last", "number", (normal(3, 5), index), lambda ops, x, i: ops.add_at_last(x + 0.0, i, -1.5),
        lambda x, i: x - 1.5 * column, differentiable=False,
    )  # fmt: skip
    yield Case(
        "add_at_last", "values", (normal(3, 5), index, normal(3)),
        lambda ops, x, i, y: ops.add_at_last(x + 0.0, i, y),
        lambda x, i, y: x + y[:, None] * column, differentiable=False,
    )  # fmt: skip
    yield Case(
        "add_at_last", "no rows", (normal(0, 5), index[:0]), lambda ops, x, i: ops.add_at_last(x + 0.0, i, 1.0),
        lambda x, i: x, differentiable=False,
    )  # fmt: skip


def norms() -> Iterator[Case]:
    for shape in ((5, 16), (3, 2, 7), (0, 16), (1, 1280), (9,)):
        for scale in (1.0, 100.0):
            x, w, b = normal(*shape, scale=scale), normal(shape[-1], seed=1), normal(shape[-1], seed=2)
            yield Case(
                "rms_norm", f"{shape} {scale}", (x, w), lambda ops, x, w: ops.rms_norm(x, w, eps=1e-6),
                lambda x, w: reference.rms_norm(x, w, 1e-6),
            )  # fmt: skip
            yield Case(
                "layer_norm", f"{shape} {scale}", (x, w, b), lambda ops, x, w, b: ops.layer_norm(x, w, b, eps=1e-6),
                lambda x, w, b: reference.layer_norm(x, w, b, 1e-6),
            )  # fmt: skip
    small = (normal(4, 8, scale=1e-3), normal(8, seed=1))
    yield Case(
        "rms_norm", "eps matters", small, lambda ops, x, w: ops.rms_norm(x, w, eps=1e-5),
        lambda x, w: reference.rms_norm(x, w, 1e-5),
    )  # fmt: skip
    yield Case(
        "layer_norm", "eps matters", (*small, normal(8, seed=2)),
        lambda ops, x, w, b: ops.layer_norm(x, w, b, eps=1e-5), lambda x, w, b: reference.layer_norm(x, w, b, 1e-5),
    )  # fmt: skip
    for count, heads, size in ((5, 3, 8), (1, 1, 40), (4, 2, 80), (0, 2, 16), (3, 5, 128)):
        angles = np.random.default_rng(0).uniform(0, 1000, (count, size // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        yield Case(
            "rope", f"{count} {heads} {size}", (normal(count, heads, size),),
            lambda ops, x, c=cos, s=sin: ops.rope(x, ops.from_numpy(c), ops.from_numpy(s)),
            lambda x, c=cos, s=sin: reference.rope(x, torch.tensor(c).double(), torch.tensor(s).double()),
        )  # fmt: skip


KEY = (3, 2**40 + 5, 0, 77)


def adapters() -> Iterator[Case]:
    any_rows, far_rows = np.array([7, 0, 2**33 + 5, 3, 8]), np.arange(2**32, 2**32 + 300)
    for shape, p, rows, column in (
        ((5, 16), 0.5, None, 0), ((3, 4, 7), 0.1, np.arange(2, 14), 9), ((64,), 0.9, None, 2**31),
        ((0, 8), 0.5, None, 0), ((4, 6), 0.0, None, 0), ((300, 40), 0.3, far_rows, 1), ((5, 40), 0.3, any_rows, 0),
    ):  # fmt: skip
        numbers = range(int(np.prod(shape[:-1]))) if rows is None else rows.tolist()
        factor = torch.tensor(reference.dropout_factor(shape, p, KEY, numbers, column))
        yield Case(
            "dropout", f"{shape} {p} {column}", (normal(*shape),),
            lambda ops, x, p=p, r=rows, c=column: ops.dropout(x, p, KEY, r, c), lambda x, f=factor: x * f,
        )  # fmt: skip
    for out, width, rank in ((5, 7, 2), (1, 64, 8), (3000, 2048, 4)):
        w, a, b = normal(out, width), normal(rank, width, seed=1), normal(out, rank, seed=2)
        yield Case(
            "low_rank_row_norms", f"{out} x {width}", (w, a, b),
            lambda ops, w, a, b: ops.low_rank_row_norms(w, ops.cast(a, "float32"), ops.cast(b, "float32"), 0.5),
            lambda w, a, b: (w + 0.5 * b @ a).norm(dim=1), differentiable=False,
        )  # fmt: skip


SPANS = {
    "one": (13,),
    "mixed": (5, 1, 17, 3),
    "single rows": (1, 1, 1),
    "equal": (4,) * 24,
    "equal runs": (8, 8, 8, 3, 3, 16, 8),
    "long": (150,),
    "none": (),
}
# Query rows and keys of each span.
KEYED = {
    "more keys": ((5, 1, 7), (9, 4, 7)),
    "more rows": ((9, 4, 2), (5, 1, 6)),
    "some without keys": ((3, 2, 4), (0, 5, 0)),
    "some without rows": ((0, 3, 0), (4, 3, 2)),
    "no keys": ((3,), (0,)),
    "no rows": ((0, 0), (4, 1)),
    "equal runs": ((4, 4, 4, 2), (6, 6, 6, 6)),
    "one row each": ((1, 1, 1), (7, 9, 9)),
    "long": ((70,), (150,)),
}
HEADS = {
    "16": (2, 2, 16),
    "40": (3, 3, 40),
    "40 of one group": (4, 1, 40),
    "80 of one group": (4, 1, 80),
    "128 of two groups": (6, 2, 128),
}


def attention() -> Iterator[Case]:
    pairs = [(spans, "16") for spans in SPANS] + [("mixed", heads) for heads in HEADS] + [("none", "80 of one group")]
    for spans_label, heads_label in dict.fromkeys(pairs):
        lengths, (heads, groups, size) = SPANS[spans_label], HEADS[heads_label]
        total = sum(lengths)
        q, k, v = (normal(total, n, size, seed=i) for i, n in enumerate((heads, groups, groups)))
        for causal in (False, True):
            spans = Spans.of_lengths(lengths, causal=causal)
            yield Case(
                "attention", f"{spans_label}, {heads_label}, {'causal' if causal else 'full'}", (q, k, v),
                lambda ops, q, k, v, s=spans: ops.attention(q, k, v, s),
                lambda q, k, v, n=lengths, c=causal: reference.attention(q, k, v, n, c), pulled=(True, False),
            )  # fmt: skip
    for label, heads_label in product(KEYED, ("16", "40 of one group")):
        (lengths, keys), (heads, groups, size) = KEYED[label], HEADS[heads_label]
        q = normal(sum(lengths), heads, size)
        k, v = (normal(sum(keys), groups, size, seed=i) for i in (1, 2))
        for causal in (False, True):
            spans = Spans.of_lengths(lengths, keys, causal=causal)
            yield Case(
                "attention", f"{label}, {heads_label}, {'causal' if causal else 'full'}", (q, k, v),
                lambda ops, q, k, v, s=spans: ops.attention(q, k, v, s),
                lambda q, k, v, n=lengths, m=keys, c=causal: reference.attention(q, k, v, n, c, m),
                pulled=(True, False),
            )  # fmt: skip
    q, k, v = (normal(40, 2, 16, seed=i, scale=s) for i, s in enumerate((60.0, 60.0, 1.0)))
    sharp = Spans.of_lengths((40,), causal=True)
    yield Case(
        "attention", "large scores", (q, k, v), lambda ops, q, k, v: ops.attention(q, k, v, sharp),
        lambda q, k, v: reference.attention(q, k, v, (40,), True), differentiable=False, dtypes=("float32",),
        exponent=np.abs(np.einsum("ihd,jhd->hij", q, k)).max() / 4,
    )  # fmt: skip


def vocabulary() -> Iterator[Case]:
    for count, width, size, scale in ((1, 8, 11, 1.0), (37, 16, 50, 1.0), (0, 8, 11, 1.0), (9, 16, 50, 1000.0)):
        h, w, labels = normal(count, width), normal(size, width, seed=1, scale=scale), integers(size, count)
        label = f"{count} x {size}{' large logits' if scale > 1 else ''}"
        # A sum of one loss can be next to nothing beside the logits whose rounding is in it: float32 only.
        common: dict[str, Any] = {
            "dtypes": ("float32",) if scale > 1 or count == 1 else ALL,
            "exponent": np.abs(h @ w.T).max(initial=1.0),
        }
        yield Case(
            "linear_cross_entropy", label, (h, w, labels),
            lambda ops, h, w, y: ops.linear_cross_entropy(h, w, y), reference.linear_cross_entropy, **common,
        )  # fmt: skip
        share = np.random.default_rng(3).uniform(0, 2, count).astype(np.float32)
        yield Case(
            "linear_cross_entropy", f"{label} weighted", (h, w, labels),
            lambda ops, h, w, y, s=share: ops.linear_cross_entropy(h, w, y, ops.from_numpy(s)),
            lambda h, w, y, s=share: reference.linear_cross_entropy(h, w, y, torch.tensor(s).double()), **common,
        )  # fmt: skip
        yield Case(
            "linear_logprobs", label, (h, w, labels), lambda ops, h, w, y: ops.linear_logprobs(h, w, y),
            reference.linear_logprobs, pulled=(True, False), **common,
        )  # fmt: skip
        if scale == 1.0:
            elsewhere = integers(3 * size, count) - size  # a third of the labels is in this part of the vocabulary
            dlogp, lse = normal(count, seed=4), normal(count, seed=5) + np.log(3 * size)
            yield Case(
                "linear_logprobs_grad", f"{count} x {size}", (dlogp, h, w, elsewhere, lse),
                lambda ops, d, h, w, y, m: ops.linear_logprobs_grad(
                    ops.cast(d, "float32"), h, w, y, ops.cast(m, "float32")
                ),
                reference.linear_logprobs_grad, differentiable=False,
            )  # fmt: skip
        for op, pulled in (("linear_cross_entropy", (True,)), ("linear_logprobs", (True, False))):
            for fixed, position in (("weight", 1), ("h", 0)):
                yield frozen_argument(op, f"{label} {fixed} frozen", h, w, labels, position, pulled)


def frozen_argument(
    op: str, label: str, h: np.ndarray, w: np.ndarray, labels: np.ndarray, position: int, pulled: tuple[bool, ...]
) -> Case:
    """h or the weight is a constant; float32 only, as the constant does not follow the dtype under test."""
    constant, other = (h, w) if position == 0 else (w, h)
    constant = constant.astype(np.float32)

    def run(ops: Ops, x: Any, y: Any) -> Any:
        pair = (ops.from_numpy(constant), x) if position == 0 else (x, ops.from_numpy(constant))
        return getattr(ops, op)(*pair, y)

    def expected(x: torch.Tensor, y: torch.Tensor) -> Any:
        fixed = torch.tensor(constant).double()
        return getattr(reference, op)(*((fixed, x) if position == 0 else (x, fixed)), y)

    largest = np.abs(h @ w.T).max(initial=1.0)
    return Case(op, label, (other, labels), run, expected, pulled=pulled, dtypes=("float32",), exponent=largest)


def all_cases() -> list[Case]:
    makers = (elementwise, arithmetic, reductions, shapes, matrices, rows, norms, adapters, attention, vocabulary)
    return [case for maker in makers for case in maker()]
