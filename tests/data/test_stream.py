"""The order of a stream: a literal, as it may never change, and what holds for every stream."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
from counting import write
from hypothesis import given, settings
from hypothesis import strategies as st

from duetvl.core.errors import DataError
from duetvl.data.loading.order import Mixture
from duetvl.data.loading.stream import StreamCursor, StreamSource
from duetvl.data.sources import json_files
from duetvl.data.sources.catalog import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> StreamSource:
    """Two sources of 20 and 6 records in shards of about two, and one of a list."""
    directory = tmp_path_factory.mktemp("stream")
    write(directory / "a.jsonl", 20)
    write(directory / "b.jsonl", 6)
    (directory / "c.json").write_text(json.dumps([{"n": n} for n in range(5)]))
    plain, json_files.SHARD_BYTES = json_files.SHARD_BYTES, 60
    try:
        return StreamSource([open_source(directory / name) for name in ("a.jsonl", "b.jsonl", "c.json")])
    finally:
        json_files.SHARD_BYTES = plain


def cursor_of(source, position=None, *, weights=(1.0, 1.0, 1.0), buffer=4, seed=0, shuffle=True) -> StreamCursor:
    mixture = Mixture(source.counts, weights, seed=seed, shuffle=shuffle)
    return StreamCursor(source, mixture, buffer=buffer, position=position)


def numbers(source, refs) -> list[str]:
    """a1, a2, ... : the file and the place of each record among those of its file."""
    places = [file.places().at.tolist() for file in source.files]
    return [f"{'abc'[ref.file]}{places[ref.file].index(ref.at) + 1}" for ref in refs]


def test_the_order_is_a_literal(source):
    cursor = cursor_of(source)
    assert " ".join(numbers(source, cursor.take(31))) == FIRST_EPOCH_OF_SEED_0
    assert cursor.epoch == 0
    assert " ".join(numbers(source, cursor.take(6))) == SECOND_EPOCH_OF_SEED_0
    assert cursor.epoch == 1
    assert cursor.position() == POSITION | {"bytes": source.bytes}


FIRST_EPOCH_OF_SEED_0 = (
    "c1 a1 b5 a13 a7 a11 b6 a3 a5 c2 a4 a6 a8 c3 a12 a14 a2 c4 a15 b3 a19 a17 c5 b4 a9 b1 a18 a20 a10 b2 a16"
)
SECOND_EPOCH_OF_SEED_0 = "a13 a5 a1 a7 c1 c2"
POSITION = {
    "epoch": 1,
    "next": 9,
    "open": [[2, 0], [3, 363], [4, 120], [5, 60], [8, -1], [7, 180], [0, 270], [1, 11]],
    "buffer": [[0, 240, 0], [0, 270, 0], [0, 60, 0]],
    "draws": 37,
    "files": 3,
}


def test_without_shuffling_it_is_that_of_the_files(source):
    found = numbers(source, cursor_of(source, shuffle=False).take(33))
    expected = [f"{name}{n}" for name, count in (("a", 20), ("b", 6), ("c", 5)) for n in range(1, count + 1)]
    assert found == [*expected, "a1", "a2"]


@settings(max_examples=25, deadline=None)
@given(
    buffer=st.integers(1, 40),
    seed=st.integers(0, 9),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 3),
    sizes=st.lists(st.integers(1, 30), max_size=6),
)
def test_stops_anywhere_change_nothing(source, buffer, seed, weights, sizes):
    options = {"buffer": buffer, "seed": seed, "weights": weights}
    whole = cursor_of(source, **options).take(sum(sizes) + 1)
    position, found = None, []
    for size in sizes:
        cursor = cursor_of(source, position, **options)
        found += cursor.take(size)
        position = json.loads(json.dumps(cursor.position()))
    assert found == whole[: len(found)]


@settings(max_examples=25, deadline=None)
@given(buffer=st.integers(1, 40), seed=st.integers(0, 9))
def test_epochs_hold_every_record_as_often_as_its_weight_says(source, buffer, seed):
    """Two epochs of a and b twice, and one of c: the halves of its shards make one."""
    cursor = cursor_of(source, buffer=buffer, seed=seed, weights=(1.0, 2.0, 0.5))
    seen: Counter[str] = Counter()
    while cursor.epoch < 2:
        (name,) = numbers(source, cursor.take(1))
        if cursor.epoch < 2:
            seen[name] += 1
    expected = {"a": 2, "b": 4, "c": 1}
    assert seen == {f"{n}{i}": expected[n] for n, count in (("a", 20), ("b", 6), ("c", 5)) for i in range(1, count + 1)}


def test_neighbours_are_parted(source):
    """Even a buffer of one mixes files, as several shards are read in turn."""
    found = numbers(source, cursor_of(source, buffer=1).take(31))
    changes = sum(one[0] != other[0] for one, other in pairwise(found))
    assert changes > 10


def test_a_stream_without_records_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n \n")
    source = StreamSource([open_source(tmp_path / "a.jsonl")])
    with pytest.raises(DataError, match=r"a\.jsonl: no records"):
        cursor_of(source, weights=(1.0,)).take(1)


def test_a_file_that_vanishes_is_named(tmp_path):
    source = StreamSource([open_source(write(tmp_path / "a.jsonl", 3))])
    cursor = cursor_of(source, weights=(1.0,))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: no such file"):
        cursor.take(1)
