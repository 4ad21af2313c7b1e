"""ZeRO-3 (arXiv:1910.02054): of a block's weights each rank holds some rows, which are gathered where the block runs.

A block whose weights are held so has a leaf `gather` (`models.layout.gathered`). It brings all of them together by one
gather, as far as they have one team and one dtype and are all trained or all frozen. The gradient of that is the sum
over the ranks, in float32, of which each keeps its own rows. The block calls it inside of what is run again in the
backward pass, so that no gathered weight outlives the block, and the same gather happens there once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from duetvl.core.backend import Backend
from duetvl.core.boxes import Shape
from duetvl.core.params import Parameter, Weights
from duetvl.models.qwen_vl.sharding import block_of
from duetvl.parallel.differentiable import Team
from duetvl.parallel.division import ALONE, EVERYONE, REPLICAS, Division
from duetvl.parallel.units import Together, Unit, joined

Tensor = Any


@dataclass(frozen=True, eq=False)
class Gathering:
    """Leaves of one team and one dtype that travel together."""

    team: Team
    dtype: str
    together: Together

    def __call__(self, shards: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's rows of each -> what layers compute with of each; of their gradients a rank gets that of its
        rows, summed."""
        found = self.team.autograd.custom_vjp(self._gather, self._scatter)(*shards)
        return found if isinstance(found, tuple) else (found,)

    def _gather(self, needs: tuple[bool, ...], *shards: Tensor) -> tuple[Any, tuple[Any, ...]]:
        team, ops = self.team, self.team.ops
        flat = joined(ops, [ops.reshape(shard, (-1,)) for shard in shards])
        whole = team.collectives.all_gather(flat, team.group, self.together.sizes)
        units = zip(self.together.units, self.together.by_unit(ops, whole), strict=True)
        leaves = tuple(unit.narrowed(ops, x) for unit, x in units)
        return leaves if len(leaves) > 1 else leaves[0], ()

    def _scatter(self, needs: tuple[bool, ...], kept: tuple[Any, ...], *gradients: Tensor) -> tuple[Tensor, ...]:
        team, ops, units = self.team, self.team.ops, self.together.units
        flat = self.together.by_rank(ops, [u.widened(ops, d) for u, d in zip(units, gradients, strict=True)])
        own = team.collectives.reduce_scatter(ops.cast(flat, "float32"), team.group, self.together.sizes)
        pieces = self.together.of_rank(ops, own, team.index)
        return tuple(self._of_rows(unit, piece) for unit, (piece,) in zip(units, pieces, strict=True))

    def _of_rows(self, unit: Unit, piece: Tensor) -> Tensor:
        """The gradient of a unit's rows that are here, from the flat sum of them."""
        ops, copies = self.team.ops, unit.sharing.copies
        complete = piece if copies == 1 else piece * (1.0 / copies)
        shape = (len(unit.rows[self.team.index]), *unit.sharing.unit.shape[1:])
        return ops.cast(ops.reshape(complete, shape), self.dtype)


@dataclass(frozen=True, eq=False)
class BlockGather:
    """The leaf `gather` of a block: paths of its leaves, and how they come together."""

    parts: Sequence[tuple[Sequence[str], Gathering]]

    def __call__(self, w: Weights) -> Weights:
        """The block with whole leaves."""
        leaves: dict[str, Tensor] = {}
        for paths, gathering in self.parts:
            leaves.update(zip(paths, gathering([w.leaves[path] for path in paths]), strict=True))
        return w.over(leaves)


@dataclass(frozen=True, eq=False)
class Gathers:
    """Of the leaves that a rank has some rows of, how they are gathered; by default it has all of each."""

    division: Division = ALONE
    teams: Mapping[tuple[str, ...], Team] = field(default_factory=dict)
    _units: dict[str, Unit | None] = field(default_factory=dict)

    @classmethod
    def of(cls, division: Division, backend: Backend) -> Gathers:
        """All ranks of the run call it together."""
        axes = {REPLICAS, EVERYONE} if division.zero == 3 else set()
        return cls(division, {a: Team.of(backend, division.groups(a)) for a in sorted(axes)})

    def records(self, parameters: Mapping[str, Parameter]) -> Mapping[str, BlockGather]:
        """By their paths, the leaves `gather` of all blocks that need one."""
        if not self.teams:
            return {}
        blocks: dict[str, dict[tuple[Any, ...], list[str]]] = {}
        for path, parameter in parameters.items():
            unit = self._unit(path, parameter.place.whole)
            if unit is not None:
                kind = unit.sharing.axes, self._ops.dtype_of(parameter.tensor), parameter.trainable
                blocks.setdefault(f"{block_of(path)}.gather", {}).setdefault(kind, []).append(path)
        return {
            name: BlockGather([(paths, self._gathering(paths, *kind[:2])) for kind, paths in kinds.items()])
            for name, kinds in blocks.items()
        }

    def whole(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        """What layers compute with of a parameter, whose whole has this shape. The ranks that hold rows of it call it
        together."""
        unit = self._unit(path, shape)
        if unit is None:
            return tensor
        return self._gathering([path], unit.sharing.axes, self._ops.dtype_of(tensor))([tensor])[0]

    def _gathering(self, paths: Sequence[str], axes: tuple[str, ...], dtype: str) -> Gathering:
        units = [unit for path in paths if (unit := self._units[path]) is not None]
        return Gathering(self.teams[axes], dtype, Together(units))

    def _unit(self, path: str, shape: Shape) -> Unit | None:
        """None: this rank has all of what it computes with."""
        if path not in self._units:
            division, unit = self.division, None
            if division.is_sharded(path, shape):
                sharing = division.sharing_used(path, shape)
                unit = Unit.of(sharing, division.used(path, shape).shape, self.teams[sharing.axes].size, path)
            self._units[path] = unit
        return self._units[path]

    @cached_property
    def _ops(self) -> Any:
        return next(iter(self.teams.values())).ops
