"""What is minimised: the seam between a step and the kinds of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from duetvl.core.autograd import Tape
from duetvl.core.batch import Batch

Tensor = Any
Key = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Forward:
    """One micro-batch, run forward.

    `loss` is a 0-d float32 tensor: a sum, of as many terms as the objective's `weight` says. `values` are 0-d float32
    sums of the same terms to be logged, by name. `tape` has the loss and then the values, in their order, as outputs.
    """

    loss: Tensor
    tape: Tape
    values: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The sums of a `Forward`, without a tape."""

    loss: Tensor
    values: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over micro-batches. The loss of a step is the sum of its micro-batches' losses over that of their weights.

    The division happens once a step, in the optimizer: neither the split of a step into micro-batches nor their
    distribution over processes needs to be known here.
    """

    def forward(self, batch: Batch, key: Key = ()) -> Forward:
        """Run the micro-batch and record it. `key` names its random numbers (dropout): seed, step, micro-batch."""
        ...

    def evaluate(self, batch: Batch) -> Evaluated:
        """The same without a tape and without dropout."""
        ...

    def weight(self, batch: Batch) -> float:
        """What the micro-batch adds to the divisor: its trained tokens, samples, pairs. 0: it is not run at all."""
        ...


class TokenModel(Protocol):
    """What the losses over tokens need of a model."""

    def forward_loss(self, batch: Batch, *, key: Key = ()) -> tuple[Tensor, Tape]:
        """Sum of the losses of all trained tokens, a float32 0-d tensor, and the tape that leads back from it."""
        ...

    def eval_loss(self, batch: Batch) -> Tensor:
        """The same sum, without a tape."""
        ...


class TokenLoss:
    """Cross-entropy of the trained tokens: an `Objective`."""

    def __init__(self, model: TokenModel):
        self.model = model

    def forward(self, batch: Batch, key: Key = ()) -> Forward:
        """The sum over trained tokens."""
        return Forward(*self.model.forward_loss(batch, key=key))

    def evaluate(self, batch: Batch) -> Evaluated:
        """The same, without a tape."""
        return Evaluated(self.model.eval_loss(batch))

    def weight(self, batch: Batch) -> float:
        """The number of trained tokens."""
        return batch.trained_tokens
