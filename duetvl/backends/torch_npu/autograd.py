"""Differentiation by torch's own engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from duetvl.core.autograd import Arrivals, Backward, Forward, Leaves
from duetvl.core.params import Parameter

Tensor = torch.Tensor


@dataclass(eq=False)
class Tape:
    """What one stage recorded, and where its gradients go while it is pulled back."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    trainable: tuple[Parameter, ...]
    arrivals: Arrivals = field(default_factory=Arrivals)


class TorchAutograd:
    """See core/autograd.py."""

    def run_stage(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Parameter],
        needs: Sequence[bool] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tape]:
        wanted = needs or [True] * len(inputs)
        taken = tuple(x.detach().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True))
        tape = Tape(taken, (), tuple(p for p in parameters if p.trainable))
        leaves = Leaves(parameters, partial(_tap, arrivals=tape.arrivals))
        with torch.enable_grad():
            outputs = fn(leaves, *taken)
        tape.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(x.detach() for x in tape.outputs), tape

    def backward(
        self,
        tape: Tape,
        cotangents: Sequence[Tensor | None],
        *,
        last: bool = True,
        on_ready: Callable[[Parameter], None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        tape.arrivals.on_ready = on_ready if last else None
        pulled = [(y, d) for y, d in zip(tape.outputs, cotangents, strict=True) if d is not None and y.requires_grad]
        tape.outputs = ()  # a tape is pulled back once; what it recorded is freed on the way
        if pulled:
            torch.autograd.backward(_Root.apply([d for _, d in pulled], *(y for y, _ in pulled)))
        if last:
            tape.arrivals.finish(tape.trainable)
        return tuple(x.grad for x in tape.inputs)

    def value_and_grad(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            value = fn(*leaves)
        if not value.requires_grad:
            return value, tuple(torch.zeros_like(x) for x in leaves)
        return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)

    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            recording = torch.is_grad_enabled()
            needs = tuple(recording and x.requires_grad for x in tensors)
            if not any(needs):
                with torch.no_grad():
                    return forward(needs, *tensors)[0]
            return _Custom.apply(forward, backward, needs, *tensors)

        return call

    def checkpoint(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        return checkpoint(fn, *tensors, use_reentrant=False, preserve_rng_state=False)

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()

    def no_grad(self) -> AbstractContextManager[None]:
        return torch.no_grad()


def _tap(parameter: Parameter, arrivals: Arrivals) -> Tensor:
    """A leaf over a parameter's storage: once per tape its complete gradient goes to main_grad.

    A leaf, and not a function in front of one: the engine runs what was recorded first last, and all gradients would
    wait beside the main gradients for the end of the backward pass. A leaf receives its own as soon as it is complete.
    """
    leaf = parameter.tensor.detach().requires_grad_()

    def receive(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is None:
            return
        if parameter.main_grad is None:
            parameter.main_grad = gradient.float()  # the leaf's own: the engine copies what others receive too
        else:
            parameter.main_grad.add_(gradient)
        arrivals.add(parameter)

    leaf.register_post_accumulate_grad_hook(receive)
    return leaf


class _Root(torch.autograd.Function):
    """A number whose gradient hands on these cotangents: the engine begins at it.

    Given cotangents, torch compares their shapes with the outputs' by its symbolic shapes, and the first time imports
    sympy for that: a second of every process.
    """

    @staticmethod
    def forward(ctx: Any, cotangents: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.cotangents = cotangents
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.cotangents)


class _Custom(torch.autograd.Function):
    """A function with a hand-written gradient; residual tensors are kept the way the engine can free them."""

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, needs: tuple[bool, ...], *tensors: Tensor) -> Any:
        outputs, residuals = forward(needs, *tensors)
        ctx.save_for_backward(*(r if isinstance(r, torch.Tensor) else None for r in residuals))
        ctx.rest = tuple(None if isinstance(r, torch.Tensor) else r for r in residuals)
        ctx.pull, ctx.needs = backward, needs
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        residuals = tuple(
            rest if saved is None else saved for saved, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)
        )
        gradients = ctx.pull(ctx.needs, residuals, *cotangents)
        return (None, None, None, *gradients)
