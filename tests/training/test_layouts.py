"""One run in many layouts, in real processes on both backends: the losses, gradients and weights of one process."""

from __future__ import annotations

from pathlib import Path

import layout_runs
import numpy as np
import pytest
from frameworks import FRAMEWORKS, need
from layout_runs import KINDS, LAYOUTS, run_dir

from duetvl.core.backend import load_backend
from duetvl.storage.finding import find_checkpoint
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

# Of each number of processes one start makes all its runs.
IN_CI = (
    "sft:2.5:tp2", "sft:2:tp2s", "sft:2:dp2",
    "sft:2.5:tp3", "lora:2:tp3s", "sft:2.5:dp3",
    "sft:2.5:tp4s", "sft:2:dp2tp2", "lora:2.5:dp2tp2s", "dpo:2:dp2tp2", "cached:2.5:dp2tp2s", "dora:2.5:dp2tp2z",
    "sft:2.5:pp2", "sft:2:pp4", "sft:2.5:pp2v2", "sft:2:pp2tp2", "sft:2.5:pp2dp2", "sft:2.5:cp2",
    "sft:2:cp3", "sft:2.5:cp2r", "lora:2:cp4r", "sft:2:pp2cp2", "dpo:2.5:dp2cp2", "cached:2:pp2cp2",
    "sft:2.5:cp4h", "cached:2.5:cp2tp2s",
    "sft:2.5:dp2z", "lora:2:dp2z", "dpo:2.5:dp2z",
)  # fmt: skip
# MindSpore takes several times as long: one run of each way to divide.
IN_CI_ON_MINDSPORE = (
    "sft:2.5:tp2", "sft:2.5:pp2v2", "sft:2.5:cp2r", "lora:2:tp3s", "sft:2:cp3", "sft:2:dp2tp2", "dpo:2.5:dp2cp2",
    "cached:2:pp2cp2", "lora:2:dp2z", "dpo:2.5:dp2z",
)  # fmt: skip
ALL = tuple(f"{kind}:{family}:{layout}" for kind in KINDS for family in ("2", "2.5") for layout in LAYOUTS)


class Runs:
    """Runs of a backend, made when one of them is first asked for: together with the others of as many processes."""

    def __init__(self, backend: str, place: Path, wanted: list[str]):
        self.backend, self.place, self.wanted = backend, place, wanted
        self.problems: dict[int, str] = {}
        self.alone: set[str] = set()

    def made(self, name: str) -> Path:
        processes = LAYOUTS[name.split(":")[2]].processes
        if processes not in self.problems:
            together = [other for other in self.wanted if LAYOUTS[other.split(":")[2]].processes == processes]
            self.problems[processes] = layout_runs.start(self.place, self.backend, together)
        directory = run_dir(self.place, self.backend, name)
        assert find_steps(directory) == 5, self.problems[processes]
        return directory

    def by_one_process(self, name: str) -> Path:
        kind, family, _ = name.split(":")
        alone = f"{kind}:{family}:one"
        if alone not in self.alone:
            be = load_backend(self.backend, device="cpu")
            train(layout_runs.recipe_of(self.place, self.backend, alone), backend=be)
            self.alone.add(alone)
        return run_dir(self.place, self.backend, alone)


def find_steps(directory: Path) -> int:
    return sum("loss" in row for row in read_metrics(directory))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("layouts")
    layout_runs.write_inputs(place)
    return place


@pytest.fixture(scope="module")
def known() -> dict[str, Runs]:
    """Of each backend: pytest takes the backends by turns, and makes `runs` anew at each."""
    return {}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, inputs: Path, known: dict[str, Runs]) -> Runs:
    need(request.param)
    if request.param in known:
        return known[request.param]
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    names = {spec.params["name"] for spec in chosen if spec and spec.params.get("runs") == request.param}
    known[request.param] = Runs(request.param, inputs, sorted(names & set(ALL)))
    return known[request.param]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        names = {backend: IN_CI_ON_MINDSPORE if backend == "mindspore" else IN_CI for backend in FRAMEWORKS}
        every = metafunc.config.getoption("--full")
        pairs = [(backend, name) for backend in FRAMEWORKS for name in (ALL if every else names[backend])]
        metafunc.parametrize(("runs", "name"), pairs, indirect=["runs"], scope="module")


def values(directory: Path, step: int, kind: str) -> dict[str, np.ndarray]:
    stored = find_checkpoint(directory, step).stored
    return {path: np.array(stored.read(kind, path)[0], np.float64) for path in stored.manifest.tensors[kind]}


def test_the_run_is_that_of_one_process(runs: Runs, name: str) -> None:
    found, expected = runs.made(name), runs.by_one_process(name)
    rows, wanted = ([row for row in read_metrics(run) if "loss" in row] for run in (found, expected))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in wanted], rel=1e-4)
    for key in ("tokens", "data_dropped", "total_tokens"):
        assert [row.get(key) for row in rows] == [row.get(key) for row in wanted], key
    evaluated, also = (
        [row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row] for run in (found, expected)
    )
    assert evaluated == pytest.approx(also, rel=1e-5)
    assert len(evaluated) == 3
    assert (found / "checkpoints/best").read_text() == (expected / "checkpoints/best").read_text()
    # After the first step the first moment is a tenth of the gradient.
    gradients, ours = values(expected, 1, "exp_avg"), values(found, 1, "exp_avg")
    assert ours.keys() == gradients.keys()
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    for path, gradient in gradients.items():
        allowed = 1e-5 * max(float(np.linalg.norm(gradient)), 1e-3 * whole)
        assert float(np.linalg.norm(ours[path] - gradient)) < allowed, path
    weights, ours = values(expected, 5, "weights"), values(found, 5, "weights")
    kind = name.split(":")[0]
    # What starts at zero is the sum of its updates, which near eps amplify the rounding of a gradient: most of all the
    # small ones of adapters.
    share = {"lora": 1e-4, "dora": 1e-4, "sft": 1e-5}.get(kind, 4e-5)
    for path, weight in weights.items():
        allowed = max(1e-6 * float(np.linalg.norm(weight)), share * KINDS[kind]["optim"]["lr"] * weight.size**0.5)
        assert float(np.linalg.norm(ours[path] - weight)) <= allowed, path
