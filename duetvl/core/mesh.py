"""The one grid of ranks that every process group is a slice of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from duetvl.core.errors import ConfigError

AXES = ("pp", "dp", "cp", "tp")  # slowest first: ranks of one tensor-parallel group are neighbours


@dataclass(frozen=True)
class Mesh:
    """Degrees of pipeline, data, context and tensor parallelism; rank = ((pp * DP + dp) * CP + cp) * TP + tp."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        wrong = {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) < 1}
        if wrong:
            raise ConfigError(f"parallel degrees must be at least 1, found {wrong}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def grid(self) -> np.ndarray:
        """Ranks as an array (pp, dp, cp, tp)."""
        return np.arange(self.size).reshape(self.pp, self.dp, self.cp, self.tp)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank lies on each axis."""
        return dict(zip(AXES, _place(self, rank), strict=True))

    def place(self, axis: str, rank: int) -> int:
        """Where a rank lies on one axis."""
        return _place(self, rank)[AXES.index(axis)]

    def ranks_along(self, *axes: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` along the given axes only, in order: its group for these axes."""
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            raise ConfigError(f"the mesh has no axis {unknown[0]!r}; it has {', '.join(AXES)}")
        return list(_along(self, axes, rank))

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups along the given axes; together they hold every rank once."""
        found = {tuple(self.ranks_along(*axes, rank=rank)) for rank in range(self.size)}
        return [list(group) for group in sorted(found)]


# Of a grid of a thousand ranks both are asked for again and again, once or more for each parameter.
@lru_cache(maxsize=4096)
def _place(mesh: Mesh, rank: int) -> tuple[int, ...]:
    return tuple(int(at) for at in np.unravel_index(rank, (mesh.pp, mesh.dp, mesh.cp, mesh.tp)))


@lru_cache(maxsize=4096)
def _along(mesh: Mesh, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
    place = mesh.coordinates(rank)
    index = tuple(slice(None) if axis in axes else place[axis] for axis in AXES)
    return tuple(int(one) for one in mesh.grid[index].reshape(-1))
