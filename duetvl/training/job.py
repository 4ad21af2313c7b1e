"""What a run is handed: the model, and everything around it that depends on the kind of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duetvl.core.params import Parameter
from duetvl.data.draft import Encoder
from duetvl.parallel.division import Division
from duetvl.storage.finding import CheckpointRef
from duetvl.training.feed import Feed
from duetvl.training.memory import Memory
from duetvl.training.objective import Objective, Reference
from duetvl.training.step import TrainableModel
from duetvl.training.watching.costs import Flops


@dataclass(frozen=True)
class Job:
    """What is trained: a model, to which end, how a record becomes a sample of it, how it is written for others.

    `export` writes a checkpoint, of which the weights are verified, as a directory for others: one process does that,
    without a framework. `keeps` says of a parameter's path whether a checkpoint has it. `base`: what a
    checkpoint says of the model that these belong to, and `reference` of the one that a policy is compared with: they
    must be the same (by `fingerprint`, wherever they lie) when the run goes on. `flops` counts the operations that a
    micro-batch asks for of each rank that runs a share of it, forward and backward, for the utilisation shown; none is
    shown without it. `before` is called once with the data, while the model has its starting weights also where a run
    is resumed. `compared_with` gives what the objective needs of a reference, if any. `memory` estimates what a
    step takes, from some drafts, and `seconds` how long it is. `division` says which part of the model this rank has.
    """

    model: TrainableModel
    objective: Objective
    encoder: Encoder
    export: Callable[[CheckpointRef, Path], None]
    model_config: Mapping[str, Any] = field(default_factory=dict)
    keeps: Callable[[str], bool] = lambda path: True
    base: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    flops: Flops | None = None
    before: Callable[[Feed], None] | None = None
    compared_with: Reference | None = None
    memory: Callable[[Iterable[Any]], Memory | None] | None = None
    seconds: Callable[[Iterable[Any]], float | None] | None = None
    division: Division = field(default_factory=Division)

    def checkpointed(self) -> Sequence[Parameter]:
        """The parameters that this rank has of those that a checkpoint keeps."""
        return tuple(p for path, p in self.model.parameters.items() if self.keeps(path))
