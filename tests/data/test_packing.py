"""The order of samples and their packs: literals first, as neither may ever change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duetvl.core.errors import DataError
from duetvl.data.packing import Order, Position, pack


def test_the_order_is_a_literal():
    """A checkpoint says where in this order a run is: the same on every machine and version of numpy."""
    assert Order(10, seed=0).take(Position(), 20)[0] == EPOCHS_OF_SEED_0
    assert Order(10, seed=1).take(Position(), 10)[0] != EPOCHS_OF_SEED_0[:10]


EPOCHS_OF_SEED_0 = [3, 6, 0, 1, 2, 5, 7, 9, 4, 8, 4, 0, 6, 2, 1, 3, 9, 8, 7, 5]


def test_every_epoch_holds_every_record_once():
    order = Order(7, seed=3)
    chosen, end = order.take(Position(), 21)
    epochs = np.array(chosen).reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert end == Position(3, 0)


def test_without_shuffling_the_order_is_that_of_the_file():
    assert Order(3, seed=0, shuffle=False).take(Position(0, 1), 5) == ([1, 2, 0, 1, 2], Position(2, 0))


@given(records=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), max_size=6))
def test_steps_of_any_size_go_through_one_sequence(records, sizes):
    whole, _ = Order(records, seed=5).take(Position(), sum(sizes) + 1)
    position, seen = Position(), []
    for size in sizes:
        part, position = Order(records, seed=5).take(position, size)
        seen += part
    assert seen == whole[: len(seen)]
    assert position == Position(*divmod(len(seen), records))


def test_a_position_beyond_the_records_is_an_error():
    with pytest.raises(DataError, match="position 5 lies outside the 5 records"):
        Order(5, seed=0).take(Position(0, 5), 1)


def test_packs_are_literals():
    assert pack([3, 7, 5, 2, 3], 10) == [[0, 1], [2, 3, 4]]
    assert pack([10, 1, 10, 9], 10) == [[0], [1, 3], [2]]
    assert pack([5, 5, 5], 5) == [[0], [1], [2]]
    assert pack([99, 1, 2], 10) == [[0], [1, 2]]
    assert pack([], 10) == []


@given(lengths=st.lists(st.integers(1, 30), max_size=40), limit=st.integers(1, 40))
def test_packs_hold_every_sample_once_and_in_order(lengths, limit):
    packs = pack(lengths, limit)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(members == sorted(members) for members in packs)
    assert [members[0] for members in packs] == sorted(members[0] for members in packs)
    assert all(sum(lengths[i] for i in members) <= limit or len(members) == 1 for members in packs)
    filled = sorted(sum(lengths[i] for i in members) for members in packs)
    assert len(filled) < 2 or filled[0] + filled[1] > limit  # no two packs could have been one
