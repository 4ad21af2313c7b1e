"""The grid of ranks, on paper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetvl.core.errors import ConfigError
from duetvl.core.mesh import AXES, Mesh

degrees = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})


def test_neighbours_are_tensor_parallel() -> None:
    mesh = Mesh(pp=2, tp=2)
    assert mesh.ranks_along("tp", rank=3) == [2, 3]
    assert mesh.ranks_along("pp", rank=3) == [1, 3]
    assert mesh.groups("tp") == [[0, 1], [2, 3]]
    assert mesh.groups("pp") == [[0, 2], [1, 3]]


def test_three_axes() -> None:
    mesh = Mesh(pp=2, dp=3, tp=2)
    assert mesh.coordinates(9) == {"pp": 1, "dp": 1, "cp": 0, "tp": 1}
    assert mesh.ranks_along("dp", rank=9) == [7, 9, 11]
    assert mesh.ranks_along("pp", "dp", rank=0) == [0, 2, 4, 6, 8, 10]


def test_gradients_are_summed_over_data_and_context() -> None:
    assert Mesh(dp=2, cp=2, tp=2).groups("dp", "cp") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_one_rank() -> None:
    assert Mesh().size == 1
    assert Mesh().groups("dp") == [[0]]


@given(degrees, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_are_ascending_and_hold_every_rank_once(sizes: dict[str, int], axes: set[str]) -> None:
    mesh = Mesh(**sizes)
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    for group in groups:
        assert group == sorted(group)
        assert all(mesh.ranks_along(*axes, rank=rank) == group for rank in group)


@given(degrees)
def test_coordinates_name_each_rank_once(sizes: dict[str, int]) -> None:
    mesh = Mesh(**sizes)
    places = [mesh.coordinates(rank) for rank in range(mesh.size)]
    assert [mesh.grid[tuple(place[axis] for axis in AXES)] for place in places] == list(range(mesh.size))


def test_degrees_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="'tp': 0"):
        Mesh(tp=0)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'sp'.*pp, dp, cp, tp"):
        Mesh().groups("sp")
