"""Intervals hold the truth as often as they say, and are defined where there is next to nothing to go by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from duetvl.evaluation.statistics import difference, interval, wilson


def simulated(generator: np.random.Generator, share: float, clusters: int) -> tuple[list[float], list[int]]:
    """Right and wrong answers to two questions on each of some pictures, of which some are hard."""
    hard = generator.beta(2 * share, 2 * (1 - share), clusters)
    values = generator.random((clusters, 2)) < hard[:, None]
    return values.ravel().astype(float).tolist(), np.repeat(np.arange(clusters), 2).tolist()


def test_95_of_100_intervals_hold_the_truth() -> None:
    generator = np.random.Generator(np.random.PCG64(5))
    held = [
        result.low <= 0.7 <= result.high for result in (interval(*simulated(generator, 0.7, 100)) for _ in range(1000))
    ]
    assert 930 <= sum(held) <= 968


def test_questions_on_one_picture_count_as_little_more_than_one() -> None:
    generator = np.random.Generator(np.random.PCG64(6))
    values = (generator.random(100) < 0.6).astype(float)
    apart = interval(values.tolist(), list(range(100)))
    together = interval(np.repeat(values, 4).tolist(), np.repeat(np.arange(100), 4).tolist())
    naive = interval(np.repeat(values, 4).tolist(), list(range(400)))
    assert together.mean == apart.mean and together.method == "bootstrap"
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high))
    assert (naive.high - naive.low) / (apart.high - apart.low) == pytest.approx(0.5, abs=0.05)
    deviation = math.sqrt(values.var() / 100)
    assert (apart.low, apart.high) == pytest.approx(
        (values.mean() - 1.96 * deviation, values.mean() + 1.96 * deviation), abs=0.015
    )
    assert interval(values.tolist(), list(range(100))) == apart  # the same figures every time


def test_graded_values() -> None:
    """Values between 0 and 1, all of them different."""
    values = np.linspace(0.2, 0.9, 500)
    result = interval(values.tolist(), list(range(500)))
    half = 1.96 * values.std() / math.sqrt(500)
    assert (result.low, result.high) == pytest.approx((0.55 - half, 0.55 + half), abs=0.003)


def test_wilson() -> None:
    """The figures of the formula's textbook examples."""
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(1.0, 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.9, 20) == pytest.approx((0.6990, 0.9721), abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 29, 500])
def test_all_right_and_all_wrong(value: float, count: int) -> None:
    result = interval([value] * count, list(range(count)))
    assert result.method == "wilson" and result.mean == value
    assert (result.low, result.high) == wilson(value, count)
    assert 0 <= result.low <= value <= result.high <= 1 and result.high - result.low > 0.005


def test_few_clusters_are_few_whatever_the_questions() -> None:
    values = [1.0, 0.0] * 100
    result = interval(values, [number // 20 for number in range(200)])
    assert result.method == "wilson" and (result.low, result.high) == wilson(0.5, 10)
    with pytest.raises(ValueError, match="no mean of no values"):
        interval([], [])


def test_paired_runs() -> None:
    generator = np.random.Generator(np.random.PCG64(7))
    a = generator.random(400) < 0.6
    b = np.where(generator.random(400) < 0.1, True, a)  # B finds a few more, and loses none
    clusters = list(range(400))
    result = difference(a.tolist(), b.tolist(), clusters)
    gained = int((b & ~a).sum())
    assert (result.better, result.worse, result.equal) == (gained, 0, 400 - gained)
    assert result.mean == pytest.approx(gained / 400) and 0 < result.low < result.mean < result.high
    apart = interval(b.tolist(), clusters)
    assert result.high - result.low < (apart.high - apart.low) / 2  # most of the spread is the questions'
    assert result.chance == pytest.approx(2 * 0.5**gained)
    same = difference(a.tolist(), a.tolist(), clusters)
    assert (same.mean, same.low, same.high, same.chance) == (0, 0, 0, 1)
    back = difference(b.tolist(), a.tolist(), clusters)
    assert (back.mean, back.low, back.high) == pytest.approx((-result.mean, -result.high, -result.low), abs=0.004)
    assert difference([0.0], [1.0], ["one"]).mean == 1.0
