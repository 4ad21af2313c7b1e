"""Every collective, its gradient, groups, pipelines and a split model, in four real processes per backend."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from frameworks import FRAMEWORKS

from .cases import CASES
from .world import World


@pytest.fixture(scope="session", params=list(FRAMEWORKS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """One start for all cases that this session has selected."""
    backend = request.param
    if find_spec(FRAMEWORKS[backend]) is None:
        pytest.skip(f"{FRAMEWORKS[backend]} is not installed")
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["case"] for spec in chosen if spec and spec.params.get("world") == backend}
    return World(backend, [name for name in CASES if name in names], tmp_path_factory.mktemp(backend))


@pytest.mark.parametrize("case", list(CASES))
def test_in_four_processes(world: World, case: str) -> None:
    problem = world.problem(case)
    assert not problem, problem
