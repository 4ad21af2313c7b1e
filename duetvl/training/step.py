"""One optimizer step, and one evaluation: pieces that a loop of one's own can use as well."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import DuetvlError
from duetvl.core.optimizer import AdamWState, Group
from duetvl.core.params import Parameter
from duetvl.data.loader import Step
from duetvl.training.sections import OptimSection

Tensor = Any


class TrainableModel(Protocol):
    """What training needs of a model."""

    parameters: dict[str, Parameter]

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples end to end; numpy only, as it runs in the data thread."""
        ...

    def forward_loss(self, batch: Batch) -> tuple[Tensor, Tape]:
        """Sum of the losses of all trained tokens, a float32 0-d tensor, and the tape that leads back from it."""
        ...

    def eval_loss(self, batch: Batch) -> Tensor:
        """The same sum, without a tape."""
        ...


class NonFiniteError(DuetvlError):
    """A loss or a gradient is not a finite number. The weights are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over trained tokens, `grad_norm` the norm of its gradient before clipping."""

    loss: float
    grad_norm: float


class Trainer:
    """A model, its optimizer state, and the update that a step makes."""

    def __init__(self, model: TrainableModel, backend: Backend, optim: OptimSection):
        """The optimizer starts with zero moments."""
        self.model = model
        self.backend = backend
        self.optim = optim
        self.groups = decay_groups(model.parameters, optim.weight_decay)
        self.trained = [p for group in self.groups for p in group.parameters]
        self.state: AdamWState = backend.optimizer.create(self.groups)

    def step(self, work: Step, lr: float) -> StepResult | None:
        """Forward, backward and update. None, and no update, where the step has no trained token.

        Losses are summed over tokens; the division by their number in the whole step happens once, in the
        optimizer, which makes the result independent of the split into micro-batches.
        """
        batches = [batch for batch in work.batches if batch.trained_tokens]
        if not batches:
            return None
        sums = self._accumulate(batches)
        tokens = work.trained_tokens
        norm = self.backend.optimizer.grad_norm(self.trained) / tokens
        self._check_finite(sums, norm, batches)
        clip = self.optim.clip
        shrink = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0  # the 1e-6 is torch's and Megatron's
        self.backend.optimizer.step(
            self.state,
            self.groups,
            lr=lr,
            betas=self.optim.betas,
            eps=self.optim.eps,
            grad_scale=shrink / tokens,
        )
        return StepResult(sum(sums) / tokens, norm)

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """Mean loss over all trained tokens of the batches, and their number."""
        total, tokens = 0.0, 0
        for batch in batches:
            if batch.trained_tokens:
                total += self._number(self.model.eval_loss(batch))
                tokens += batch.trained_tokens
        return (total / tokens if tokens else math.nan), tokens

    def _accumulate(self, batches: Sequence[Batch]) -> list[float]:
        """Gradients of all micro-batches into the main gradients; the loss sum of each."""
        one = self.backend.ops.from_numpy(np.ones((), np.float32))
        losses = []
        for index, batch in enumerate(batches):
            loss, tape = self.model.forward_loss(batch)
            self.backend.autograd.backward(tape, [one], last=index == len(batches) - 1)
            losses.append(loss)
        return [self._number(loss) for loss in losses]  # read at the end: the device need not wait in between

    def _check_finite(self, sums: Sequence[float], norm: float, batches: Sequence[Batch]) -> None:
        if all(map(math.isfinite, (*sums, norm))):
            return
        for p in self.trained:
            p.main_grad = None
        broken = [batch for batch, loss in zip(batches, sums, strict=True) if not math.isfinite(loss)]
        what = "the loss" if broken else "the gradient"
        ids = [name for batch in broken or batches for name in batch.sample_ids]
        raise NonFiniteError(f"{what} is not finite; samples of the step: {', '.join(ids)}")

    def _number(self, scalar: Tensor) -> float:
        return float(self.backend.to_numpy(scalar))


def decay_groups(parameters: Mapping[str, Parameter], weight_decay: float) -> list[Group]:
    """Trainable parameters: matrices decay, what has one axis (norms and biases) does not."""
    trainable = [p for p in parameters.values() if p.trainable]
    matrices = [p for p in trainable if len(p.shape) > 1]
    vectors = [p for p in trainable if len(p.shape) <= 1]
    return [Group(matrices, weight_decay=weight_decay), Group(vectors)]
