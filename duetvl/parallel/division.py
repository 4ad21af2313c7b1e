"""How a run's grid of ranks divides a model: numbers alone, so that any rank can be asked about on any machine.

A parameter lies on the ranks in one of three ways. Either tensor parallelism cuts it, and the ranks of data parallelism
hold the same part; or every rank of both holds all of it; or ranks of tensor parallelism hold rows that overlap, which
are key and value heads that several of them need. What the same numbers are held by is one `Sharing`: its ranks sum
their gradients once, divide the update among themselves by rows (ZeRO-1) and hand the new rows to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from duetvl.core.boxes import Part, Shape
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.sharding import FEATURES, Heads, shard_of, slices_of

VisionMode = Literal["divide", "shard"]
REPLICAS: Final = ("dp",)  # axes of the grid along which ranks hold the same part of what is cut
EVERYONE: Final = ("dp", "tp")  # and of what is not
_ONE_OF_EACH: Final = Heads(1, 1, 1)


@dataclass(frozen=True)
class Sharing:
    """Which ranks hold a parameter together, and what this rank has of it.

    axes: of the grid; the ranks along them share. unit: what they hold together. first: the row of the unit that this
    rank's own rows begin at. copies: how many of them compute the same whole gradient (where each computes a part of
    the sum, 1), so that the sum over the ranks is this often the gradient.
    """

    axes: tuple[str, ...]
    unit: Part
    first: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Division:
    """How a model lies on a grid of ranks, as one rank sees it.

    sequence: norms and residuals of the language model are divided along the sequence over the ranks of tensor
    parallelism. vision: whether these ranks "divide" the frames of the vision tower among themselves, each with all of
    its weights, or "shard" its layers.
    """

    mesh: Mesh = field(default_factory=Mesh)
    heads: Heads = _ONE_OF_EACH
    rank: int = 0
    sequence: bool = False
    vision: VisionMode = "divide"

    @classmethod
    def of(
        cls, config: ModelConfig, mesh: Mesh, rank: int, *, sequence: bool = False, vision: VisionMode = "divide"
    ) -> Division:
        """That of a model. Raises ConfigError for degrees that it cannot have, which names those that it can."""
        heads = Heads.of(config)
        limits = {"query heads": heads.query, "heads in the vision tower": heads.vision}
        for what in limits if vision == "shard" else ["query heads"]:
            if mesh.tp > (most := limits[what]):
                hint = "" if what == "query heads" else "; or divide frames instead: parallel.vision=divide"
                raise ConfigError(
                    f"parallel.tp {mesh.tp}: the model has {most} {what}, of which each rank needs one at least; "
                    f"possible are 1 to {most}, and with as many on every rank {_divisors(most)}{hint}"
                )
        return cls(mesh, heads, rank, sequence, vision)

    def for_model(self, config: ModelConfig) -> Division:
        """The same of another model, such as a reference."""
        return Division.of(config, self.mesh, self.rank, sequence=self.sequence, vision=self.vision)

    def place(self, axis: str) -> int:
        """This rank's number along an axis of the grid."""
        return self.mesh.coordinates(self.rank)[axis]

    def of_rank(self, rank: int) -> Division:
        """As another rank sees it."""
        return replace(self, rank=rank)

    def part(self, path: str, shape: Shape) -> Part:
        """What this rank holds of a parameter whose whole has this shape."""
        if self._is_whole(path):
            return Part.all_of(shape)
        return Part(tuple(shape), slices_of(path, shape, self.heads, self.place("tp"), self.mesh.tp))

    def sharing(self, path: str, shape: Shape) -> Sharing:
        """Who holds it too."""
        own = self.part(path, shape)
        if self._is_whole(path):
            return Sharing(EVERYONE, own, copies=1 if self._is_partial(path) else self.mesh.tp)
        if shard_of(path).unit == "kv_head" and self._overlapping:
            return Sharing(EVERYONE, Part.all_of(shape), own.slices.boxes[0].offset[0])
        return Sharing(REPLICAS, own)

    def _is_whole(self, path: str) -> bool:
        """Whether every rank of tensor parallelism has all of a parameter."""
        divided_tower = self.vision == "divide" and path.startswith("visual.")
        return self.mesh.tp == 1 or divided_tower or shard_of(path).axis is None

    def _is_partial(self, path: str) -> bool:
        """Whether each rank of tensor parallelism computes but its part of the gradient of what all of them have.

        That is so for all of a tower whose frames are divided; for norms along a divided sequence; for the bias that is
        added to features of which each rank has some; and for the half of an adapter that is not cut with its layer,
        DoRA's magnitudes of row-parallel layers among them.
        """
        if path.startswith("visual."):
            return self.vision == "divide" or path == f"{FEATURES}.bias" or is_adapter(path)
        return self.sequence or is_adapter(path)

    @property
    def _overlapping(self) -> bool:
        """Whether any key and value head is held by several ranks of tensor parallelism."""
        tp = self.mesh.tp
        held = [self.heads.held("kv_head", rank, tp) for rank in range(tp)]
        return sum(len(found[0]) for found in held if found is not None) > self.heads.kv


ALONE: Final = Division()


def _divisors(number: int) -> str:
    return ", ".join(str(one) for one in range(1, number + 1) if number % one == 0)


def dealt(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the pieces of these sizes each rank gets, ascending: the largest first, to the rank that has least."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        rank = loads.index(min(loads))
        found[rank].append(piece)
        loads[rank] = loads[rank] + sizes[piece]
    return [sorted(pieces) for pieces in found]


def owned_rows(rows: int, ranks: int, number: int) -> Sequence[range]:
    """The rows of a unit that each of `ranks` ranks updates: as even as can be, ascending.

    Those ranks have one more that follow the rank `number` % `ranks`, where `number` is the parameter's in the list of
    all: else the few rows of an adapter would all lie on the first ranks.
    """
    each, more = divmod(rows, ranks)
    start, found = 0, []
    for rank in range(ranks):
        stop = start + each + ((rank - number) % ranks < more)
        found.append(range(start, stop))
        start = stop
    return found
