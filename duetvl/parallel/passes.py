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
        passes, results = self._agreed(micro_batches), []
        for place, (one, sees) in enumerate(passes, 1):
            before()
            outputs, tape = self._forward(one, sees)
            cotangents = [cotangent, *[None] * (len(outputs) - 1)]
            last = bool(micro_batches) and place == len(passes)
            self.backend.autograd.backward(tape, cotangents, last=last, on_ready=on_ready)
            results.append(outputs)
        return results[len(passes) - len(micro_batches) :]

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """One by one."""
        return some_of(groups, 1)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Outputs]:
        """See `Passes`."""
        passes = self._agreed(micro_batches)
        results = [self._untaped(one, sees) for one, sees in passes]
        return results[len(passes) - len(micro_batches) :]

    def _agreed(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, bool]]:
        """The passes that this rank runs, its own last; of each whether the vision tower runs without media too."""
        return [(one, False) for one in micro_batches]

    def _forward(self, one: MicroBatch, sees: bool) -> tuple[Outputs, Tape]:
        return self.model.forward(one.batch, self._last(one), key=one.key)

    def _untaped(self, one: MicroBatch, sees: bool) -> Outputs:
        return self.model.evaluate(one.batch, self._last(one))

    def _last(self, one: MicroBatch) -> LastStage:
        return one.last(self.model.trained(one.batch))


@dataclass(frozen=True)
class Lockstep(InOrder):
    """The `Passes` of ranks that hold some rows of each block's weights: each of them has to run whenever one does.

    All ranks call the same functions, those without a micro-batch too. A rank that has fewer than another first runs
    passes of no rows in their place; what has no picture runs the vision tower on no rows where another rank's pass has
    one. So the blocks of all ranks are gathered, and their gradients summed, in one order.
    """

    model: QwenVL

    def together(self, groups: Iterable[Iterable[Batch]]) -> Iterator[Sequence[Batch]]:
        """Group by group, as other ranks do, also where this one has nothing of a group."""
        return map(list, groups)

    def _agreed(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, bool]]:
        told = Ranks(self.backend.collectives).each([len(one.batch.grids) > 0 for one in micro_batches])
        count = max(map(len, told))
        aligned = [[False] * (count - len(own)) + own for own in told]  # their last ones are one pass
        blank = MicroBatch(self._no_rows(), lambda trained: self._nothing)
        passes = [*[blank] * (count - len(micro_batches)), *micro_batches]
        return [(one, any(column)) for one, column in zip(passes, zip(*aligned, strict=True), strict=True)]

    def _forward(self, one: MicroBatch, sees: bool) -> tuple[Outputs, Tape]:
        return self.model.forward(one.batch, self._last(one), key=one.key, sees=sees)

    def _untaped(self, one: MicroBatch, sees: bool) -> Outputs:
        return self.model.evaluate(one.batch, self._last(one), sees=sees)

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
