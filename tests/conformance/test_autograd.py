"""The differentiation contract: stages, several tapes, taps, checkpoint, custom gradients."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from duetvl.core.autograd import MissingGradient
from duetvl.core.backend import Backend
from duetvl.core.params import Parameter, Weights

from .cases import integers, normal

torch = pytest.importorskip("torch")


def tensor(be: Backend, values: Any, dtype: str = "float32") -> Any:
    return be.ops.from_numpy(np.asarray(values, np.float32), dtype)


def parameter(be: Backend, path: str, values: Any, dtype: str = "float32", **tags: bool) -> Parameter:
    return Parameter(path, tensor(be, values, dtype), **tags)


def numbers(be: Backend, x: Any) -> Any:
    return be.to_numpy(x).tolist()


def run_stage(
    be: Backend, fn: Callable[..., Any], inputs: Any, parameters: Any, needs: Any = None
) -> tuple[tuple[Any, ...], Any]:
    """`fn(*inputs, *parameters)` on a tape."""
    paths = [p.path for p in parameters]
    return be.autograd.run_stage(lambda w, *xs: fn(*xs, *(w[path] for path in paths)), inputs, parameters, needs)


def train(
    be: Backend, fn: Callable[..., Any], *parameters: Parameter, inputs: tuple[Any, ...] = (), **options: Any
) -> Any:
    """One tape, pulled back with ones; the gradients of the inputs."""
    outputs, tape = run_stage(be, fn, inputs, parameters)
    ones = [y * 0.0 + 1.0 for y in outputs]
    return be.autograd.backward(tape, ones, **options)


# -- tapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_three_tapes_are_pulled_back_in_any_order(be: Backend, order: tuple[int, ...]) -> None:
    """A parameter used twice in each of three micro-batches: d(x w w) = 2 x w."""
    w = parameter(be, "w", [2.0, 3.0])
    xs = [np.array([i + 1.0, 10.0 * i], np.float32) for i in range(3)]
    tapes = [run_stage(be, lambda x, w: x * w * w, [tensor(be, x)], [w]) for x in xs]
    expected = np.zeros(2, np.float32)
    for position, i in enumerate(order):
        (dx,) = be.autograd.backward(tapes[i][1], [tensor(be, [1.0, 2.0])], last=position == 2)
        assert numbers(be, dx) == [4.0, 18.0]
        expected += 2 * xs[i] * np.array([2.0, 6.0], np.float32)
        assert numbers(be, w.main_grad) == expected.tolist()


def test_1f1b_over_two_stages(be: Backend) -> None:
    """Two forwards ahead, then one backward and one forward in turn, as a pipeline does it."""
    first, second = parameter(be, "first", normal(8, 8)), parameter(be, "second", normal(8, 8, seed=1))
    rows = [normal(4, 8, seed=5 + i).astype(np.float32) for i in range(4)]

    def stage(x: Any, w: Any) -> Any:
        return be.ops.silu(be.ops.linear(x, w))

    flight, seen = [], 0
    for step in range(6):
        if step < 4:
            (middle,), tape_1 = run_stage(be, stage, [tensor(be, rows[step])], [first])
            (out,), tape_2 = run_stage(be, stage, [middle], [second])
            flight.append((tape_1, tape_2, out * 0.0 + 1.0))
        if step >= 2:
            tape_1, tape_2, ones = flight.pop(0)
            seen += 1
            (between,) = be.autograd.backward(tape_2, [ones], last=seen == 4)
            be.autograd.backward(tape_1, [between], last=seen == 4)
    exact = [torch.tensor(be.to_numpy(p.tensor)).double().requires_grad_() for p in (first, second)]
    x = torch.tensor(np.concatenate(rows)).double()
    for w in exact:
        x = torch.nn.functional.silu(x @ w.T)
    x.sum().backward()
    for p, w in zip((first, second), exact, strict=True):
        np.testing.assert_allclose(be.to_numpy(p.main_grad), w.grad.numpy(), atol=3e-6 * float(w.grad.abs().max()))


def test_cotangent_of_none_counts_as_zero(be: Backend) -> None:
    w = parameter(be, "w", [2.0])
    outputs, tape = run_stage(be, lambda x, w: (x * w, x * x), [tensor(be, [3.0])], [w])
    assert [numbers(be, y) for y in outputs] == [[6.0], [9.0]]
    (dx,) = be.autograd.backward(tape, [tensor(be, [1.0]), None])
    assert (numbers(be, dx), numbers(be, w.main_grad)) == ([2.0], [3.0])


def test_unused_input_has_no_gradient(be: Backend) -> None:
    dx, dy = train(be, lambda x, y: x * 2.0, inputs=(tensor(be, [1.0]), tensor(be, [1.0])))
    assert (numbers(be, dx), dy) == ([2.0], None)


def test_outputs_may_be_inputs_parameters_or_constants(be: Backend) -> None:
    w = parameter(be, "w", [2.0])
    dx, dy = train(be, lambda x, y, w: (x, w, x, tensor(be, [1.0])), w, inputs=(tensor(be, [3.0]), tensor(be, [1.0])))
    assert (numbers(be, dx), dy, numbers(be, w.main_grad)) == ([2.0], None, [1.0])


def test_outputs_are_not_differentiable_further(be: Backend) -> None:
    """What leaves a stage is a plain tensor: the next stage starts from it."""
    (middle,), _ = run_stage(be, lambda x: x * 3.0, [tensor(be, [1.0])], [])
    needs = Probe(be)
    needs.call(middle)
    assert needs.seen == [(False,)]


def test_a_stage_records_under_no_grad_too(be: Backend) -> None:
    w = parameter(be, "w", [2.0])
    with be.autograd.no_grad():
        _, tape = run_stage(be, lambda x, w: x * w, [tensor(be, [3.0])], [w])
    (dx,) = be.autograd.backward(tape, [tensor(be, [1.0])])
    assert (numbers(be, dx), numbers(be, w.main_grad)) == ([2.0], [3.0])


# -- parameters ------------------------------------------------------------------------------------------------------


def test_tied_use_arrives_once_and_complete(be: Backend) -> None:
    """One parameter as embedding and as output matrix."""
    ops, size, width = be.ops, 11, 6
    w = parameter(be, "embed", normal(size, width))
    ids, labels = integers(size, 7), integers(size, 7, seed=1)
    ready: list[str] = []

    def fn(w: Any) -> Any:
        rows = ops.take_rows(w, ops.from_numpy(ids))
        return ops.linear_cross_entropy(rows * 2.0, w, ops.from_numpy(labels))

    train(be, fn, w, on_ready=lambda p: ready.append(p.path))
    exact = torch.tensor(be.to_numpy(w.tensor)).double().requires_grad_()
    logits = 2 * exact[torch.tensor(ids).long()] @ exact.T
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long(), reduction="sum").backward()
    np.testing.assert_allclose(be.to_numpy(w.main_grad), exact.grad.numpy(), atol=5e-6)
    assert ready == ["embed"]


def test_ready_once_for_every_parameter_on_the_last_tape_only(be: Backend) -> None:
    """Also for one that only an earlier micro-batch used, and for a conditional one that none used."""
    w, v = parameter(be, "w", [2.0]), parameter(be, "v", [5.0])
    idle = parameter(be, "idle", [1.0], conditional=True)
    ready: list[Any] = []

    def note(p: Parameter) -> None:
        ready.append((p.path, None if p.main_grad is None else numbers(be, p.main_grad)))

    train(be, lambda w, v, idle: w * v * w, w, v, idle, last=False, on_ready=note)
    assert ready == []
    train(be, lambda w, v, idle: w * w, w, v, idle, last=True, on_ready=note)
    assert sorted(ready) == [("idle", None), ("v", [4.0]), ("w", [24.0])]


def test_missing_gradient_names_the_parameter(be: Backend) -> None:
    w, v = parameter(be, "w", [2.0]), parameter(be, "model.unused.weight", [5.0])
    train(be, lambda w, v: w * 2.0, w, v, last=False)
    with pytest.raises(MissingGradient, match=r"model\.unused\.weight \(1 of 2 trainable"):
        train(be, lambda w, v: w * 2.0, w, v)
    v.conditional = True
    train(be, lambda w, v: w * 2.0, w, v)


def test_zero_gradient_is_a_gradient(be: Backend) -> None:
    """A step without rows still reaches every parameter it passes."""
    ops = be.ops
    w, scale, bias = parameter(be, "w", normal(5, 4)), parameter(be, "scale", normal(4)), parameter(be, "b", normal(5))
    head = parameter(be, "head", normal(7, 5))

    def fn(x: Any, w: Any, scale: Any, bias: Any, head: Any) -> Any:
        h = ops.linear(ops.rms_norm(x, scale, eps=1e-6), w, bias)
        return ops.linear_cross_entropy(h, head, ops.from_numpy(np.zeros(0, np.int32)))

    train(be, fn, w, scale, bias, head, inputs=(ops.zeros((0, 4)),))
    for p in (w, scale, bias, head):
        assert not be.to_numpy(p.main_grad).any()


def test_frozen_parameters_cost_no_tape(be: Backend) -> None:
    """What comes before the first trainable parameter is not recorded."""
    w, frozen = parameter(be, "w", [2.0]), parameter(be, "frozen", [5.0], trainable=False)
    needs = Probe(be)

    def fn(w: Any, frozen: Any) -> Any:
        return needs.call(frozen * frozen) * needs.call(w)

    _, tape = run_stage(be, fn, [], [w, frozen])
    be.autograd.backward(tape, [tensor(be, [1.0])])
    assert needs.seen == [(False,), (True,)]
    assert (numbers(be, w.main_grad), frozen.main_grad) == ([100.0], None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_accumulate_in_float32(be: Backend, dtype: str) -> None:
    """1000 small gradients after one large: a buffer in the weights' dtype would lose every one of them."""
    w = parameter(be, "w", [[1.0]], dtype)
    small = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[dtype]
    cotangent, tapes = tensor(be, [[1.0]], dtype), 1000 if be.name == "torch_npu" else 50

    def pull(w: Parameter, value: float) -> None:
        _, tape = run_stage(be, be.ops.linear, [tensor(be, [[value]], dtype)], [w])
        be.autograd.backward(tape, [cotangent], last=False)

    narrow = torch.tensor(1.0, dtype=getattr(torch, dtype))
    pull(w, 1.0)
    for _ in range(tapes):
        pull(w, small)
        narrow += small
    assert be.ops.dtype_of(w.main_grad) == "float32"
    assert numbers(be, w.main_grad) == [[1.0 + tapes * small]]
    assert float(narrow) == 1.0


