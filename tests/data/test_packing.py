"""How a step is cut into micro-batches, and which rank gets which."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from duetvl.data.loading.packing import assign, pack


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


def test_packs_bounded_in_patches_are_literals():
    assert pack([1, 1, 1, 1], 10, [4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert pack([9, 1, 1, 9], 10, [0, 8, 1, 0], 8) == [[0, 1], [2, 3]]
    assert pack([1, 1], 10, [9, 0], 8) == [[0], [1]]
    assert pack([3, 7, 5, 2, 3], 10, [0] * 5, 8) == pack([3, 7, 5, 2, 3], 10)


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), max_size=30)


@given(sizes=sizes, tokens=st.integers(1, 40), patches=st.integers(1, 30))
def test_both_bounds_are_kept(sizes, tokens, patches):
    packs = pack([t for t, _ in sizes], tokens, [p for _, p in sizes], patches)
    assert sorted(i for members in packs for i in members) == list(range(len(sizes)))
    for members in packs:
        total = [sum(sizes[i][kind] for i in members) for kind in (0, 1)]
        assert len(members) == 1 or (total[0] <= tokens and total[1] <= patches)


def test_ranks_are_literals():
    """The heaviest goes first; then whoever has least."""
    costs = [(100, 0), (10, 0), (10, 0), (80, 0)]
    assert assign(costs, 1) == [[0, 1, 2, 3]]
    assert assign(costs, 2) == [[0, 2], [1, 3]]
    assert assign(costs[:3], 2) == [[0], [1, 2]]
    assert assign([(50, 8), (50, 0), (50, 0), (50, 8)], 2) == [[0, 1], [2, 3]]
    assert assign([], 2) == [[], []]
    assert assign([(1, 0)], 3) == [[0], [], []]


@given(costs=st.lists(st.tuples(st.integers(1, 99), st.integers(0, 99)), max_size=24), dp=st.integers(1, 6))
def test_ranks_get_every_pack_once_and_as_many_each(costs, dp):
    ranks = assign(costs, dp)
    assert sorted(i for packs in ranks for i in packs) == list(range(len(costs)))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= (1 if len(costs) % dp else 0)
    assert all(packs == sorted(packs) for packs in ranks)
    assert ranks == assign(costs, dp)
