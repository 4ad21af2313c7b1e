"""The learning rate against transformers' schedules, and literals."""

from __future__ import annotations

import pytest

from duetvl.training.recipe.sections import OptimSection
from duetvl.training.schedule import learning_rate, warmup_steps


def rates(total: int, **fields) -> list[float]:
    optim = OptimSection(lr=2.0, **fields)
    return [learning_rate(step, total, optim) for step in range(total)]


def test_literals():
    assert rates(4, schedule="constant") == [2.0] * 4
    assert rates(4, schedule="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(6, schedule="linear", warmup=2) == [0.0, 1.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(4, schedule="cosine") == pytest.approx([2.0, 1.7071067811865475, 1.0, 0.2928932188134524])
    assert rates(2, schedule="linear", min_lr_ratio=0.5) == [2.0, 1.5]


def test_warmup_is_a_fraction_or_steps():
    assert [warmup_steps(w, 25) for w in (0, 0.1, 0.5, 1, 7, 100)] == [0, 3, 13, 1, 7, 100]
    assert rates(4, warmup=100)[-1] == pytest.approx(2.0 * 3 / 100)


@pytest.mark.parametrize("total", [1, 10, 37])
@pytest.mark.parametrize("warmup", [0, 3, 0.2])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_same_as_transformers(total, warmup, name):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    theirs = "constant_with_warmup" if name == "constant" else name
    schedule = get_scheduler(theirs, optimizer, warmup_steps(warmup, total), total)
    expected = []
    for _ in range(total):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(total, schedule=name, warmup=warmup) == pytest.approx(expected, rel=1e-12)
