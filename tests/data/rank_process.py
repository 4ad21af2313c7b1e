"""A process that is one rank of several runs of the data side, as trained with: `python rank_process.py PLACE RANK`.

The cases lie in PLACE/cases; what the rank saw in one is left in PLACE/NAME/seen.RANK. Each rank has a working
directory of its own.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from meeting import gather_by_files

from duetvl.core.batch import Batch, PatchBytes
from duetvl.core.errors import DuetvlError
from duetvl.data.loading.loader import Step
from duetvl.data.loading.peers import Peers
from duetvl.training.feed import DataSets, Feed
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.sft import record_encoder


@dataclass
class Case:
    """A recipe, the steps that are taken from a position, and what is done between them."""

    name: str
    recipe: dict[str, Any]
    steps: int = 5
    position: dict[str, Any] | None = None
    script: str = "train"
    told: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What a rank saw: steps, groups of evaluations, and how it ended. Pack -> a digest of its arrays."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    packs: list[dict[int, str]] = field(default_factory=list)
    groups: list[list[list[str]]] = field(default_factory=list)
    error: str = ""
    threads: int = 0


def digest(batch: Batch) -> str:
    """Of every bit of it."""
    found = sha256()
    for item in fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, PatchBytes):
            found.update(repr((value.temporal, value.mean, value.std, value.rescale)).encode())
            value = value.values
        if isinstance(value, np.ndarray):
            found.update(repr((value.dtype, value.shape)).encode())
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def note(seen: Seen, step: Step) -> None:
    """Keep what a step says."""
    said = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in ("batches", "numbers")}
    seen.steps.append(said | {"totals": step.totals})
    seen.packs.append({number: digest(batch) for number, batch in step.packs()})


# -- what is done with a feed ----------------------------------------------------------------------------------------


def train(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """Steps one after the other."""
    with feed.started(case.steps):
        for _ in range(case.steps):
            take(feed, seen)


def take(feed: Feed, seen: Seen) -> None:
    step = feed.next_step()
    feed.done(step)
    note(seen, step)


def evaluate(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """A pass before the steps, one that is stopped after two groups between them, and one at the end."""
    seen.groups.append(list(group_digests(feed.everything())))
    with feed.started(case.steps):
        for number in range(case.steps):
            groups = group_digests(feed.val_batches())
            seen.groups.append([next(groups), next(groups)] if number else list(groups))
            take(feed, seen)
        seen.groups.append(list(group_digests(feed.val_batches())))


def group_digests(groups: Iterator[tuple[Batch, ...]]) -> Iterator[list[str]]:
    return ([digest(batch) for batch in group] for group in groups)


def lose_file(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """The data file goes while the run is at work, on one rank."""
    if rank == 1:
        feed.files[0].unlink()
    train(feed, seen, case, rank)


def broken(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """One rank has a fault of its own in the thread that makes pixels."""
    if rank == 1:
        object.__setattr__(feed.encoder, "pack", None)  # calling it is a TypeError
    train(feed, seen, case, rank)


def patient(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """The main threads do something else for longer than the limit, one having taken a step that others have not."""
    with feed.started(case.steps):
        if rank == 0:
            take(feed, seen)
        time.sleep(2.5)
        while len(seen.steps) < case.steps:
            take(feed, seen)


def deaf(feed: Feed, seen: Seen, case: Case, rank: int) -> None:
    """The last rank never makes a step; it is killed, or stopped, by the test."""
    if rank == 2:
        (Path(case.told["place"]) / "there").touch()
        while True:
            time.sleep(0.1)
    train(feed, seen, case, rank)


SCRIPTS: dict[str, Callable[[Feed, Seen, Case, int], None]] = {
    "train": train, "evaluate": evaluate, "lose file": lose_file, "broken": broken, "patient": patient, "deaf": deaf,
}  # fmt: skip


def run(case: Case, recipe: Recipe, place: Path, rank: int) -> Seen:
    """One case on this rank."""
    mesh, seen = recipe.parallel.mesh, Seen()
    peers = Peers.meet(mesh, rank, "127.0.0.1", partial(gather_by_files, place, rank, mesh.size))
    feed = Feed(recipe, DataSets(recipe.data), record_encoder(recipe), case.position, peers=peers)
    try:
        SCRIPTS[case.script](feed, seen, case, rank)
    except (DuetvlError, TypeError) as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


def main(place: Path, rank: int) -> None:
    """All cases that have such a rank."""
    for case in pickle.loads((place / "cases").read_bytes()):
        recipe = make_recipe(case.recipe)
        if rank < recipe.parallel.mesh.size:
            found = run(case, recipe, place / case.name, rank)
            part = place / case.name / f"part.{rank}"
            part.write_bytes(pickle.dumps(found))
            part.rename(place / case.name / f"seen.{rank}")


if __name__ == "__main__":
    from rank_process import main  # as what is pickled is of the module of this name

    main(Path(sys.argv[1]), int(sys.argv[2]))
