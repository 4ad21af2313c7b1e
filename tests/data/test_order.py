"""The order of records: literals first, as it may never change."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from counting import write
from hypothesis import given, settings
from hypothesis import strategies as st

from duetvl.core.errors import DataError
from duetvl.data.loading.order import Mixture, RecordCursor, choice
from duetvl.data.sources.catalog import Records


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Records:
    return Records([write(tmp_path_factory.mktemp("ten") / "a.jsonl", 10)])


def numbers(refs) -> list[int]:
    return [ref.number - 1 for ref in refs]


def test_the_order_is_a_literal(ten):
    """A checkpoint says where in this order a run is: the same on every machine and version of numpy."""
    cursor = RecordCursor(ten, Mixture([10], seed=0))
    assert numbers(cursor.take(20)) == EPOCHS_OF_SEED_0
    assert cursor.position() == {"epoch": 2, "index": 0, "records": 10}
    assert numbers(RecordCursor(ten, Mixture([10], seed=1)).take(10)) != EPOCHS_OF_SEED_0[:10]


EPOCHS_OF_SEED_0 = [3, 6, 0, 1, 2, 5, 7, 9, 4, 8, 4, 0, 6, 2, 1, 3, 9, 8, 7, 5]


def test_without_shuffling_the_order_is_that_of_the_file(ten):
    cursor = RecordCursor(ten, Mixture([10], seed=0, shuffle=False), position={"epoch": 0, "index": 8, "records": 10})
    assert numbers(cursor.take(4)) == [8, 9, 0, 1]
    assert cursor.epoch == 1


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 12), max_size=6))
def test_steps_of_any_size_go_through_one_sequence(ten, sizes):
    whole = RecordCursor(ten, Mixture([10], seed=5)).take(sum(sizes) + 1)
    position, seen = None, []
    for size in sizes:
        cursor = RecordCursor(ten, Mixture([10], seed=5), position=position)
        seen += cursor.take(size)
        position = cursor.position()
    assert seen == whole[: len(seen)]


def test_a_position_in_other_data_is_an_error(ten):
    with pytest.raises(DataError, match="has 10 records, but the checkpoint's data position is one of 9"):
        RecordCursor(ten, Mixture([10], seed=0), position={"epoch": 0, "index": 5, "records": 9})
    with pytest.raises(DataError, match="data position 10 lies outside the 10 records"):
        RecordCursor(ten, Mixture([10], seed=0), position={"epoch": 0, "index": 10, "records": 10})
    with pytest.raises(DataError, match="that of a stream"):
        RecordCursor(ten, Mixture([10], seed=0), position={"epoch": 0, "next": 1})


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_mixtures_are_literals():
    plain = Mixture([4, 3], [1.0, 2.0], seed=0, shuffle=False)
    assert plain.epoch(0).tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6]
    assert plain.per_epoch == 10
    half = Mixture([6], [0.5], seed=0, shuffle=False)
    assert [half.epoch(e).tolist() for e in range(3)] == [[1, 4, 5], [0, 2, 3], [1, 4, 5]]
    shuffled = Mixture([4, 3], [0.5, 2.0], seed=3)
    assert [shuffled.epoch(e).tolist() for e in range(2)] == EPOCHS_OF_SEED_3


EPOCHS_OF_SEED_3 = [[6, 5, 4, 4, 0, 2, 5, 6], [5, 1, 3, 5, 4, 6, 6, 4]]


def test_one_source_of_weight_one_is_a_plain_permutation():
    assert Mixture([10], [1.0], seed=0).epoch(1).tolist() == EPOCHS_OF_SEED_0[10:]
    assert Mixture([4, 6], [1.0, 1.0], seed=0).epoch(1).tolist() == EPOCHS_OF_SEED_0[10:]


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.3]), min_size=3, max_size=3),
    seed=st.integers(0, 5),
)
def test_over_epochs_every_record_comes_as_often_as_its_weight_says(counts, weights, seed):
    mixture = Mixture(counts, weights[: len(counts)], seed=seed)
    seen: Counter[int] = Counter()
    for epoch in range(20):
        now = Counter(mixture.epoch(epoch).tolist())
        seen += now
        for source, weight in enumerate(weights[: len(counts)]):
            first = sum(counts[:source])
            items = range(first, first + counts[source])
            assert all(int(weight) <= now[item] <= int(weight) + 1 for item in items)
            assert abs(sum(now[item] for item in items) - weight * counts[source]) < 1
    for source, weight in enumerate(weights[: len(counts)]):
        first = sum(counts[:source])
        assert all(seen[item] == round(20 * weight) for item in range(first, first + counts[source]))


def test_a_choice_is_a_literal():
    assert choice(0, "max_samples", 0, 10, 4).tolist() == CHOSEN
    assert choice(0, "max_samples", 0, 3, 4).tolist() == [0, 1, 2]
    assert choice(0, "max_samples", 0, 3, None).tolist() == [0, 1, 2]


CHOSEN = [6, 7, 8, 9]


def test_chosen_records_stand_for_the_items(ten):
    cursor = RecordCursor(ten, Mixture([3], seed=0, shuffle=False), np.array([2, 5, 7]))
    assert numbers(cursor.take(4)) == [2, 5, 7, 2]
