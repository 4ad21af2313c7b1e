"""Steps are functions of the position, whoever makes them; what is wrong with a record is counted, or told."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
from counting import CountingEncoder, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meeting import together

from duetvl.core.errors import DataError
from duetvl.core.mesh import Mesh
from duetvl.data.loading.ahead import StepLoader
from duetvl.data.loading.loader import BatchMaker, Findings, Packing, Step, passes
from duetvl.data.loading.order import Mixture, RecordCursor
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.stream import StreamCursor, StreamSource
from duetvl.data.loading.workers import InlinePool, WorkerPool
from duetvl.data.sources.catalog import Records, open_source
from duetvl.data.sources.records import with_line

GROUP = 6
TEN = Packing(10)
SPECIAL = {
    "what": {3: "drop", 5: "shrunk", 9: "bad", 14: "bad pixels", 20: "drop", 21: "drop", 30: "bug"},
    "tokens": {n: 1 + n * 7 % 9 for n in range(1, 41)},
    "patches": {n: 4 * (n % 4) for n in range(1, 41)},
}


class Data:
    """Two files of 40 and 13 records, with some of every kind among them."""

    def __init__(self, directory):
        files = [write(directory / "a.jsonl", 40, **SPECIAL), write(directory / "b.jsonl", 13)]
        self.records = Records(files)
        self.stream = StreamSource([open_source(file) for file in files])

    def cursor(self, kind: str, position=None):
        if kind == "map":
            return RecordCursor(self.records, Mixture(self.records.counts, [1.0, 1.5], seed=2), position=position)
        mixture = Mixture(self.stream.counts, [1.0, 2.0], seed=2)
        return StreamCursor(self.stream, mixture, buffer=7, position=position)

    def maker(self, pool, **options) -> BatchMaker:
        options = {"packing": Packing(20, 24), "skip_bad": True, **options}
        return BatchMaker(pool, CountingEncoder(), **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    from duetvl.data.sources import json_files

    plain, json_files.SHARD_BYTES = json_files.SHARD_BYTES, 150  # a shard of three records or so
    try:
        return Data(tmp_path_factory.mktemp("data"))
    finally:
        json_files.SHARD_BYTES = plain


@pytest.fixture(scope="module", params=[0, 1, 2, 4])
def pool(request, data):
    maker = SampleMaker(data.records.files, CountingEncoder())
    made = WorkerPool(maker, request.param) if request.param else InlinePool(maker)
    yield made
    made.close()


def steps_from(maker, cursor, count: int, prefetch: int = 2) -> list[Step]:
    loader = StepLoader(maker, cursor, GROUP, steps=count, prefetch=prefetch)
    try:
        return [loader.next_step() for _ in range(count)]
    finally:
        loader.close()


def ids(steps) -> list[tuple[str, ...]]:
    return [step.sample_ids for step in steps]


def packs(step: Step) -> list[tuple[str, ...]]:
    return [batch.sample_ids for batch in step.batches]


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["map", "stream"])
def straight(request, data) -> tuple[str, list[Step]]:
    """Twenty steps without a break, made without workers: more than two epochs."""
    maker = data.maker(InlinePool(SampleMaker(data.records.files, CountingEncoder())))
    return request.param, steps_from(maker, data.cursor(request.param), 20)


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(breaks=st.lists(st.integers(1, 19), min_size=1, max_size=3, unique=True))
def test_kills_at_any_step_change_nothing(data, pool, straight, breaks):
    """Each time the position goes through JSON, and everything else is new."""
    kind, expected = straight
    found, position = [], None
    for start, stop in zip([0, *sorted(breaks)], [*sorted(breaks), 20], strict=True):
        found += steps_from(data.maker(pool), data.cursor(kind, position), stop - start)
        position = json.loads(json.dumps(found[-1].end))
    assert ids(found) == ids(expected)
    assert [packs(step) for step in found] == [packs(step) for step in expected]
    assert [step.counts for step in found] == [step.counts for step in expected]


def one_rank(data, pool, kind, position, count, peers) -> list[Step]:
    return steps_from(data.maker(pool, peers=peers), data.cursor(kind, position), count)


def test_more_ranks_in_mid_epoch_change_nothing(data, pool, straight):
    kind, expected = straight
    position, at = None, 0
    for dp, count in ((1, 3), (2, 4), (4, 5)):
        ranks = together(Mesh(dp=dp), partial(one_rank, data, pool, kind, position, count))
        for number in range(count):
            own = [rank[number] for rank in ranks]
            assert len({json.dumps(step.end) for step in own}) == 1
            all_packs = sorted(pack for step in own for pack in packs(step))
            assert all_packs == sorted(packs(expected[at + number]))
            rows = sum(batch.pixel_rows.shape[0] for step in own for batch in step.batches)
            assert rows == sum(batch.pixel_rows.shape[0] for batch in expected[at + number].batches)
        position, at = ranks[0][-1].end, at + count


def test_ranks_that_come_to_different_records_are_told_so(data, pool):
    def run(peers) -> str:
        position = {"epoch": 0, "index": peers.rank, "records": len(data.records)}
        with pytest.raises(DataError) as found:
            data.maker(pool, peers=peers).begin(data.cursor("map", position), GROUP)
        return str(found.value)

    words = together(Mesh(dp=2), run)
    assert words[0] == words[1] and words[0].startswith("ranks 0 and 1 have read different records: a data file is")


def test_an_epoch_holds_every_good_record(data, straight):
    kind, steps = straight
    seen = [name for names in ids(steps) for name in names]
    if kind == "map":
        first = seen[: 40 - 6 + 13]  # in the first epoch some records of b.jsonl come twice
        assert {name for name in first if name.startswith("a")} <= {f"a.jsonl:{n}" for n in range(1, 41)}
        assert not {f"a.jsonl:{n}" for n in (3, 9, 14, 20, 21, 30)} & set(seen)
    assert len(set(seen)) == 40 - 6 + 13


def test_counts_and_words(data, straight):
    _, steps = straight
    counts = {kind: sum(step.counts.get(kind, 0) for step in steps) for kind in ("dropped", "bad", "shrunk")}
    words = " ".join(line for step in steps for line in step.left_out)
    words += " ".join(with_line(line.partition(": ")[2]) for step in steps for line in step.left_out)
    assert counts["dropped"] == words.count("dropped: ") > 3
    assert counts["bad"] == words.count("bad: ") > 3
    assert counts["shrunk"] > 0
    for line in ("a.jsonl:3: too long", "a.jsonl:9: a bad record", "a.jsonl:14: a picture that is cut off",
                 "a.jsonl:30: KeyError: 'missing'"):  # fmt: skip
        assert line in words


# -- one loader -------------------------------------------------------------------------------------------------------


def simple(tmp_path, count, *, skip=False, packing=TEN, **special):
    records = Records([write(tmp_path / "a.jsonl", count, **special)])
    pool = InlinePool(SampleMaker(records.files, CountingEncoder()))
    cursor = RecordCursor(records, Mixture([count], seed=0, shuffle=False))
    return BatchMaker(pool, CountingEncoder(), packing, skip), cursor


def test_a_step_is_packed(tmp_path):
    maker, cursor = simple(tmp_path, 5, tokens=dict(enumerate([3, 7, 5, 2, 3], 1)))
    step = maker.begin(cursor, 5).finish()
    assert [batch.input_ids.tolist() for batch in step.batches] == [[1] * 3 + [2] * 7, [3] * 5 + [4] * 2 + [5] * 3]
    assert (step.tokens, step.trained_tokens) == (20, 0)


def test_patches_bound_a_pack_too_and_packing_may_be_off(tmp_path):
    maker, cursor = simple(tmp_path, 4, packing=Packing(100, 8), patches=dict(enumerate([4, 4, 4, 4], 1)))
    assert [len(names) for names in packs(maker.begin(cursor, 4).finish())] == [2, 2]
    maker, cursor = simple(tmp_path, 4, packing=Packing(100, several=False))
    assert [len(names) for names in packs(maker.begin(cursor, 4).finish())] == [1, 1, 1, 1]


@pytest.mark.parametrize("what", ["bad", "bad pixels", "bug"])
def test_an_error_reaches_the_step_that_needs_it(tmp_path, what):
    maker, cursor = simple(tmp_path, 3, what={2: what})
    loader = StepLoader(maker, cursor, 1, prefetch=3)
    assert loader.next_step().sample_ids == ("a.jsonl:1",)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:2: "):
            loader.next_step()
    loader.close()


def test_a_sample_that_is_lost_while_it_is_loaded_leaves_its_pack(tmp_path):
    maker, cursor = simple(tmp_path, 4, skip=True, what={2: "bad pixels", 4: "bad pixels"}, packing=Packing(6))
    step = maker.begin(cursor, 4).finish()
    assert packs(step) == [("a.jsonl:1",), ("a.jsonl:3",)]
    assert step.sample_ids == ("a.jsonl:1", "a.jsonl:3")
    assert step.counts == {"bad": 2}


def test_data_without_a_good_record_is_an_error_not_a_loop(tmp_path):
    maker, cursor = simple(tmp_path, 3, skip=True, what=dict.fromkeys(range(1, 4), "drop"))
    with pytest.raises(DataError, match=r"a whole epoch has no usable record; the last one: dropped: .*: too long"):
        maker.begin(cursor, 2)


def test_the_last_step_starts_nothing(tmp_path):
    maker, cursor = simple(tmp_path, 2, what={2: "bad"})
    loader = StepLoader(maker, cursor, 1, steps=1, prefetch=4)
    loader.next_step()
    loader.close()
    assert cursor.position()["index"] == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("duetvl-data")]


def test_no_more_than_prefetch_steps_are_made_ahead(tmp_path):
    maker, cursor = simple(tmp_path, 50)
    loader = StepLoader(maker, cursor, 1, prefetch=3)
    loader.next_step()
    for _ in range(2):
        loader.next_step()
    loader.close()
    assert cursor.position()["index"] <= 6


def test_an_evaluation_sees_every_record_once(tmp_path):
    maker, cursor = simple(tmp_path, 7, skip=True, what={3: "drop", 5: "bad pixels"})
    findings = Findings(skip_bad=True)
    refs = [cursor.records.ref(i) for i in range(7)]
    batches = [batch for group in passes(maker, refs, 3, findings) for batch in group]
    names = [name for batch in batches for name in batch.sample_ids]
    assert names == [f"a.jsonl:{i}" for i in (1, 2, 4, 6, 7)]
    assert findings.counts == {"dropped": 1, "bad": 1}


def test_a_file_that_is_gone_is_no_bad_record(tmp_path):
    file = write(tmp_path / "a.jsonl", 4)
    records = Records([file])
    maker = SampleMaker(records.files, CountingEncoder())
    file.unlink()
    (outcome,) = maker.drafts([records.ref(0)])
    with pytest.raises(DataError, match=r"a\.jsonl: no such file"):
        Findings(skip_bad=True).leave_out(outcome)
