"""Every collective, its gradient, groups, pipelines and a split model, in four real processes per backend."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from frameworks import FRAMEWORKS

from .cases import CASES
from .world import World

# These need nothing of a backend that others do not need as well, and MindSpore takes seven times as long.
TORCH_ALONE_IN_CI = {
    "whole_runs_watching", "whole_runs_stops", "whole_runs_bad_record_of_one_rank", "whole_runs_odd_sizes",
    "context_steps_context_in_pipelines", "context_steps_context_of_pairs", "steps_preferences", "steps_adapters",
    "steps_pipelines_together", "steps_overflow", "a_model_over_context_and_tensor_parallelism",
    "a_model_over_rings_of_ranks_that_exchange_heads", "adapters_of_every_kind_of_layer",
    "pairs_over_context_parallelism", "adapters_over_context_parallelism",
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--full")
    pairs = [
        (backend, case)
        for backend in FRAMEWORKS
        for case in CASES
        if every or backend != "mindspore" or case not in TORCH_ALONE_IN_CI
    ]
    metafunc.parametrize(("world", "case"), pairs, indirect=["world"], scope="session")


@pytest.fixture(scope="session")
def worlds() -> dict[str, World]:
    """Those that were started: pytest takes the backends by turns, and makes `world` anew at each."""
    return {}


@pytest.fixture(scope="session")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worlds: dict[str, World]) -> World:
    """One start for all cases that this session has selected."""
    backend = request.param
    if backend in worlds:
        return worlds[backend]
    if find_spec(FRAMEWORKS[backend]) is None:
        pytest.skip(f"{FRAMEWORKS[backend]} is not installed")
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["case"] for spec in chosen if spec and spec.params.get("world") == backend}
    worlds[backend] = World(backend, [name for name in CASES if name in names], tmp_path_factory.mktemp(backend))
    return worlds[backend]


def test_in_four_processes(world: World, case: str) -> None:
    problem = world.problem(case)
    assert not problem, problem
