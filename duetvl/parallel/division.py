"""How a run's grid of ranks divides a model: numbers alone, so that any rank can be asked about on any machine.

A parameter lies on the ranks in one of three ways. Either tensor parallelism cuts it, and the ranks of data parallelism
hold the same part; or every rank of both holds all of it; or ranks of tensor parallelism hold rows that overlap, which
are key and value heads that several of them need. What the same numbers are held by is one `Sharing`: its ranks sum
their gradients once, divide the update among themselves by rows (ZeRO-1) and hand the new rows to each other.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, Literal

from duetvl.core.boxes import LocalPart, Shape
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.stages import ONE_STAGE, Stages
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.sharding import FEATURES, Heads, Owner, block_of, owner_of, shard_of, slices_of

VisionMode = Literal["divide", "shard"]
ZeroMode = Literal[1, 3]
REPLICAS: Final = ("dp", "cp")  # axes of the grid along which ranks hold the same part of what is cut
EVERYONE: Final = ("dp", "cp", "tp")  # and of what is not
ENDS: Final = "ends"  # in the place of an axis: the two stages that have a tied embedding
EMBEDDING: Final = "model.embed_tokens.weight"
_ONE_OF_EACH: Final = Heads(1, 1, 1)


@dataclass(frozen=True)
class Sharing:
    """Which ranks hold a parameter together, and what this rank has of it.

    axes: of the grid, or `ENDS`; the ranks along them share (`Division.team`). unit: what they hold together. first:
    the row of the unit that this rank's own rows begin at. copies: how many of them compute the same whole gradient
    (where each computes a part of the sum, 1), so that the sum over the ranks is this often the gradient.
    """

    axes: tuple[str, ...]
    unit: LocalPart
    first: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Division:
    """How a model lies on a grid of ranks, as one rank sees it.

    sequence: norms and residuals of the language model are divided along the sequence over the ranks of tensor
    parallelism. vision: whether these ranks "divide" the frames of the vision tower among themselves, each with all of
    its weights, or "shard" its layers. stages: which layers each stage of the model has, stage s being on the ranks
    whose place along `pp` is s % pp. tied: whether the embedding is the last product's matrix too. ulysses: how many
    ranks of context parallelism exchange heads with each other, while these teams pass keys and values round; `cp` or 1
    where there is but one of the two.
    """

    mesh: Mesh = field(default_factory=Mesh)
    heads: Heads = _ONE_OF_EACH
    rank: int = 0
    sequence: bool = False
    vision: VisionMode = "divide"
    stages: Stages = ONE_STAGE
    tied: bool = False
    ulysses: int = 1
    zero: ZeroMode = 1

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        mesh: Mesh,
        rank: int,
        *,
        sequence: bool = False,
        vision: VisionMode = "divide",
        stages: Stages | None = None,
        ulysses: int | None = None,
        zero: ZeroMode = 1,
    ) -> Division:
        """That of a model. Raises ConfigError for degrees that it cannot have, which names those that it can.

        stages: None for the vision tower on the first and the language model evenly on all. ulysses: of the ranks of
        context parallelism, how many exchange heads with each other; None for all.
        """
        if zero == 3 and mesh.pp > 1:
            raise ConfigError(f"parallel.zero 3 with parallel.pp {mesh.pp}: stages do not gather weights; take pp 1")
        heads = Heads.of(config)
        limits = {"query heads": heads.query, "heads in the vision tower": heads.vision}
        for what in limits if vision == "shard" else ["query heads"]:
            if mesh.tp > (most := limits[what]):
                hint = "" if what == "query heads" else "; or divide frames instead: parallel.vision=divide"
                raise ConfigError(
                    f"parallel.tp {mesh.tp}: the model has {most} {what}, of which each rank needs one at least; "
                    f"possible are 1 to {most}, and with as many on every rank {_divisors(most)}{hint}"
                )
        if stages is None or mesh.pp == 1:
            stages = Stages.even(config.vision.depth, config.text.num_layers, mesh.pp)
        if not stages.language[-1]:
            raise ConfigError(
                "parallel.language_layers: the last stage has no layer of the language model, and the loss is computed "
                "there; give it one at least"
            )
        ulysses = mesh.cp if ulysses is None else ulysses
        if ulysses > (most := max(1, heads.query // mesh.tp)):
            raise ConfigError(
                f"parallel.cp {mesh.cp}: {ulysses} ranks would exchange heads, and a rank has {most} query heads; let "
                f"keys and values go round instead: parallel.cp_algorithm=ring, or hybrid with parallel.ulysses of at "
                f"most {most}"
            )
        return cls(mesh, heads, rank, sequence, vision, stages, config.tie_word_embeddings, ulysses, zero)

    def for_model(self, config: ModelConfig) -> Division:
        """The same of another model, such as a reference, whose layers are placed by default where it has others."""
        layers = config.vision.depth, config.text.num_layers
        stages = self.stages if self.stages.layers == layers else Stages.even(*layers, self.mesh.pp, self.virtual)
        return Division.of(
            config,
            self.mesh,
            self.rank,
            sequence=self.sequence,
            vision=self.vision,
            stages=stages,
            ulysses=self.ulysses,
            zero=self.zero,
        )

    @property
    def virtual(self) -> int:
        """Stages on each rank of the pipeline."""
        return self.stages.count // self.mesh.pp

    @property
    def holds_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.stages.count - 1 in self.own_stages

    @property
    def own_stages(self) -> range:
        """The stages of the model that this rank runs."""
        return range(self.place("pp"), self.stages.count, self.mesh.pp)

    def holds(self, path: str) -> bool:
        """Whether this rank has any of a parameter: whether it is one of its stages'."""
        if self.mesh.pp == 1:
            return True
        return any(stage % self.mesh.pp == self.place("pp") for stage in self.stages_of(path))

    def stages_of(self, path: str) -> Sequence[int]:
        """The stages that use a parameter, ascending: one, or of a tied embedding the first and the last."""
        first = self._stage(owner_of(path))
        if self.tied and path == EMBEDDING:
            return sorted({first, self._stage(Owner("language", "last"))})
        return [first]

    def _stage(self, owner: Owner) -> int:
        layers = self.stages.vision if owner.tower == "vision" else self.stages.language
        number = {"first": 0, "last": sum(layers) - 1}.get(str(owner.layer), owner.layer)
        return self.stages.holding(owner.tower, int(number))

    def team(self, axes: Sequence[str]) -> list[int]:
        """The ranks along some axes, `ENDS` among them, with this one, ascending."""
        if ENDS not in axes:
            return self.mesh.ranks_along(*axes, rank=self.rank)
        return next(ranks for ranks in self.groups(axes) if self.rank in ranks)

    def groups(self, axes: Sequence[str]) -> list[list[int]]:
        """All teams along some axes; together they hold every rank once."""
        groups = self.mesh.groups(*(axis for axis in axes if axis != ENDS))
        if ENDS not in axes:
            return groups
        first, last = (stage % self.mesh.pp for stage in self.stages_of(EMBEDDING))
        place = {rank: self.mesh.coordinates(rank)["pp"] for group in groups for rank in group}
        at_first = [group for group in groups if place[group[0]] == first]
        at_last = [group for group in groups if place[group[0]] == last]
        joined = [sorted([*a, *b]) for a, b in zip(at_first, at_last, strict=True)]
        return sorted([*joined, *(group for group in groups if place[group[0]] not in (first, last))])

    @property
    def teams(self) -> Sequence[tuple[str, ...]]:
        """The axes along which ranks of this grid may share a parameter, in an order that is the same on all of them,
        whatever each has of the model."""
        found: list[tuple[str, ...]] = [EVERYONE] if self.mesh.tp == 1 else [REPLICAS, EVERYONE, ("tp",)]
        return [*found, *([(*found[0], ENDS)] if self._spans_stages else []), *([()] if self.zero == 3 else [])]

    @cached_property
    def _spans_stages(self) -> bool:
        """Whether a tied embedding is on two ranks of the pipeline."""
        return len({stage % self.mesh.pp for stage in self.stages_of(EMBEDDING)}) > 1

    def place(self, axis: str) -> int:
        """This rank's number along an axis of the grid."""
        return self.mesh.place(axis, self.rank)

    def of_rank(self, rank: int) -> Division:
        """As another rank sees it."""
        return replace(self, rank=rank)

    def part(self, path: str, shape: Shape) -> LocalPart:
        """What this rank holds of a parameter whose whole has this shape."""
        if not self.is_sharded(path, shape):
            return self.used(path, shape)
        unit, team = self.sharing_used(path, shape), self._replicas(path, shape)
        rows = owned_range(unit.unit.shape[0], len(team), path, team.index(self.rank))
        return unit.unit.rows(rows.start, rows.stop)

    def used(self, path: str, shape: Shape) -> LocalPart:
        """What it computes with, which is what it holds, or is gathered where it is used (`is_sharded`)."""
        if self._is_whole(path):
            return LocalPart.all_of(shape)
        return LocalPart(tuple(shape), slices_of(path, shape, self.heads, self.place("tp"), self.mesh.tp))

    def sharing(self, path: str, shape: Shape) -> Sharing:
        """Who holds it too."""
        if self.is_sharded(path, shape):
            return Sharing((), self.part(path, shape))
        return self.sharing_used(path, shape)

    def sharing_used(self, path: str, shape: Shape) -> Sharing:
        """Who computes with it too."""
        own = self.used(path, shape)
        ends = (ENDS,) if path == EMBEDDING and self._spans_stages else ()
        if self._is_whole(path):
            return Sharing((*EVERYONE, *ends), own, copies=1 if self._is_partial(path) else self.mesh.tp)
        if shard_of(path).unit == "kv_head" and self._overlapping:
            return Sharing(EVERYONE, LocalPart.all_of(shape), own.slices.boxes[0].offset[0])
        return Sharing((*REPLICAS, *ends), own)

    def is_sharded(self, path: str, shape: Shape) -> bool:
        """Whether those who compute with the same numbers of a parameter hold some rows of it each: a block's weights
        with ZeRO-3. Adapters are not: they are small. Nor is what has fewer rows than they are."""
        if self.zero == 1 or is_adapter(path) or block_of(path) is None:
            return False
        return 1 < len(self._replicas(path, shape)) <= self.sharing_used(path, shape).unit.shape[0]

    def _replicas(self, path: str, shape: Shape) -> list[int]:
        """The ranks that compute with the same numbers of a parameter of a block."""
        return self.mesh.ranks_along(*self.sharing_used(path, shape).axes, rank=self.rank)

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


def owned_rows(rows: int, ranks: int, path: str) -> Sequence[range]:
    """The rows of a unit that each of `ranks` ranks updates: as even as can be, ascending.

    Those ranks have one more that follow the one that a checksum of the parameter's path gives: else the few rows of
    an adapter would all lie on the first ranks.
    """
    return [owned_range(rows, ranks, path, rank) for rank in range(ranks)]


def owned_range(rows: int, ranks: int, path: str, rank: int) -> range:
    """Those of one of them."""
    each, more = divmod(rows, ranks)
    first = zlib.crc32(path.encode()) % ranks  # of those with one more, which may begin again at rank 0
    before = max(0, min(rank, first + more) - first) + max(0, min(rank, first + more - ranks))
    start = rank * each + before
    return range(start, start + each + ((rank - first) % ranks < more))
