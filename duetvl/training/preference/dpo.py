"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290): losses of pairs of answers.

A batch holds pairs, each two sequences, the chosen one first. With log-probabilities of whole answers under the
policy and under the reference, the gap of a pair is how much more the policy prefers the chosen answer than the
reference does: gap = (policy - reference) of the chosen answer, less the same of the rejected one.

    sigmoid   -(1 - e) log sigmoid(beta gap) - e log sigmoid(-beta gap), e the label smoothing
    hinge     max(0, 1 - beta gap)                             (SLiC, arXiv:2305.10425, with a reference)
    ipo_sum   (gap - 1 / (2 beta))^2                           (arXiv:2310.12036)
    ipo       the same of means over an answer's tokens        (as TRL and LLaMA-Factory compute it)

S sequences, B = S / 2 pairs, N trained tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch
from duetvl.core.ops import Ops
from duetvl.core.params import Weights
from duetvl.models import vocabulary
from duetvl.models.layout import EVERY_TOKEN, Trained
from duetvl.models.vocabulary import LastStage
from duetvl.parallel.passes import MicroBatch, Passes
from duetvl.training.objective import Reference, trained_samples
from duetvl.training.recipe.sections import DpoSection

Tensor = Any


LOGGED: Final = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True, eq=False)
class PreparedPairs:
    """A batch of pairs, its trained tokens as far as they are here, with their labels, and the reference's
    log-probabilities (S,)."""

    batch: Batch
    trained: Trained
    labels: Tensor
    reference: Tensor


class PreferenceObjective:
    """DPO against a reference: an `Objective`. A step's loss is the mean over its pairs.

    Nothing random happens inside the model, so that policy and reference can be compared: recipes with both `dpo`
    and dropout are refused.
    """

    unit = "pairs"
    logged: tuple[str, ...] = LOGGED
    needs_reference = True
    adds_up = False  # each rank needs an answer's whole log-probability, and so has all of the loss

    def __init__(self, settings: DpoSection, backend: Backend):
        self.ops = backend.ops
        self.answer_loss = PreferenceLoss(settings, backend)

    def weight(self, batch: Batch) -> float:
        """The number of pairs."""
        return pairs(batch)

    def prepare(self, batch: Batch, reference: Tensor | None = None, trained: Trained = EVERY_TOKEN) -> PreparedPairs:
        """Labels, beside what the reference says."""
        assert reference is not None
        labels = self.ops.from_numpy(batch.targets[batch.targets != IGNORE][trained.here])
        return PreparedPairs(batch, trained, labels, reference)

    def loss(self, hidden: Tensor, w: Weights, prepared: PreparedPairs) -> tuple[Tensor, ...]:
        """The sums over pairs."""
        logprobs = vocabulary.logprobs(self.ops, w, hidden, prepared.labels)
        loss, values = self.answer_loss(prepared.batch, logprobs, prepared.reference, prepared.trained)
        return loss, *(values[name] for name in LOGGED)


def reference_of(passes: Passes, ops: Ops) -> Reference:
    """A model as a reference, by the way in which this rank runs it."""

    def last(batch: Batch, trained: Trained) -> LastStage:
        labels = ops.from_numpy(batch.targets[batch.targets != IGNORE][trained.here])
        return lambda hidden, w: (answer_sums(ops, batch, vocabulary.logprobs(ops, w, hidden, labels), trained),)

    def sums(batches: Sequence[Batch]) -> list[Tensor]:
        return [found for (found,) in passes.evaluate([MicroBatch(batch, partial(last, batch)) for batch in batches])]

    return sums


def pairs(batch: Batch) -> int:
    """Pairs in a batch of pairs."""
    return (len(batch.cu_seqlens) - 1) // 2


def trained_counts(batch: Batch) -> np.ndarray:
    """Trained tokens of each sequence (S,) int64."""
    return np.bincount(trained_samples(batch), minlength=len(batch.cu_seqlens) - 1)


def answer_sums(ops: Ops, batch: Batch, logprobs: Tensor, trained: Trained = EVERY_TOKEN) -> Tensor:
    """Log-probability (S,) of each sequence's trained tokens together, from those (N,) of the tokens that are here."""
    owned = trained_samples(batch)[trained.here] == np.arange(len(batch.cu_seqlens) - 1)[:, None]
    return trained.sum(ops.sum(ops.from_numpy(owned.astype(np.float32)) * logprobs[None, :], 1))


# -- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of pairs as a function of their answers' log-probabilities, and what is logged beside it."""

    settings: DpoSection
    backend: Backend

    def __call__(
        self, batch: Batch, logprobs: Tensor, reference: Tensor, trained: Trained = EVERY_TOKEN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the pairs' losses, a float32 0-d tensor, and sums over the pairs of what TRL logs, by its names.

        logprobs (N,) of the trained tokens that are here, under the policy; reference (S,) of whole answers.
        """
        ops = self.backend.ops
        policy = answer_sums(ops, batch, logprobs, trained)
        per_token = ops.from_numpy((1.0 / np.maximum(trained_counts(batch), 1)).astype(np.float32))
        means = policy * per_token
        if self.settings.loss == "ipo":
            policy, reference = means, reference * per_token
        ratios = policy - reference
        chosen, rejected = _by_answer(ops, ratios)
        losses = _LOSSES[self.settings.loss](ops, chosen - rejected, self.settings)
        if self.settings.pref_ftx:
            losses = losses - _by_answer(ops, means)[0] * self.settings.pref_ftx
        return ops.sum(losses), self._logged(policy, ratios)

    def _logged(self, policy: Tensor, ratios: Tensor) -> dict[str, Tensor]:
        ops, constant = self.backend.ops, self.backend.autograd.stop_gradient
        chosen, rejected = _by_answer(ops, constant(ratios) * self.settings.beta)
        logps = _by_answer(ops, constant(policy))
        found = (chosen, rejected, chosen - rejected, ops.cast(chosen > rejected, "float32"), *logps)
        return {name: ops.sum(values) for name, values in zip(LOGGED, found, strict=True)}


def softplus(ops: Ops, x: Tensor) -> Tensor:
    """log(1 + exp(x)) of any float32 x without overflow: -log sigmoid(-x). Its gradient at 0 is 1/2."""
    positive = x > 0.0
    return ops.where(positive, x, ops.zeros(x.shape)) + ops.log(ops.exp(-ops.where(positive, x, -x)) + 1.0)


def _sigmoid(ops: Ops, gap: Tensor, settings: DpoSection) -> Tensor:
    scaled, smoothing = gap * settings.beta, settings.label_smoothing
    losses = softplus(ops, -scaled)
    return losses if not smoothing else losses * (1.0 - smoothing) + softplus(ops, scaled) * smoothing


def _hinge(ops: Ops, gap: Tensor, settings: DpoSection) -> Tensor:
    short = 1.0 - gap * settings.beta
    return ops.where(short > 0.0, short, ops.zeros(short.shape))


def _squared(ops: Ops, gap: Tensor, settings: DpoSection) -> Tensor:
    off = gap - 0.5 / settings.beta
    return off * off


_LOSSES: Final[Mapping[str, Callable[[Ops, Tensor, DpoSection], Tensor]]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _squared,
    "ipo_sum": _squared,
}


def _by_answer(ops: Ops, x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of all sequences (S,) as those of the chosen answers (B,) and of the rejected ones (B,)."""
    by_pair = ops.reshape(x, (-1, 2))
    return by_pair[:, 0], by_pair[:, 1]
