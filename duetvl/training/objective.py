"""What is minimised: the seam between a step and the kinds of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from duetvl.core.batch import IGNORE, Batch
from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.models import vocabulary
from duetvl.models.layout import EVERY_TOKEN, Trained

Tensor = Any
# Batches -> a reference's log-probabilities (S,) of the whole answers of each, float32; nothing on a rank that has not
# the last stage of its model.
Reference = Callable[[Sequence[Batch]], Sequence[Tensor]]


class Objective(Protocol):
    """A loss over micro-batches. The loss of a step is the sum of its micro-batches' losses over that of their weights.

    The division happens once a step, in the optimizer: neither the split of a step into micro-batches nor their
    distribution over processes needs to be known here. An objective has two halves: what is prepared of a micro-batch
    on the host, and the function of the model's last rows; who runs the model is not its business.
    """

    unit: str  # what weights count, for the log: tokens, pairs
    logged: tuple[str, ...]  # names of the values beside the loss
    needs_reference: bool  # whether `prepare` wants the log-probabilities of a reference
    adds_up: bool  # whether ranks with some trained tokens each have parts of loss and values, or all have the sums

    def weight(self, batch: Batch) -> float:
        """What the micro-batch adds to the divisor: its trained tokens, samples, pairs. 0: it is not run at all."""
        ...

    def prepare(self, batch: Batch, reference: Tensor | None = None, trained: Trained = EVERY_TOKEN) -> Any:
        """What `loss` needs to know of the micro-batch, on the device; `reference` (S,) float32 of whole answers.

        trained: which of the micro-batch's trained tokens the model gives to `loss`.
        """
        ...

    def loss(self, hidden: Tensor, w: Weights, prepared: Any) -> tuple[Tensor, ...]:
        """The micro-batch's loss, then its values in the order of `logged`: 0-d float32 sums of as many terms as
        `weight` says.

        hidden (N, D): the rows behind the final norm of those trained tokens, in the order of `batch.targets`;
        w: the leaf record of the vocabulary's matrix (models/vocabulary.py).
        """
        ...


@dataclass(frozen=True, eq=False)
class Targets:
    """The tokens (N,) that are trained. The loss of each counts `weights` (N,) float32, or 1, times `scale`."""

    labels: Tensor
    weights: Tensor | None
    scale: float

    @classmethod
    def of(cls, ops: Ops, batch: Batch, weights: np.ndarray | None = None, trained: Trained = EVERY_TOKEN) -> Targets:
        """Those of a batch, or some; `weights` float32 of all of them in the order of `batch.targets`."""
        labels = ops.from_numpy(batch.targets[batch.targets != IGNORE][trained.here])
        if weights is None:
            return cls(labels, None, 1.0)
        # The largest weight is taken out, to be applied in float32: the gradients of logits may be float16 numbers.
        scale = float(np.max(weights, initial=0.0))
        relative = None if (weights == scale).all() else ops.from_numpy((weights / np.float32(scale))[trained.here])
        return cls(labels, relative, scale)


LossMode = Literal["token", "micro_batch", "sample"]


class TokenLoss:
    """Cross-entropy of the trained tokens: an `Objective`.

    With l the loss of a trained token, the loss of a step is, by `mode`,
    token: the sum of l over the whole step, divided by the number of its trained tokens;
    micro_batch: the mean over micro-batches of the mean of l in each, as transformers' accumulation has it;
    sample: the mean over samples of the mean of l in each, whatever pack they lie in.
    A micro-batch or sample without a trained token has no mean and does not count.
    """

    logged: tuple[str, ...] = ()
    needs_reference = False
    adds_up = True

    def __init__(self, ops: Ops, mode: LossMode = "token"):
        self.ops, self.mode = ops, mode
        self.unit = {"token": "tokens", "micro_batch": "micro-batches", "sample": "samples"}[mode]

    def weight(self, batch: Batch) -> float:
        """Trained tokens, 1 for a micro-batch with any, or samples with any."""
        if self.mode == "sample":
            return len(np.unique(trained_samples(batch)))
        return batch.trained_tokens if self.mode == "token" else min(1, batch.trained_tokens)

    def prepare(self, batch: Batch, reference: Tensor | None = None, trained: Trained = EVERY_TOKEN) -> Targets:
        """Labels and weights."""
        return Targets.of(self.ops, batch, token_weights(batch, self.mode), trained)

    def loss(self, hidden: Tensor, w: Weights, prepared: Targets) -> tuple[Tensor]:
        """The sum of the means, or of the tokens' losses."""
        total = vocabulary.cross_entropy(self.ops, w, hidden, prepared.labels, prepared.weights)
        return (total * prepared.scale,)


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
