"""Differentiation by MindSpore's torch-style engine, which is private: this is the one file that touches it.

The public API cannot hold two tapes. `check_engine` runs a small program at start-up and names the version needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from duetvl.core.autograd import Arrivals, Backward, Forward, Leaves
from duetvl.core.errors import BackendError
from duetvl.core.params import Parameter

try:
    from mindspore._c_expression import run_backward
    from mindspore.graph.api import _pynative_executor as engine
except ImportError as missing:
    raise BackendError(f"duetvl needs mindspore>=2.9,<2.11, found {ms.__version__} ({missing})") from None

# In 2.9 the engine fails inside of `recompute`: "Unpack is being triggered for a tensor".
RECOMPUTATION = not ms.__version__.startswith("2.9.")


@dataclass(eq=False)
class Tape:
    """What one stage recorded, and where its gradients go while it is pulled back."""

    outputs: tuple[Tensor, ...]
    trainable: tuple[Parameter, ...]
    gradients: list[Tensor | None]
    arrivals: Arrivals = field(default_factory=Arrivals)


class MindSporeAutograd:
    """See core/autograd.py."""

    def __init__(self) -> None:
        engine.set_grad_flag(True)
        check_engine()

    def run_stage(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Parameter],
        needs: Sequence[bool] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tape]:
        tape = Tape((), tuple(p for p in parameters if p.trainable), [None] * len(inputs))
        leaves = Leaves(parameters, partial(_tap, arrivals=tape.arrivals))
        with _recording(True):
            outputs = fn(leaves, *_input_leaves(inputs, tape.gradients, needs))
        tape.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(ops.stop_gradient(x) for x in tape.outputs), tape

    def backward(
        self,
        tape: Tape,
        cotangents: Sequence[Tensor | None],
        *,
        last: bool = True,
        on_ready: Callable[[Parameter], None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        tape.arrivals.on_ready = on_ready if last else None
        pulled = [(y, d) for y, d in zip(tape.outputs, cotangents, strict=True) if d is not None and y._requires_grad]
        tape.outputs = ()  # a tape is pulled back once; what it recorded is freed on the way
        if pulled:
            _pull([y for y, _ in pulled], [d for _, d in pulled])
        if last:
            tape.arrivals.finish(tape.trainable)
        return tuple(tape.gradients)

    def value_and_grad(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        gradients: list[Tensor | None] = [None] * len(inputs)
        with _recording(True):
            value = fn(*_input_leaves(inputs, gradients))
        if value._requires_grad:
            _pull([value], [ops.ones_like(value)])
        found = (ops.zeros_like(x) if d is None else d for x, d in zip(inputs, gradients, strict=True))
        return ops.stop_gradient(value), tuple(found)

    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            recording = engine.enable_grad()
            needs = tuple(recording and x._requires_grad for x in tensors)
            if not any(needs):
                with _recording(False):
                    return forward(needs, *tensors)[0]
            return _Custom.apply(forward, backward, needs, *tensors)

        return call

    def checkpoint(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        if not RECOMPUTATION:
            raise BackendError(f"recomputation needs mindspore 2.10, found {ms.__version__}: set train.recompute=none")
        return ms.recompute(fn, *tensors, use_reentrant=False)

    def stop_gradient(self, x: Tensor) -> Tensor:
        return ops.stop_gradient(x)

    def no_grad(self) -> AbstractContextManager[None]:
        return _recording(False)


@contextmanager
def _recording(on: bool) -> Iterator[None]:
    before = engine.enable_grad()
    engine.set_enable_grad(on)
    try:
        yield
    finally:
        engine.set_enable_grad(before)


def _leaf(x: Tensor) -> Tensor:
    """A tensor over the same storage from which recording begins."""
    leaf = ops.stop_gradient(x)
    leaf._requires_grad = True
    return leaf


def _tap(parameter: Parameter, arrivals: Arrivals) -> Tensor:
    return _Tap.apply(_leaf(parameter.tensor), parameter, arrivals)


def _input_leaves(
    inputs: Sequence[Tensor], gradients: list[Tensor | None], needs: Sequence[bool] | None = None
) -> list[Tensor]:
    """The inputs, tapped where their gradients are needed, which will be put into `gradients`."""
    wanted = needs or [True] * len(inputs)
    return [
        _InputTap.apply(_leaf(x), gradients, i) if need else ops.stop_gradient(x)
        for i, (x, need) in enumerate(zip(inputs, wanted, strict=True))
    ]


def _pull(outputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """Run the engine from `outputs` back, through the taps. The graph is used up."""
    keep_graph, create_graph, allow_unreachable = False, False, True
    run_backward(tuple(outputs), tuple(cotangents), keep_graph, create_graph, (), allow_unreachable)


class _InputTap(ms._Function):
    """Identity in front of an input, whose gradient it puts aside.

    The engine would add it to the leaf's `_grad`, but where two leaves share a gradient (a + b) it makes a copy by a
    kernel that the CPU lacks ("The kernel Clone unregistered").
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradients: list[Tensor | None], place: int) -> Tensor:
        ctx.gradients, ctx.place = gradients, place
        return ops.stop_gradient(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients[ctx.place] = gradient
        return None, None, None


class _Tap(ms._Function):
    """Identity in front of a parameter: its backward runs once per tape, with the complete gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parameter: Parameter, arrivals: Arrivals) -> Tensor:
        ctx.parameter, ctx.arrivals = parameter, arrivals
        return ops.stop_gradient(tensor)  # over the same storage; returning `tensor` itself would copy it

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        parameter = ctx.parameter
        wide = gradient if gradient.dtype == ms.float32 else ops.cast(gradient, ms.float32)
        if parameter.main_grad is None:
            # A copy, as the engine may hand the same tensor to several receivers.
            parameter.main_grad = wide.copy() if wide is gradient else wide
        else:
            ops.assign_add(parameter.main_grad, wide)
        ctx.arrivals.add(parameter)
        return None, None, None


class _Custom(ms._Function):
    """A function with a hand-written gradient; residual tensors are kept the way the engine can free them."""

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, needs: tuple[bool, ...], *tensors: Tensor) -> Any:
        outputs, residuals = forward(needs, *tensors)
        ctx.save_for_backward(*(r for r in residuals if isinstance(r, ms.Tensor)))
        ctx.rest = tuple(_SAVED if isinstance(r, ms.Tensor) else r for r in residuals)
        ctx.pull, ctx.needs = backward, needs
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        residuals = tuple(next(saved) if rest is _SAVED else rest for rest in ctx.rest)
        return (None, None, None, *ctx.pull(ctx.needs, residuals, *cotangents))


_SAVED = object()  # stands where a residual is among the saved tensors


def check_engine() -> None:
    """Two tapes in flight, pulled back in the order they were made; raises BackendError if that fails."""
    try:
        leaf = ms.Tensor(np.array([3.0], np.float32))
        leaf._requires_grad = True
        first, second = leaf * 2.0, leaf * leaf
        _pull([first], [ops.ones_like(first)])
        _pull([second], [ops.ones_like(second)])
        found = float(leaf._grad.asnumpy()[0])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise BackendError(f"duetvl needs mindspore>=2.9,<2.11; {ms.__version__} failed: {error}") from None
    if found != 8.0:
        raise BackendError(f"duetvl needs mindspore>=2.9,<2.11; {ms.__version__} gave gradient {found}, not 8")
