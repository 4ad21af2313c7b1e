"""Protocol of differentiation. Nothing above the seam knows of `.backward`, `.grad` or `.detach`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from duetvl.core.errors import DuetvlError
from duetvl.core.params import Parameter

Tensor = Any
Tape = Any
Forward = Callable[..., tuple[Any, tuple[Any, ...]]]
Backward = Callable[..., tuple[Any, ...]]


class Autograd(Protocol):
    """Several tapes may be in flight, and are pulled back once each, in any order, from the thread that made them."""

    def run_stage(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[Tensor],
        parameters: Sequence[Parameter],
        needs: Sequence[bool] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tape]:
        """Run `fn(leaves, *inputs)` and record it; `leaves` gives the tensor of a parameter by its path (`Leaves`).

        `fn` returns a tensor or a tuple of tensors; the outputs come back as a tuple. Trainable parameters are
        differentiated, and the inputs that `needs` says so of (by default: all); frozen parameters and tensors that
        `fn` closes over are not, and nothing is recorded before the first tensor that is.
        """
        ...

    def backward(
        self,
        tape: Tape,
        cotangents: Sequence[Tensor | None],
        *,
        last: bool = True,
        on_ready: Callable[[Parameter], None] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Pull the cotangents of a stage's outputs back and return the gradients of its inputs.

        A cotangent of None counts as zero; an input that no output depends on, or that needs none, has gradient None.
        The complete
        gradient of each trainable parameter is cast to float32 and added to its `main_grad`, once per tape,
        whatever the number of its uses and recomputation. With `last` (the step's last micro-batch), `on_ready`
        is called exactly once for each trainable parameter, as soon as its gradient is final; those that this tape
        does not reach come at the end (the `main_grad` of a conditional one may be None). A trainable parameter
        that has received no gradient since `main_grad` was None raises MissingGradient, unless it is conditional.
        """
        ...

    def value_and_grad(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`fn(*inputs)`, a 0-d tensor, and its gradient with respect to every input."""
        ...

    def custom_vjp(self, forward: Forward, backward: Backward) -> Callable[..., Any]:
        """A differentiable function with a gradient of its own.

        `forward(needs, *tensors) -> (outputs, residuals)` runs unrecorded: `needs[i]` says whether tensor i is
        differentiated (all False where nothing is recorded), `outputs` is a tensor or a tuple of them, `residuals`
        a tuple of anything. `backward(needs, residuals, *cotangents)` returns one gradient per tensor, None where
        there is none. The function made takes tensors only, positionally: close over everything else.
        """
        ...

    def checkpoint(self, fn: Callable[..., Any], *tensors: Tensor) -> Any:
        """`fn(*tensors)`, keeping only the tensors: `fn` runs again when it is pulled back. `fn` may close over
        parameters of the stage; their gradients still arrive once and complete."""
        ...

    def stop_gradient(self, x: Tensor) -> Tensor:
        """`x` as a constant."""
        ...

    def no_grad(self) -> AbstractContextManager[None]:
        """Nothing is recorded inside."""
        ...


class Leaves(Mapping[str, Tensor]):
    """The parameters of a stage by path. A trainable one is tapped when it is first looked up.

    An engine pulls back in the reverse order of recording. So a parameter that is looked up just before the block that
    uses it gives its gradient as soon as that block is pulled back, and no second set of gradients waits for the end
    of the backward pass. Look up outside of `checkpoint`, whose function runs twice.
    """

    def __init__(self, parameters: Iterable[Parameter], tap: Callable[[Parameter], Tensor]):
        self._parameters = {parameter.path: parameter for parameter in parameters}
        self._tap = tap
        self._taken: dict[str, Tensor] = {}

    def __getitem__(self, path: str) -> Tensor:
        if path not in self._taken:
            parameter = self._parameters[path]
            self._taken[path] = self._tap(parameter) if parameter.trainable else parameter.tensor
        return self._taken[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@dataclass(eq=False)
class Arrivals:
    """Which parameters of a tape have their gradient, while it is pulled back, and who wants to know.

    The recorded graph refers to this and not to the tape, which refers to the graph: no cycle, so that a tape which
    is dropped frees its memory at once.
    """

    on_ready: Callable[[Parameter], None] | None = None
    reached: set[str] = field(default_factory=set)

    def add(self, parameter: Parameter) -> None:
        """The parameter's main_grad is complete as far as this tape goes."""
        self.reached.add(parameter.path)
        if self.on_ready is not None:
            self.on_ready(parameter)

    def finish(self, parameters: Sequence[Parameter]) -> None:
        """The step's last tape is through: complain of what is missing, announce what it did not reach."""
        check_all_received(parameters, self.reached)
        for parameter in parameters:
            if parameter.path not in self.reached:
                self.add(parameter)


class MissingGradient(DuetvlError):
    """A trainable parameter took no part in a step that should have trained it."""


def check_all_received(parameters: Sequence[Parameter], reached: Collection[str] = ()) -> None:
    """Raise MissingGradient naming the parameters that should have a gradient and do not.

    The gradients of those that have just been `reached` may already be on their way to other ranks.
    """
    missing = [p.path for p in parameters if p.main_grad is None and not p.conditional and p.path not in reached]
    if missing:
        raise MissingGradient(
            f"no gradient reached {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} "
            f"({len(missing)} of {len(parameters)} trainable parameters); freeze what the loss does not use"
        )
