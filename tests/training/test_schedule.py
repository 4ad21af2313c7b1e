"""The learning rate against transformers' schedules, and literals."""

from __future__ import annotations

from fractions import Fraction

import pytest

from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.schedule import learning_rate, total_steps, warmup_steps


def rates(total: int, **fields) -> list[float]:
    optim = OptimSection(lr=2.0, **fields)
    return [learning_rate(step, total, optim) for step in range(total)]


def test_literals():
    assert rates(4, schedule="constant") == [2.0] * 4
    assert rates(4, schedule="linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(6, schedule="linear", warmup=2) == [0.0, 1.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(4, schedule="cosine") == pytest.approx([2.0, 1.7071067811865475, 1.0, 0.2928932188134524])
    assert rates(2, schedule="linear", min_lr_ratio=0.5) == [2.0, 1.5]
    assert rates(6, schedule="inverse_sqrt", warmup=1) == pytest.approx([0.0, 2.0, 2**0.5, 2 / 3**0.5, 1.0, 2 / 5**0.5])
    assert rates(8, schedule="wsd", warmup=2, decay=0.25) == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0])
    assert rates(4, schedule="wsd", warmup=2, decay=4, min_lr_ratio=0.5) == pytest.approx([0.0, 1.0, 2.0, 1.5])
    assert rates(20, schedule="wsd")[-3:] == pytest.approx([2.0, 2.0, 1.0])  # a tenth


def test_warmup_is_a_fraction_or_steps():
    assert [warmup_steps(w, 25) for w in (0, 0.1, 0.5, 1, 7, 100)] == [0, 3, 13, 1, 7, 100]
    assert rates(4, warmup=100)[-1] == pytest.approx(2.0 * 3 / 100)
    assert [warmup_steps(w, 100) for w in (0.07, 0.14, 0.28, 0.29, 1e-3)] == [7, 14, 28, 29, 1]


@pytest.mark.parametrize(
    ("epochs", "records", "batch", "steps"),
    [
        (0.1, 80, 8, 1), (1.1, 80, 8, 11), (0.7, 100, 10, 7), (2.3, 1000, 10, 230), (1.0, 81, 8, 11), (None, 16, 8, 2),
        (1e-9, 80, 8, 1), (0.3, Fraction(15), 9, 1), (3, 7, 7, 3),
    ],
)  # fmt: skip
def test_epochs_are_the_decimal_numbers_that_were_written(epochs, records, batch, steps):
    train = {"global_batch": batch} | ({} if epochs is None else {"epochs": float(epochs)})
    recipe = make_recipe({"model": {"path": "m"}, "data": {"train": "d"}, "train": train})
    assert total_steps(recipe, records) == steps


@pytest.mark.parametrize("total", [1, 10, 37])
@pytest.mark.parametrize("warmup", [0, 3, 0.2])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt", "wsd"])
def test_same_as_transformers(total, warmup, name):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    theirs = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}.get(name, name)
    warm = warmup_steps(warmup, total)
    decay = min(4, max(0, total - warm))
    own = {"num_decay_steps": decay, "num_stable_steps": max(0, total - warm - decay)} if name == "wsd" else {}
    schedule = get_scheduler(theirs, optimizer, warm, None if own else total, own)
    expected = []
    for _ in range(total):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    settings = {"decay": 4} if own else {}
    assert rates(total, schedule=name, warmup=warmup, **settings) == pytest.approx(expected, rel=1e-12)
