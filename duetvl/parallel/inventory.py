"""Which parameters the ranks of a run have together: one of a pipeline has those of its own stages alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from duetvl.core.backend import Backend
from duetvl.core.boxes import Shape
from duetvl.core.params import Parameter
from duetvl.core.ranks import Ranks
from duetvl.parallel.division import Division


@dataclass(frozen=True)
class Entry:
    """A parameter: the shape of the whole of it, its storage dtype, and whether it is trained."""

    shape: Shape
    dtype: str
    trainable: bool


Inventory = Mapping[str, Entry]  # by path


def own_entries(parameters: Iterable[Parameter], backend: Backend) -> Inventory:
    """Those of these parameters, in their order."""
    return {p.path: Entry(p.place.whole, backend.ops.dtype_of(p.tensor), p.trainable) for p in parameters}


def inventory(parameters: Iterable[Parameter], backend: Backend, division: Division) -> Inventory:
    """Those of all ranks, stage by stage, the same on all. `parameters` are this rank's; all ranks call it together."""
    speaks = all(division.place(axis) == 0 for axis in ("dp", "cp", "tp"))  # others have the same
    own = own_entries(parameters, backend) if speaks else {}
    told = Ranks(backend.collectives).each(own)
    return {path: entry for entries in told for path, entry in entries.items()}
