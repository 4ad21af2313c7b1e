"""One optimizer step, and one evaluation: pieces that a loop of one's own can use as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import DuetvlError
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.core.patterns import Parts
from duetvl.data.loader import Step
from duetvl.training.groups import parameter_groups
from duetvl.training.objective import Objective
from duetvl.training.sections import OptimSection

Tensor = Any


class TrainableModel(Protocol):
    """What training needs of a model."""

    parameters: dict[str, Parameter]
    parts: Parts

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples end to end; numpy only, as it runs in the data thread."""
        ...


class NonFiniteError(DuetvlError):
    """A loss or a gradient is not a finite number. The weights are as they were before the step."""


class StepGivenUp(Exception):
    """`Trainer.give_up` said so between two micro-batches. The weights are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """`loss` and `values` are the objective's means, `grad_norm` the norm of the loss' gradient before clipping."""

    loss: float
    grad_norm: float
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The objective's means over the batches, and their trained tokens. Without any, the loss is nan."""

    loss: float
    tokens: int
    values: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """A model, an objective, the optimizer's state, and the update that a step makes."""

    def __init__(
        self, model: TrainableModel, objective: Objective, backend: Backend, optim: OptimSection, *, seed: int = 0
    ):
        """The optimizer starts with zero moments. `seed` is that of the random numbers inside the model."""
        self.model, self.objective, self.seed = model, objective, seed
        self.backend = backend
        self.optim = optim
        self.groups = parameter_groups(model.parameters, optim, model.parts)
        self.trained = [p for group in self.groups for p in group.parameters]
        self.state: AdamWState = backend.optimizer.create(self.groups)
        self.give_up: Callable[[], bool] = lambda: False  # asked before every micro-batch

    def step(self, work: Step, lr: float, number: int = 0) -> StepResult | None:
        """Forward, backward and update. None, and no update, where nothing in the step is trained.

        `number` is that of the step in its run, and with the seed names its random numbers. Losses and gradients are
        summed; the division by the weights of the whole step happens once, in the optimizer, which makes the result
        independent of the split into micro-batches as far as the weights are.
        """
        batches = [batch for batch in work.batches if self.objective.weight(batch)]
        if not batches:
            return None
        sums, values = self._accumulate(batches, number)
        weight = sum(self.objective.weight(batch) for batch in batches)
        norm = self.backend.optimizer.grad_norm(self.trained) / weight
        self._check_finite(sums, norm, batches)
        clip = self.optim.clip
        shrink = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0  # the 1e-6 is torch's and Megatron's
        self.backend.optimizer.step(
            self.state,
            self.groups,
            lr=lr,
            betas=self.optim.betas,
            eps=self.optim.eps,
            grad_scale=shrink / weight,
        )
        return StepResult(sum(sums) / weight, norm, self._means(values, weight))

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The objective's means over the batches."""
        total, weight, tokens = 0.0, 0.0, 0
        values: list[Mapping[str, Tensor]] = []
        for batch in batches:
            if part := self.objective.weight(batch):
                found = self.objective.evaluate(batch)
                total += self._number(found.loss)
                values.append(found.values)
                weight, tokens = weight + part, tokens + batch.trained_tokens
        return Evaluation(total / weight if weight else math.nan, tokens, self._means(values, weight))

    def _accumulate(self, batches: Sequence[Batch], number: int) -> tuple[list[float], list[Mapping[str, Tensor]]]:
        """Gradients of all micro-batches into the main gradients; the loss sum and the values of each."""
        one = self.backend.ops.from_numpy(np.ones((), np.float32))
        losses, values = [], []
        for index, batch in enumerate(batches):
            if self.give_up():
                self._drop_gradients()
                raise StepGivenUp
            found = self.objective.forward(batch, (self.seed, number, index))
            cotangents = [one, *[None] * len(found.values)]
            self.backend.autograd.backward(found.tape, cotangents, last=index == len(batches) - 1)
            losses.append(found.loss)
            values.append(found.values)
        return [self._number(loss) for loss in losses], values  # read at the end: the device need not wait in between

    def _means(self, values: Sequence[Mapping[str, Tensor]], weight: float) -> dict[str, float]:
        """Sums over micro-batches, divided by the weight of them all."""
        totals: dict[str, float] = {}
        for name, value in (item for one in values for item in one.items()):
            totals[name] = totals.get(name, 0.0) + self._number(value)
        return {name: total / weight for name, total in totals.items()}

    def _check_finite(self, sums: Sequence[float], norm: float, batches: Sequence[Batch]) -> None:
        if all(map(math.isfinite, (*sums, norm))):
            return
        self._drop_gradients()
        broken = [batch for batch, loss in zip(batches, sums, strict=True) if not math.isfinite(loss)]
        what = "the loss" if broken else "the gradient"
        ids = [name for batch in broken or batches for name in batch.sample_ids]
        raise NonFiniteError(f"{what} is not finite; samples of the step: {', '.join(ids)}")

    def _drop_gradients(self) -> None:
        for p in self.trained:
            p.main_grad = None

    def _number(self, scalar: Tensor) -> float:
        return float(self.backend.to_numpy(scalar))
