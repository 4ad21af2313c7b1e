"""The one grid of ranks that every process group is a slice of."""

from __future__ import annotations

from dataclasses import dataclass

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
        place = np.unravel_index(rank, self.grid.shape)
        return {axis: int(at) for axis, at in zip(AXES, place, strict=True)}

    def ranks_along(self, *axes: str, rank: int) -> list[int]:
        """The ranks that differ from `rank` along the given axes only, in order: its group for these axes."""
        unknown = [axis for axis in axes if axis not in AXES]
        if unknown:
            raise ConfigError(f"the mesh has no axis {unknown[0]!r}; it has {', '.join(AXES)}")
        place = self.coordinates(rank)
        index = tuple(slice(None) if axis in axes else place[axis] for axis in AXES)
        return [int(r) for r in self.grid[index].reshape(-1)]

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups along the given axes; together they hold every rank once."""
        found = {tuple(self.ranks_along(*axes, rank=rank)) for rank in range(self.size)}
        return [list(group) for group in sorted(found)]
