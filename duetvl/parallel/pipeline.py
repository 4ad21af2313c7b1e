"""Micro-batches run through the stages of a pipeline.

It follows a schedule (parallel/schedule.py). What a stage has made waits until the exchange that takes it to
the next one; the receiver knows its shape from the micro-batch, which both have. Gradients go back the same way where
anything before a stage is trained; behind a frozen tower none are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.core.boxes import Shape
from duetvl.core.collectives import Group, Receive, Send
from duetvl.core.params import Parameter
from duetvl.models.qwen_vl.model import QwenVL, StageInput
from duetvl.models.qwen_vl.sharding import Tower
from duetvl.models.qwen_vl.stage import Between, Stage, StageFunction
from duetvl.parallel.division import Division
from duetvl.parallel.passes import InOrder, Lockstep, MicroBatch, Outputs, Passes, some_of
from duetvl.parallel.schedule import Action, Compute, Exchange, Message, Schedule, forward_only, one_f_one_b
from duetvl.parallel.tensor import layout_of

Tensor = Any
Around = Callable[[Action], AbstractContextManager[None]]


def passes_of(model: Any, backend: Backend, division: Division) -> Passes:
    """How this rank runs a model that is divided so. With a pipeline, all ranks call it together."""
    if division.mesh.pp > 1:
        return Pipeline(model, backend, division)
    return InOrder(model, backend) if division.zero == 1 else Lockstep(model, backend)


class Pipeline:
    """The `Passes` of a rank that has some stages of a model."""

    def __init__(self, model: QwenVL, backend: Backend, division: Division):
        """All ranks call this together: each tells what it trains."""
        self.model, self.backend, self.division = model, backend, division
        self.ranks = division.team(["pp"])
        self.around: Around = lambda action: nullcontext()  # entered for each action of a schedule, as to time it
        self.precision = backend.ops.dtype_of(next(iter(model.parameters.values())).tensor)  # of what travels
        trained = {stage.number: _trained(model.parameters_of(stage)) for stage in model.stages.values()}
        told: dict[int, tuple[bool, bool]] = {}
        for some in backend.collectives.gather_objects(trained):
            told.update(some)
        # Whether anything before a stage is trained: in the vision tower, in the language model.
        self._before = [
            (any(told[n][0] for n in range(stage)), any(told[n][1] for n in range(stage)))
            for stage in range(division.stages.count)
        ]

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        cotangent: Tensor,
        on_ready: Callable[[Parameter], None],
        before: Callable[[], None] = lambda: None,
    ) -> list[Outputs]:
        """See `Passes`; `on_ready` is not called."""
        run = _Run(self, micro_batches, cotangent, before)
        return run.through(self._schedule(one_f_one_b, len(micro_batches)))

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """See `Passes`."""
        return some_of(groups, 4 * self.division.stages.count)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Outputs]:
        """See `Passes`."""
        return _Run(self, micro_batches, None).through(self._schedule(forward_only, len(micro_batches)))

    def leads_back(self, stage: int, batch: Batch) -> bool:
        """Whether anything before a stage is trained by a batch."""
        vision, language = self._before[stage]
        return language or (vision and len(batch.grids) > 0)

    def _schedule(self, make: Callable[[int, int, int], Schedule], count: int) -> Schedule:
        return make(self.division.mesh.pp, self.division.virtual, count)


def _trained(parameters: Sequence[Parameter]) -> tuple[bool, bool]:
    """Whether any is trained: of the vision tower, of the language model."""
    vision, language = (
        any(p.trainable and p.path.startswith("visual.") == tower for p in parameters) for tower in (True, False)
    )
    return vision, language


@dataclass
class _Run:
    """The passes of this rank through a schedule. What waits is named by the pass that it is for, or made by."""

    pipeline: Pipeline
    micro_batches: Sequence[MicroBatch]
    cotangent: Tensor | None  # None: forward alone
    before: Callable[[], None] = lambda: None
    given: dict[int, StageInput] = field(default_factory=dict)  # by micro-batch
    handed: dict[Compute, Tensor] = field(default_factory=dict)  # made by another rank
    made: dict[Compute, Tensor] = field(default_factory=dict)  # made here, not sent yet
    tapes: dict[tuple[int, int], Tape] = field(default_factory=dict)  # by stage and micro-batch
    outputs: dict[int, Outputs] = field(default_factory=dict)

    def through(self, schedule: Schedule) -> list[Outputs]:
        """Follow the actions of this rank."""
        for action in schedule.actions[self.pipeline.division.place("pp")]:
            with self.pipeline.around(action):
                self._act(action)
        return [self.outputs[number] for number in sorted(self.outputs)]

    def _act(self, action: Action) -> None:
        if isinstance(action, Exchange):
            self._exchange(action)
        elif action.direction == "forward":
            self._forward(action)
        else:
            self._backward(action)

    def _forward(self, act: Compute) -> None:
        pipeline, one = self.pipeline, self.micro_batches[act.micro_batch]
        stage = self._stages[act.stage]
        if act.stage == min(self._stages):
            self.before()
        given = self._input(act.micro_batch)
        x = self.handed.pop(Compute("forward", act.stage - 1, act.micro_batch), None)
        if stage.ends:
            self.outputs[act.micro_batch] = self._computed(act, stage, given, x, one)
        elif stage.hands_on(pipeline.model.config, given.model) is not None:
            (self.made[act],) = self._computed(act, stage, given, x, one)
        if self.cotangent is None and act.stage == max(self._stages):
            del self.given[act.micro_batch]

    def _computed(self, act: Compute, stage: Stage, given: StageInput, x: Tensor | None, one: MicroBatch) -> Outputs:
        model = self.pipeline.model
        last = one.last(model.trained(one.batch)) if stage.ends else _no_last
        needs = self.pipeline.leads_back(act.stage, one.batch)
        if self.cotangent is None or not (needs or any(p.trainable for p in model.parameters_of(stage))):
            return model.run_untaped(stage, given, x, last)
        outputs, self.tapes[act.stage, act.micro_batch] = model.run(stage, given, x, last, key=one.key, needs=needs)
        return outputs

    def _backward(self, act: Compute) -> None:
        stage = self._stages[act.stage]
        tape = self.tapes.pop((act.stage, act.micro_batch), None)
        gradient = self.handed.pop(Compute("backward", act.stage + 1, act.micro_batch), None)
        if tape is not None:
            count = len(self.outputs[act.micro_batch]) if stage.ends else 1
            cotangents = [self.cotangent if stage.ends else gradient, *[None] * (count - 1)]
            final = act.micro_batch == self._last_with_tape(act.stage)
            back = self.pipeline.backend.autograd.backward(tape, cotangents, last=final)
            shape = self._shape(Compute("backward", act.stage, act.micro_batch))
            if shape is not None:
                ops = self.pipeline.backend.ops
                self.made[act] = ops.zeros(shape, self.pipeline.precision) if back[0] is None else back[0]
        if act.stage == min(self._stages):
            del self.given[act.micro_batch]

    def _last_with_tape(self, stage: int) -> int:
        """The last micro-batch that a stage computes anything of."""
        vision = self._stages[stage].language.stop == 0
        runs = (n for n, one in enumerate(self.micro_batches) if not vision or len(one.batch.grids))
        return max(runs, default=-1)

    def _exchange(self, action: Exchange) -> None:
        to = [(self.made.pop(message.made_by, None), message.peer) for message in action.sends]
        sends = [Send(tensor, self.pipeline.ranks[peer]) for tensor, peer in to if tensor is not None]
        due = [(message, shape) for message in action.receives if (shape := self._shape(message.made_by)) is not None]
        receives = [Receive(shape, self.pipeline.precision, self._rank(message)) for message, shape in due]
        if sends or receives:
            found = self.pipeline.backend.collectives.exchange(sends, receives)
            self.handed.update({message.made_by: x for (message, _), x in zip(due, found, strict=True)})

    def _rank(self, message: Message) -> int:
        return self.pipeline.ranks[message.peer]

    def _shape(self, made_by: Compute) -> Shape | None:
        """The shape of what a pass leaves, here or at another stage; None: nothing."""
        pipeline, one = self.pipeline, self.micro_batches[made_by.micro_batch]
        before = made_by.stage if made_by.direction == "forward" else made_by.stage - 1
        if made_by.direction == "backward" and not pipeline.leads_back(made_by.stage, one.batch):
            return None
        stage = Stage.of(pipeline.division.stages, before)
        return stage.hands_on(pipeline.model.config, self._input(made_by.micro_batch).model)

    def _input(self, number: int) -> StageInput:
        """Made when it is first asked for, and kept while this rank has the micro-batch to run."""
        if number not in self.given:
            self.given[number] = self.pipeline.model.input(self.micro_batches[number].batch)
        return self.given[number]

    @property
    def _stages(self) -> Mapping[int, Stage]:
        return self.pipeline.model.stages


@dataclass(frozen=True)
class Chain:
    """The `models.qwen_vl.stage.Relay` of a pipeline: one stage after the other, while the others wait."""

    backend: Backend
    division: Division
    group: Group

    def __call__(
        self, first: Tower, last: Tower, run: StageFunction, x: Tensor | None, between: Between, end: Shape, dtype: str
    ) -> Tensor:
        """See `Relay`."""
        division = self.division
        stages, ranks = division.stages, division.team(["pp"])
        numbers = range(stages.holding(first, 0), stages.holding(last, sum(getattr(stages, last)) - 1) + 1)
        for number in numbers:
            stage, here = Stage.of(stages, number), ranks[number % len(ranks)]
            if division.rank == here:
                x = run(stage, x)
            if number != numbers[-1]:
                x = self._handed_on(x, here, ranks[(number + 1) % len(ranks)], between(stage), dtype)
        result = x if division.rank == here else self.backend.ops.zeros(end, dtype)
        return self.backend.collectives.broadcast(result, here, self.group)

    def _handed_on(self, x: Tensor | None, here: int, to: int, shape: Shape | None, dtype: str) -> Tensor | None:
        exchange = self.backend.collectives.exchange
        if shape is not None and self.division.rank == here:
            exchange([Send(x, to)], [])
        elif shape is not None and self.division.rank == to:
            (x,) = exchange([], [Receive(shape, dtype, here)])
        return x


def placed(model: QwenVL, division: Division, backend: Backend) -> QwenVL:
    """Tell a model how it lies on the ranks, its parameters being this rank's. All ranks call it together."""
    model.layout = layout_of(division, backend)
    if division.mesh.pp > 1:
        group = backend.collectives.groups(division.groups(["pp"]))
        model.stages, model.relay = stages_of(division), Chain(backend, division, group)
    return model


def _no_last(hidden: Tensor, w: Any) -> Outputs:
    raise AssertionError("only the last stage meets the vocabulary")


def stages_of(division: Division) -> dict[int, Stage]:
    """The stages that a rank runs, for its model's `stages`."""
    return {number: Stage.of(division.stages, number) for number in division.own_stages}
