"""One optimizer step, and one evaluation: pieces that a loop of one's own can use as well."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import Batch, Sample
from duetvl.core.errors import DuetvlError
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.core.patterns import Parts
from duetvl.core.ranks import Ranks
from duetvl.data.loading.loader import Step
from duetvl.models.layout import Trained
from duetvl.models.vocabulary import LastStage
from duetvl.parallel.division import ALONE, Division
from duetvl.parallel.inventory import inventory
from duetvl.parallel.passes import MicroBatch, Outputs
from duetvl.parallel.pipeline import passes_of
from duetvl.parallel.zero import Zero
from duetvl.training.groups import parameter_groups
from duetvl.training.objective import Objective, Reference
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.scaling import START, WINDOW, LossScale

Tensor = Any


class TrainableModel(Protocol):
    """What training needs of a model."""

    parameters: dict[str, Parameter]
    parts: Parts

    def pack(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples end to end; numpy only, as it runs in the data thread."""
        ...

    def forward(self, batch: Batch, last: LastStage, *, key: tuple[int, ...] = ()) -> tuple[tuple[Tensor, ...], Tape]:
        """What `last` makes of the batch's trained rows, and the tape that leads back to the parameters.

        `key` names the random numbers of the pass (dropout): seed, step, pack. Without one there is none.
        """
        ...

    def evaluate(self, batch: Batch, last: LastStage) -> tuple[Tensor, ...]:
        """The same without a tape and without dropout."""
        ...

    def trained(self, batch: Batch) -> Trained:
        """Which of the batch's trained tokens these give to `last` on this rank."""
        ...


class NonFiniteError(DuetvlError):
    """A loss or a gradient is not a finite number. The weights are as they were before the step."""

    agreed = True  # all ranks raise it together


class StepGivenUp(Exception):
    """`Trainer.give_up` said so between two micro-batches. The weights are as they were before the step."""


@dataclass(frozen=True)
class Outlook:
    """What is known before a step: by one rank of itself, or by all of all of them.

    weight: what the packs add to the divisor of the loss. pictures: whether any of these packs has one. stops: whether
    the run is to end before this step. late: whether it is time to save, by the clock of rank 0.
    """

    weight: float = 0.0
    pictures: bool = False
    stops: bool = False
    late: bool = False

    @classmethod
    def of(cls, ranks: Sequence[Outlook]) -> Outlook:
        """That of all together."""
        return cls(
            weight=sum(one.weight for one in ranks),
            pictures=any(one.pictures for one in ranks),
            stops=any(one.stops for one in ranks),
            late=ranks[0].late,
        )


@dataclass(frozen=True)
class StepResult:
    """`loss` and `values` are the objective's means, `grad_norm` the norm of the loss' gradient before clipping.

    `skipped` says why there was no update, where there was none. `peak_memory`: the most bytes that any rank has held,
    as its device knew before the update.
    """

    loss: float
    grad_norm: float
    values: Mapping[str, float] = field(default_factory=dict)
    skipped: str | None = None
    peak_memory: int = 0


class _OfAll(NamedTuple):
    """What all ranks know after the backward pass: the norm of their gradients, sums, the largest peak of memory."""

    norm: float
    loss: float
    logged: list[float]
    peak_memory: int


