"""Micro-batches run through a model that a rank has whole, or gathers block by block (parallel/gathering.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np

from duetvl.core.autograd import Tape
from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.core.params import Parameter, Weights
from duetvl.core.ranks import Ranks
from duetvl.models.layout import Trained
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.vocabulary import LastStage

Tensor = Any
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class MicroBatch:
    """A batch, what its last stage computes, which is asked for on the rank that has it, and the key of its pass.

    It is asked with what the stage will be given of the batch's trained tokens.
    """

    batch: Batch
    last: Callable[[Trained], LastStage]
    key: tuple[int, ...] = ()


class OneStageModel(Protocol):
    """A model that runs whole."""

    def forward(self, batch: Batch, last: LastStage, *, key: tuple[int, ...] = ()) -> tuple[Outputs, Tape]:
        """What `last` makes of a batch, and the tape of it."""
        ...

    def evaluate(self, batch: Batch, last: LastStage) -> Outputs:
        """The same without a tape."""
        ...

    def trained(self, batch: Batch) -> Trained:
        """Which of the batch's trained tokens these give to `last` on this rank."""
        ...


class Passes(Protocol):
    """How micro-batches are run. All ranks that have the same ones call the same functions."""

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        cotangent: Tensor,
        on_ready: Callable[[Parameter], None],
        before: Callable[[], None] = lambda: None,
    ) -> list[Outputs]:
        """Forward and backward of each; `cotangent` is that of the first output, `before` is called before each.

        Gives the outputs of each where this rank has the last stage, else nothing. `on_ready` as in
        `Autograd.backward`.
        """
        ...

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """The batches of an evaluation, of which all ranks have as many groups: as many at a time as should be run
        together."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Outputs]:
        """Forward alone, without a tape."""
        ...


@dataclass(frozen=True)
class InOrder:
    """The `Passes` of a rank that has the whole model: one micro-batch after the other."""

    model: OneStageModel
    backend: Backend

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        cotangent: Tensor,
        on_ready: Callable[[Parameter], None],
        before: Callable[[], None] = lambda: None,
    ) -> list[Outputs]:
        """See `Passes`."""
        found = []
        for place, one in enumerate(micro_batches, 1):
            before()
            outputs, tape = self.model.forward(one.batch, self._last(one), key=one.key)
            cotangents = [cotangent, *[None] * (len(outputs) - 1)]
            self.backend.autograd.backward(tape, cotangents, last=place == len(micro_batches), on_ready=on_ready)
            found.append(outputs)
        return found

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """One by one."""
        return some_of(groups, 1)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Outputs]:
        """See `Passes`."""
        return [self.model.evaluate(one.batch, self._last(one)) for one in micro_batches]

    def _last(self, one: MicroBatch) -> LastStage:
        return one.last(self.model.trained(one.batch))


@dataclass(frozen=True)
class Lockstep:
    """The `Passes` of ranks that hold some rows of each block's weights: each of them has to run whenever one does.

    All ranks call the same functions, those without a micro-batch too. A rank that has fewer than another first runs
    passes of no rows in their place; what has no picture runs the vision tower on no rows where another rank's pass has
    one. So the blocks of all ranks are gathered, and their gradients summed, in one order.
    """

    model: QwenVL
    backend: Backend

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        cotangent: Tensor,
        on_ready: Callable[[Parameter], None],
        before: Callable[[], None] = lambda: None,
    ) -> list[Outputs]:
        """See `Passes`."""
        found = []
        blank, sees = self._agreed(micro_batches)
        for place, (one, some) in enumerate(zip([*blank, *micro_batches], sees, strict=True), 1):
            before()
            outputs, tape = self.model.forward(
                one.batch, one.last(self.model.trained(one.batch)), key=one.key, sees=some
            )
            own = place > len(blank)
            cotangents = [cotangent, *[None] * (len(outputs) - 1)]
            self.backend.autograd.backward(tape, cotangents, last=own and place == len(sees), on_ready=on_ready)
            found.extend([outputs] * own)
        return found

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """Group by group, as other ranks do, also where this one has nothing of a group."""
        return map(list, groups)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Outputs]:
        """See `Passes`."""
        blank, sees = self._agreed(micro_batches)
        passes = zip([*blank, *micro_batches], sees, strict=True)
        outputs = [
            self.model.evaluate(one.batch, one.last(self.model.trained(one.batch)), sees=some) for one, some in passes
        ]
        return outputs[len(blank) :]

    def _agreed(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[MicroBatch], list[bool]]:
        """(the passes of no rows that this rank runs before its own; of each of all, whether the tower runs in it)"""
        told = Ranks(self.backend.collectives).each([len(one.batch.grids) > 0 for one in micro_batches])
        count = max(map(len, told))
        aligned = [[False] * (count - len(own)) + own for own in told]  # their last ones are one pass
        blank = MicroBatch(self._no_rows(), lambda trained: self._nothing)
        return [blank] * (count - len(micro_batches)), [any(column) for column in zip(*aligned, strict=True)]

    def _no_rows(self) -> Batch:
        width = self.model.config.vision.patch_row
        none = Batch.of_tokens(np.zeros(0), np.zeros((3, 0)), np.zeros(0))
        return replace(none, pixel_rows=np.zeros((0, width), np.float32))

    def _nothing(self, hidden: Tensor, w: Weights) -> Outputs:
        """A loss of no rows."""
        ops = self.backend.ops
        return (ops.sum(ops.cast(hidden, "float32")),)


def some_of(groups: Iterable[Iterable[Batch]], count: int) -> Iterator[Sequence[Batch]]:
    """So many at a time, whatever group they are of."""
    left = chain.from_iterable(groups)
    while some := list(islice(left, count)):
        yield some
