"""What is minimised: the seam between a step and the kinds of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.batch import IGNORE, Batch

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

    unit: str  # what weights count, for whoever reads: tokens, pairs

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
    """What the losses over tokens need of a model.

    `weights` (N,) float32 belong to the trained positions of `batch.targets`, in their order; None: all are 1.
    """

    def forward_loss(self, batch: Batch, *, weights: np.ndarray | None = None, key: Key = ()) -> tuple[Tensor, Tape]:
        """Weighted sum of the losses of all trained tokens, float32 and 0-d, and the tape that leads back from it."""
        ...

    def eval_loss(self, batch: Batch, *, weights: np.ndarray | None = None) -> Tensor:
        """The same sum, without a tape."""
        ...


LossMode = Literal["token", "micro_batch", "sample"]


class TokenLoss:
    """Cross-entropy of the trained tokens: an `Objective`.

    With l the loss of a trained token, the loss of a step is, by `mode`,
    token: the sum of l over the whole step, divided by the number of its trained tokens;
    micro_batch: the mean over micro-batches of the mean of l in each, as transformers' accumulation has it;
    sample: the mean over samples of the mean of l in each, whatever pack they lie in.
    A micro-batch or sample without a trained token has no mean and does not count.
    """

    def __init__(self, model: TokenModel, mode: LossMode = "token"):
        self.model, self.mode = model, mode
        self.unit = {"token": "tokens", "micro_batch": "micro-batches", "sample": "samples"}[mode]

    def forward(self, batch: Batch, key: Key = ()) -> Forward:
        """The sum of the means, or of the tokens' losses."""
        return Forward(*self.model.forward_loss(batch, weights=token_weights(batch, self.mode), key=key))

    def evaluate(self, batch: Batch) -> Evaluated:
        """The same, without a tape."""
        return Evaluated(self.model.eval_loss(batch, weights=token_weights(batch, self.mode)))

    def weight(self, batch: Batch) -> float:
        """Trained tokens, 1 for a micro-batch with any, or samples with any."""
        if self.mode == "sample":
            return len(np.unique(trained_samples(batch)))
        return batch.trained_tokens if self.mode == "token" else min(1, batch.trained_tokens)


def trained_samples(batch: Batch) -> np.ndarray:
    """Which sample of the batch each trained position belongs to, (N,) integers from 0."""
    rows = np.flatnonzero(batch.targets != IGNORE)
    return np.searchsorted(batch.cu_seqlens, rows, side="right") - 1


def token_weights(batch: Batch, mode: LossMode) -> np.ndarray | None:
    """What the loss of each trained token is multiplied by, (N,) float32; None: nothing."""
    if mode == "token":
        return None
    samples = trained_samples(batch)
    group = samples if mode == "sample" else np.zeros_like(samples)
    return (1.0 / np.bincount(group)[group]).astype(np.float32)
