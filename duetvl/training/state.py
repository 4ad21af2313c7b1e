"""How far a run has come: what its checkpoints keep of it, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duetvl.core.backend import Backend
from duetvl.core.errors import CheckpointError, DataError
from duetvl.data.loading.peers import Peers
from duetvl.parallel.inventory import Inventory
from duetvl.storage.checkpoint_format import Meta
from duetvl.storage.finding import CheckpointRef
from duetvl.training.checkpoints.checkpoint import load_checkpoint, take_snapshot
from duetvl.training.checkpoints.run_directory import from_these_weights, same_validation
from duetvl.training.checkpoints.writing import Snapshot
from duetvl.training.feed import DataSets, Feed
from duetvl.training.job import Job
from duetvl.training.recipe.sections import Recipe
from duetvl.training.step import Trainer


class RunState:
    """Steps done and what they add up to, beside the tensors, the data position and the loss scale."""

    def __init__(self, recipe: Recipe, job: Job, trainer: Trainer, feed: Feed, backend: Backend):
        """At the start."""
        self.recipe, self.job, self.trainer, self.feed, self.backend = recipe, job, trainer, feed, backend
        self.step = 0
        self.evaluated_since = -1  # the last step whose eval_loss is not one of these validation data
        self.totals: dict[str, float] = {"tokens": 0, "trained_tokens": 0, "seconds": 0.0, "skipped": 0}

    @property
    def kept(self) -> Inventory:
        """What a checkpoint keeps of the model, whatever of it this rank has."""
        return {path: entry for path, entry in self.trainer.everything.items() if self.job.keeps(path)}

    def snapshot(self, *, copy: bool) -> Snapshot:
        """What this rank writes of a checkpoint of this moment."""
        return take_snapshot(
            step=self.step,
            parameters=self.job.checkpointed(),
            owned=self.trainer.owned,
            optimizer_state=None if self.recipe.checkpoint.save_only_model else self.trainer.state,
            division=self.job.division,
            everything=self.kept,
            meta=Meta(
                recipe=self.recipe.model_dump(mode="json"),
                model_config=self.job.model_config,
                data_position=self.feed.position,
                random_state={"seed": self.recipe.data.seed, "step": self.step},
                extra={
                    "totals": dict(self.totals),
                    "records": dict(self.feed.findings.counts),
                    "evaluated_since": self.evaluated_since,
                    "trainer": self.trainer.to_json(),
                    "base_model": dict(self.job.base),
                    "reference": dict(self.job.reference),
                },
            ),
            backend=self.backend,
            copy=copy,
        )

    def restore(self, ref: CheckpointRef) -> None:
        """Go on from a checkpoint, whose data position the feed has already. CheckpointError for another model's.

        One of weights alone leaves the optimizer as it is: no further step may follow.
        """
        _check_same(ref, "base_model", self.job.base, "its adapters belong to")
        _check_same(ref, "reference", self.job.reference, "its policy was compared with")
        load_checkpoint(
            ref,
            parameters=self.job.checkpointed(),
            owned=self.trainer.owned,
            optimizer_state=None if ref.weights_only else self.trainer.state,
            everything=self.kept,
            backend=self.backend,
        )
        self.step = ref.step
        self.totals |= ref.meta.extra.get("totals", {})
        alike = same_validation(self.recipe, ref.meta.recipe)
        self.evaluated_since = ref.meta.extra.get("evaluated_since", -1) if alike else ref.step
        self.feed.findings.counts.update(ref.meta.extra.get("records", {}))
        self.trainer.restore(ref.meta.extra.get("trainer", {}))


def feed_from(ref: CheckpointRef | None, recipe: Recipe, job: Job, sets: DataSets, peers: Peers) -> Feed:
    """The data from where a checkpoint left it, or from the start. DataError where it is not that of the checkpoint."""
    try:
        position = None if ref is None else ref.meta.data_position
        return Feed(recipe, sets, job.encoder, position, peers=peers)
    except DataError as error:
        files = ", ".join(source.path for source in recipe.data.train)
        if ref is None:
            raise DataError(f"{files}: {error}") from None
        hint = f"restore the data to resume, or {from_these_weights(ref, recipe)}"
        raise DataError(f"{files}: {error}, of {ref.path}; {hint}") from None


def _check_same(ref: CheckpointRef, key: str, found: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError unless weights that are not in the checkpoint are those that it was trained with."""
    stored = ref.meta.extra.get(key) or {}
    if stored and stored["fingerprint"] != found.get("fingerprint"):
        raise CheckpointError(
            f"{ref.path}: {what} other weights than those of {found.get('path')} now (fingerprint "
            f"{stored['fingerprint']}, found {found.get('fingerprint')}); restore {stored['path']}, or begin a new run"
        )