@dataclass(frozen=True)
class Evaluation:
    """The objective's means over the batches, their trained tokens, and the number of its `unit` that it averages over.

    Without any, the loss is nan.
    """

    loss: float
    tokens: int
    weight: float
    values: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """A model, an objective, the optimizer's state, and the update that a step makes.

    Of many ranks each updates a part of what is trained: `owned` are these rows by path, and `state` is of them.
    `everything` is what the model has on all ranks together. All ranks call the same functions, and what these return
    or raise is the same on all.
    """

    def __init__(
        self,
        model: TrainableModel,
        objective: Objective,
        backend: Backend,
        optim: OptimSection,
        *,
        reference: Reference | None = None,
        seed: int = 0,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        division: Division = ALONE,
    ):
        """The optimizer starts with zero moments. `seed` is that of the random numbers inside the model; `reference`
        is asked where the objective needs one. `division` says how the model lies on the ranks.

        Of a loss or a gradient that is not finite no update is made: NonFiniteError is raised, or with `skip` the
        result says so. Where the model has float16 weights the loss is scaled, and an overflow of that makes no
        update either, whatever `on_nonfinite` says.
        """
        self.model, self.objective, self.reference = model, objective, reference
        self.ranks = Ranks(backend.collectives)
        self.seed, self.on_nonfinite = seed, on_nonfinite
        self.backend = backend
        self.optim = optim
        self.trained = [p for p in model.parameters.values() if p.trainable]
        self.zero = Zero(backend, division, self.trained)
        self.everything = inventory(model.parameters.values(), backend, division)
        groups = parameter_groups(model.parameters, self.everything, optim, model.parts)
        self.owned = self.zero.owned
        self.groups = [
            replace(group, parameters=[self.owned[p.path] for p in group.parameters if p.path in self.owned])
            for group in groups
        ]
        self.passes = passes_of(model, backend, division)
        # Of the ranks that have the same packs one counts them, and those count losses that have a part of them.
        self._counts = all(division.place(axis) == 0 for axis in ("pp", "cp", "tp"))
        parts = objective.adds_up or division.place("cp") == 0
        self._has_loss = division.holds_last and division.place("tp") == 0 and parts
        self.state: AdamWState = backend.optimizer.create(self.groups, dtype=optim.state_dtype, offload=optim.offload)
        halves = any(entry.dtype == "float16" for entry in self.everything.values())
        start, window = optim.loss_scale or START, optim.loss_scale_window or WINDOW
        self.loss_scale = LossScale(start, window) if halves else None
        self.give_up: Callable[[], bool] = lambda: False  # asked before every micro-batch
        self._updating = False

    def outlook(self, work: Step | None, own: Outlook = Outlook()) -> Outlook:
        """What all ranks know before a step, by one exchange: `own`, which this rank knows of itself, and what is in
        its packs."""
        if work is not None:
            batches = self._packs(work).values()
            weight = sum(map(self.objective.weight, batches)) if self._counts else 0.0
            own = replace(own, weight=weight, pictures=any(len(batch.grids) for batch in batches))
        return Outlook.of(self.ranks.each(own))

    def step(self, work: Step, lr: float, number: int = 0, outlook: Outlook | None = None) -> StepResult | None:
        """Forward, backward and update. None, and no update, where nothing in the step is trained.

        `number` is that of the step in its run, and with the seed names its random numbers. Losses and gradients are
        summed; the division by the weights of the whole step happens once, in the optimizer, which makes the result
        independent of the split into micro-batches as far as the weights are. `outlook` is that of this step, where it
        has been asked for already.
        """
        outlook = outlook or self.outlook(work)
        weight = outlook.weight
        if not weight:
            return None
        packs = self._packs(work)
        scale = self.loss_scale.scale if self.loss_scale else weight  # of the mean loss, in the main gradients
        self.zero.begin(outlook.pictures)
        outputs = self._accumulate(packs, number, scale / weight)
        sums = [self._number(loss) for loss, *_ in outputs]  # read at the end: the device need not wait in between
        self.zero.reduce()
        found = self._of_all(sums, [logged for _, *logged in outputs])
        norm = found.norm / scale
        means = {name: value / weight for name, value in zip(self.objective.logged, found.logged, strict=True)}
        if self.loss_scale:
            means["loss_scale"] = scale
        skipped = self._unusable(found.loss, norm, sums, list(packs.values()), number)
        if skipped is None:
            self._update(lr, norm, scale)
        else:
            self._drop_gradients()
        return StepResult(found.loss / weight, norm, means, skipped, found.peak_memory)

    def is_sound(self) -> bool:
        """Whether the weights are those after a whole number of updates, and all finite: worth being saved."""
        whole = not self._updating
        finite = whole and all(np.isfinite(self.backend.to_numpy(p.tensor)).all() for p in self.trained)
        return not self.ranks.any(not finite)

    def _packs(self, work: Step) -> dict[int, Batch]:
        """The micro-batches of this rank that are run, by their numbers."""
        return {pack: batch for pack, batch in work.packs() if self.objective.weight(batch)}

    def _update(self, lr: float, norm: float, scale: float) -> None:
        self._updating = True  # and it stays so where an error ends this
        clip = self.optim.clip
        shrink = min(1.0, clip / (norm + 1e-6)) if clip is not None else 1.0  # the 1e-6 is torch's and Megatron's
        self.backend.optimizer.step(
            self.state,
            self.groups,
            lr=lr,
            betas=self.optim.betas,
            eps=self.optim.eps,
            grad_scale=shrink / scale,
        )
        self.zero.publish()
        self.backend.device.synchronize()
        self._updating = False

    def evaluate(self, batches: Iterable[Batch]) -> Evaluation:
        """The objective's means over the batches."""
        return self.evaluate_groups([batches])

    def evaluate_groups(self, groups: Iterable[Iterable[Batch]]) -> Evaluation:
        """The same of batches that come in groups, of which all ranks have as many, with none or some batches each."""
        counted, found = np.zeros(2), np.zeros(1 + len(self.objective.logged))  # weight, tokens; loss, values
        run = (filter(self.objective.weight, group) for group in groups)
        for some in self.passes.together(run):
            for outputs in self.passes.evaluate(self._micro_batches(some, [()] * len(some))):
                found += [*map(self._number, outputs)]
            for batch in some:
                counted += [self.objective.weight(batch), batch.trained_tokens]
        weight, tokens, *totals = self.ranks.sum([*counted * self._counts, *found * self._has_loss])
        loss, *logged = (total / weight if weight else math.nan for total in totals)
        values = dict(zip(self.objective.logged, logged, strict=True)) if weight else {}
        return Evaluation(loss, round(tokens), weight, values)

    def _micro_batches(self, batches: Sequence[Batch], keys: Sequence[tuple[int, ...]]) -> list[MicroBatch]:
        """As they are run, with what the objective needs to know of each."""
        references: Sequence[Tensor | None] = [None] * len(batches)
        if self.objective.needs_reference:
            assert self.reference is not None, "the objective compares with a reference, and there is none"
            references = self.reference(batches) or references
        return [
            MicroBatch(batch, partial(self._last_stage, batch, reference), key)
            for batch, reference, key in zip(batches, references, keys, strict=True)
        ]

    def _last_stage(self, batch: Batch, reference: Tensor | None, trained: Trained) -> LastStage:
        """The objective's function of the model's last rows, with what it needs to know of the batch."""
        return partial(self.objective.loss, prepared=self.objective.prepare(batch, reference, trained))

    def _accumulate(self, packs: Mapping[int, Batch], number: int, scale: float) -> list[Outputs]:
        """`scale` times the gradients of all micro-batches into the main gradients.

        Gives loss and values of each on a rank with the last stage.
        """
        one = self.backend.ops.from_numpy(np.array(scale, np.float32))
        keys = [(self.seed, number, pack) for pack in packs]
        micro_batches = self._micro_batches(list(packs.values()), keys)
        return self.passes.train(micro_batches, one, self.zero.ready, self._look_at_time)

    def _look_at_time(self) -> None:
        if self.give_up():
            self._drop_gradients()
            raise StepGivenUp

    def _of_all(self, sums: Sequence[float], values: Sequence[Sequence[Tensor]]) -> _OfAll:
        """By one exchange: of losses and of each logged value the sum over the micro-batches of all ranks."""
        own = [p for group in self.groups for p in group.parameters]  # each number is owned by one rank
        logged = [sum(self._number(one[place]) for one in values) for place in range(len(self.objective.logged))]
        counted = [sum(sums), *logged] if self._has_loss else [0.0] * (1 + len(logged))
        peak = self.backend.device.peak_memory()
        told = self.ranks.each([self.backend.optimizer.grad_norm(own), peak, *counted])
        norms, peaks, losses, *columns = zip(*told, strict=True)
        return _OfAll(math.hypot(*norms), sum(losses), [*map(sum, columns)], round(max(peaks)))

    def _unusable(
        self, total: float, norm: float, sums: Sequence[float], batches: Sequence[Batch], number: int
    ) -> str | None:
        """Why there must be no update, or None. Raises NonFiniteError where that is to stop the run."""
        whole = math.isfinite(total)
        if whole and self.loss_scale and (overflow := self.loss_scale.update(norm)):
            return overflow
        if whole and math.isfinite(norm):
            return None
        broken = [batch for batch, loss in zip(batches, sums, strict=bool(sums)) if not math.isfinite(loss)]
        what = "the gradient" if whole else "the loss"
        text = f"{what} is not finite; samples of the step: {', '.join(self._named(broken, batches))}"
        if self.on_nonfinite == "skip":
            return text
        self._drop_gradients()
        raise NonFiniteError(
            f"step {number + 1}: {text}; no update was made. Check these samples and optim.lr, or continue without "
            "such steps: train.on_nonfinite=skip"
        )

    def _named(self, broken: Sequence[Batch], batches: Sequence[Batch]) -> list[str]:
        """The samples of all ranks' micro-batches that are `broken`; of all micro-batches where none is."""
        own = [[name for batch in some for name in batch.sample_ids] for some in (broken, batches)]
        none: list[list[str]] = [[], []]
        by_rank = self.ranks.each(own if self._has_loss else none)
        those, everything = (dict.fromkeys(chain(*column)) for column in zip(*by_rank, strict=True))
        return list(those or everything)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps beside parameters and optimizer state."""
        return {"loss_scale": self.loss_scale.to_json()} if self.loss_scale else {}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from `to_json`."""
        if self.loss_scale and "loss_scale" in stored:
            self.loss_scale.restore(stored["loss_scale"])

    def _drop_gradients(self) -> None:
        for p in (*self.trained, *self.owned.values()):
            p.main_grad = None

    def _number(self, scalar: Tensor) -> float:
        return float(self.backend.to_numpy(scalar))