def test_main_grad_is_not_shared(be: Backend) -> None:
    """The engine may hand one tensor to several receivers; adding to one must leave the others alone."""
    w, v = parameter(be, "w", [2.0]), parameter(be, "v", [5.0])
    (dx,) = train(be, lambda x, w, v: w + v + x, w, v, inputs=(tensor(be, [1.0]),), last=False)
    train(be, lambda w, v: w * 10.0 + v, w, v)
    assert [numbers(be, t) for t in (dx, w.main_grad, v.main_grad)] == [[1.0], [11.0], [2.0]]


# -- checkpoint ------------------------------------------------------------------------------------------------------


def test_checkpoint_recomputes_and_changes_nothing(be: Backend) -> None:
    """Nested in layers, over closed-over parameters, a custom gradient inside; gradients arrive once."""
    ops, ag = be.ops, be.autograd
    runs: list[int] = []
    product = ag.custom_vjp(lambda needs, x, y: (x * y, (x, y)), lambda needs, r, d: (d * r[1], d * r[0]))

    def results(checkpoint: Callable[..., Any]) -> list[Any]:
        w, v, table = (parameter(be, n, normal(4, 4, seed=i)) for i, n in enumerate(("w", "v", "table")))
        ready: list[str] = []

        def fn(x: Any, w: Any, v: Any, table: Any) -> Any:
            def layer(x: Any) -> Any:
                runs.append(1)
                inner = checkpoint(lambda x, y: (ops.silu(product(x, w)), ops.rms_norm(y, v[0], eps=1e-6)), x, x * 2.0)
                return inner[0] + ops.linear(inner[1], v) + table

            for _ in range(3):
                x = checkpoint(layer, x)
            return x, table * table

        x = tensor(be, normal(4, 4, seed=9))
        dx = train(be, fn, w, v, table, inputs=(x,), on_ready=lambda p: ready.append(p.path))
        assert sorted(ready) == ["table", "v", "w"]
        return [be.to_numpy(g) for g in (*dx, w.main_grad, v.main_grad, table.main_grad)]

    plain = results(lambda fn, *xs: fn(*xs))
    assert len(runs) == 3
    recomputed = results(ag.checkpoint)
    assert len(runs) == 3 + 6
    for a, b in zip(plain, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_checkpoint_without_recording_just_runs(be: Backend) -> None:
    with be.autograd.no_grad():
        assert numbers(be, be.autograd.checkpoint(lambda x: x * 2.0, tensor(be, [3.0]))) == [6.0]
    assert numbers(be, be.autograd.checkpoint(lambda x: x * 2.0, tensor(be, [3.0]))) == [6.0]


def test_checkpoint_of_coarse_operations(be: Backend) -> None:
    """Operations that make their gradient in the forward, or keep their output, are recomputed as well."""
    ops = be.ops
    labels = ops.from_numpy(integers(9, 5))

    def loss(h: Any, w: Any) -> Any:
        return ops.linear_cross_entropy(ops.swiglu(h, h * 0.5), w, labels)

    def gradients(fn: Callable[..., Any]) -> list[np.ndarray]:
        w = parameter(be, "w", normal(9, 4))
        (dh,) = train(be, fn, w, inputs=(tensor(be, normal(5, 4)),))
        return [be.to_numpy(dh), be.to_numpy(w.main_grad)]

    for a, b in zip(gradients(loss), gradients(lambda h, w: be.autograd.checkpoint(loss, h, w)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# -- custom gradients ------------------------------------------------------------------------------------------------


class Probe:
    """x * 2 that notes which of its tensors it was told to differentiate."""

    def __init__(self, be: Backend):
        self.seen: list[tuple[bool, ...]] = []
        self.call = be.autograd.custom_vjp(self.forward, lambda needs, residuals, d: (d * 2.0,) * len(needs))

    def forward(self, needs: tuple[bool, ...], *xs: Any) -> Any:
        self.seen.append(needs)
        return sum(x * 2.0 for x in xs[1:]) + xs[0] * 2.0, ()


def test_needs_say_what_is_differentiated(be: Backend) -> None:
    needs, w = Probe(be), parameter(be, "w", [1.0])
    constant = tensor(be, [1.0])

    def fn(x: Any, w: Any) -> Any:
        with be.autograd.no_grad():
            needs.call(x, w)
        needs.call(be.autograd.stop_gradient(x), constant)
        return needs.call(constant, w, x * 1.0)

    (dx,) = train(be, fn, w, inputs=(constant,))
    needs.call(constant)
    assert needs.seen == [(False, False), (False, False), (False, True, True), (False,)]
    assert (numbers(be, dx), numbers(be, w.main_grad)) == ([2.0], [2.0])


def test_custom_gradient_inside_a_custom_gradient_is_unrecorded(be: Backend) -> None:
    inner = Probe(be)
    outer = be.autograd.custom_vjp(
        lambda needs, x, y: (inner.call(x) * y, (x, y)), lambda needs, r, d: (d * 2.0 * r[1], d * 2.0 * r[0])
    )
    w = parameter(be, "w", [2.0])
    train(be, lambda w: outer(w, tensor(be, [3.0])), w)
    assert inner.seen == [(False,)]
    assert numbers(be, w.main_grad) == [6.0]


def test_custom_gradient_may_differentiate_inside(be: Backend) -> None:
    """backward calls value_and_grad, as recomputing blocks do."""

    def backward(needs: Any, residuals: Any, d: Any) -> Any:
        return be.autograd.value_and_grad(lambda y: be.ops.sum(y * y * y * d), [residuals[0]])[1]

    cube = be.autograd.custom_vjp(lambda needs, x: (x * x * x, (x,)), backward)
    _, (dx,) = be.autograd.value_and_grad(lambda x: be.ops.sum(cube(x) * 2.0), [tensor(be, [3.0])])
    assert numbers(be, dx) == [54.0]


def test_custom_gradient_with_several_outputs_and_any_residuals(be: Backend) -> None:
    """Unused outputs get zeros; residuals keep their places whatever they are; None is no gradient."""
    kept: list[Any] = []

    def forward(needs: Any, x: Any, y: Any) -> Any:
        out = x * y
        return (out, x + y), ("text", x, None, out, 7, y)

    def backward(needs: Any, residuals: Any, d: Any, e: Any) -> Any:
        kept.append((residuals[0], residuals[2], residuals[4], numbers(be, residuals[3]), numbers(be, e)))
        return d * residuals[5] + e, None

    pair = be.autograd.custom_vjp(forward, backward)
    w = parameter(be, "w", [4.0], conditional=True)
    (dx,) = train(be, lambda x, w: pair(x, w)[0], w, inputs=(tensor(be, [3.0]),))
    assert kept == [("text", None, 7, [12.0], [0.0])]
    assert (numbers(be, dx), w.main_grad) == ([4.0], None)


# -- functions of tensors --------------------------------------------------------------------------------------------


def test_value_and_grad(be: Backend) -> None:
    x, y = tensor(be, [3.0, 2.0]), tensor(be, [1.0, -1.0])
    value, (dx, dy) = be.autograd.value_and_grad(lambda x, y: be.ops.sum(x * x * y), [x, y])
    assert (numbers(be, value), numbers(be, dx), numbers(be, dy)) == (5.0, [6.0, -4.0], [9.0, 4.0])


def test_value_and_grad_of_what_does_not_depend(be: Backend) -> None:
    value, (dx, dy) = be.autograd.value_and_grad(lambda x, y: be.ops.sum(x), [tensor(be, [3.0]), tensor(be, [1.0])])
    assert (numbers(be, value), numbers(be, dx), numbers(be, dy)) == (3.0, [1.0], [0.0])
    value, (dx,) = be.autograd.value_and_grad(lambda x: tensor(be, 7.0), [tensor(be, [3.0])])
    assert (numbers(be, value), numbers(be, dx)) == (7.0, [0.0])


def test_stop_gradient(be: Backend) -> None:
    _, (dx,) = be.autograd.value_and_grad(
        lambda x: be.ops.sum(be.autograd.stop_gradient(x) * x), [tensor(be, [3.0, 2.0])]
    )
    assert numbers(be, dx) == [3.0, 2.0]


def test_no_grad_nests(be: Backend) -> None:
    def fn(x: Any) -> Any:
        with be.autograd.no_grad():
            with be.autograd.no_grad():
                square = x * x
            cube = square * x
        return be.ops.sum(cube * x)

    _, (dx,) = be.autograd.value_and_grad(fn, [tensor(be, [3.0])])
    assert numbers(be, dx) == [27.0]


# -- trouble ---------------------------------------------------------------------------------------------------------


class TroubleError(Exception):
    """Raised by the tests below."""


def test_errors_leave_the_engine_usable(be: Backend) -> None:
    ag, x = be.autograd, tensor(be, [3.0])
    w = parameter(be, "w", [2.0])
    runs = itertools.count()

    def fail(*_: Any) -> Any:
        raise TroubleError

    def fail_again(x: Any) -> Any:
        return x * x if next(runs) == 0 else fail()

    in_forward = ag.custom_vjp(fail, fail)
    in_backward = ag.custom_vjp(lambda needs, x: (x * 1.0, ()), fail)
    under_no_grad = ag.no_grad()
    for fn in (
        lambda x, w: fail(x * w),
        lambda x, w: in_forward(x * w),
        lambda x, w: in_backward(x * w),
        lambda x, w: ag.checkpoint(fail, x * w),
        lambda x, w: ag.checkpoint(fail_again, x * w),
    ):
        with pytest.raises(TroubleError):
            train(be, fn, w, inputs=(x,), last=False)
    with pytest.raises(TroubleError), under_no_grad:
        fail()
    w.main_grad = None
    (dx,) = train(be, lambda x, w: x * w, w, inputs=(x,))
    assert (numbers(be, dx), numbers(be, w.main_grad)) == ([2.0], [3.0])


def test_error_in_on_ready_reaches_the_caller(be: Backend) -> None:
    def fail(p: Parameter) -> None:
        raise TroubleError

    with pytest.raises(TroubleError):
        train(be, lambda w: w * 2.0, parameter(be, "w", [2.0]), on_ready=fail)


@pytest.mark.parametrize("pulled", [True, False], ids=["pulled back", "dropped"])
def test_tapes_free_their_memory_at_once(be: Backend, pulled: bool) -> None:
    """Without the help of the cycle collector; each tape records some 10 MB."""
    ops, ag = be.ops, be.autograd
    x, w = tensor(be, np.ones((256, 1024))), parameter(be, "w", np.ones(1024))
    keeps_output = ag.custom_vjp(lambda needs, x: (lambda y: (y, (x, y)))(x * 2.0), lambda needs, r, d: (d * 2.0,))

    def fn(x: Any, w: Any) -> Any:
        x = ag.checkpoint(lambda x: ops.rms_norm(x, w, eps=1e-6) * x, x)
        return keeps_output(ops.swiglu(x * w, x)) + x

    def once() -> None:
        outputs, tape = run_stage(be, fn, [x], [w])
        if pulled:
            ag.backward(tape, outputs)
        w.main_grad = None

    gc.collect()
    gc.disable()
    try:
        for _ in range(8):
            once()
        before = resident()
        for _ in range(30):
            once()
        grown = resident() - before
    finally:
        gc.enable()
    assert grown < 60, f"{grown:.0f} MB more after 30 tapes"


def resident() -> float:
    """MB that the process holds now."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096 / 1e6


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_gradient_is_taken_as_soon_as_it_is_complete(be: Backend, again: bool) -> None:
    """And not when all are, which would hold a second set of them: a block's, before the block below is pulled back."""
    happened: list[str] = []

    def marked(i: int, x: Any) -> Any:
        def backward(needs: Any, residuals: Any, d: Any) -> Any:
            happened.append(f"layer {i}")
            return (d,)

        return be.autograd.custom_vjp(lambda needs, x: (be.ops.reshape(x, x.shape), ()), backward)(x)

    def layers(leaves: Mapping[str, Any], x: Any) -> Any:
        w = Weights(leaves)
        for i in range(3):
            block = w.layers[i]

            def run(x: Any, block: Any = block, i: int = i) -> Any:
                return be.ops.linear(marked(i, x), block.weight)

            x = be.autograd.checkpoint(run, x) if again else run(x)
        return be.ops.sum(x)

    ones = tensor(be, np.ones((2, 2)))
    parameters = [parameter(be, f"layers.{i}.weight", np.ones((2, 2))) for i in range(3)]
    _, tape = be.autograd.run_stage(layers, (ones,), parameters)
    be.autograd.backward(tape, [tensor(be, 1.0)], on_ready=lambda p: happened.append(p.path))
    order = [name for i in (2, 1, 0) for name in (f"layers.{i}.weight", f"layer {i}")]
    assert [name for name in happened if name.startswith("layers")] == order[::2]
    for i in (2, 1):
        assert happened.index(f"layers.{i}.weight") < happened.index(f"layer {i - 1}")


def test_only_the_inputs_that_need_one_get_a_gradient(be: Backend) -> None:
    """Nothing is recorded for the others: behind a frozen part of a model there is no backward pass."""
    probe, w = Probe(be), parameter(be, "w", [2.0])

    def fn(leaves: Mapping[str, Any], x: Any, y: Any) -> Any:
        return probe.call(x) * leaves["w"], probe.call(y)

    x, y = tensor(be, [3.0]), tensor(be, [5.0])
    _, tape = be.autograd.run_stage(fn, (x, y), [w], needs=(False, True))
    dx, dy = be.autograd.backward(tape, [tensor(be, [1.0]), tensor(be, [1.0])])
    assert probe.seen == [(False,), (True,)]
    assert (dx, numbers(be, dy), numbers(be, w.main_grad)) == (None, [2.0], [6.0])
