"""Steps are functions of the position."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from duetvl.core.batch import IGNORE, Batch, Sample
from duetvl.core.errors import DataError
from duetvl.data.loader import Batcher, StepLoader, passes
from duetvl.data.packing import Order, Position
from duetvl.data.records import Record, Records


def encode(record: Record) -> Sample:
    length = int(record.values["messages"][0]["content"])
    if length < 0:
        raise DataError(f"{record.where}: negative")
    return Sample(np.full(length, record.number), np.full(length, record.number), id=record.id)


def lay(samples) -> Batch:
    ids = np.concatenate([sample.input_ids for sample in samples])
    none = np.zeros(0, np.int32)
    return Batch(ids, none, none, np.full(len(ids), IGNORE), none, none, none, none, tuple(s.id for s in samples))


def batcher(tmp_path, lengths, pack_tokens=10, longest=10) -> Batcher:
    lines = [json.dumps({"messages": [{"role": "user", "content": str(length)}]}) for length in lengths]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return Batcher(Records([tmp_path / "a.jsonl"]), encode, lay, pack_tokens, longest)


def ids(steps) -> list[str]:
    return [name for step in steps for name in step.sample_ids]


def test_a_step_goes_on_from_any_position(tmp_path):
    source = batcher(tmp_path, [3, 4, 5, 6, 2, 1, 7])
    loader = StepLoader(source, Order(7, seed=0), 3)
    steps = [loader.next_step() for _ in range(5)]
    loader.close()
    for at in range(4):
        again = StepLoader(source, Order(7, seed=0), 3, steps[at].end)
        assert ids([again.next_step()]) == ids([steps[at + 1]])
        again.close()
    assert sorted(ids(steps)[:7]) == [f"a.jsonl:{i}" for i in range(1, 8)]
    assert steps[2].end == Position(1, 2)


def test_a_step_is_packed(tmp_path):
    loader = StepLoader(batcher(tmp_path, [3, 7, 5, 2, 3]), Order(5, seed=0, shuffle=False), 5)
    step = loader.next_step(last=True)
    loader.close()
    assert [batch.input_ids.tolist() for batch in step.batches] == [[1] * 3 + [2] * 7, [3] * 5 + [4] * 2 + [5] * 3]
    assert (step.tokens, step.trained_tokens) == (20, 0)


def test_a_sample_that_is_too_long_is_named(tmp_path):
    loader = StepLoader(batcher(tmp_path, [3, 12]), Order(2, seed=0), 2)
    with pytest.raises(DataError, match=r"sample a\.jsonl:2 has 12 tokens, the longest may have 10"):
        loader.wait()
    loader.close()
    loader = StepLoader(batcher(tmp_path, [3, 12], longest=12), Order(2, seed=0), 2)
    assert sorted(len(batch.input_ids) for batch in loader.next_step().batches) == [3, 12]
    loader.close()


def test_an_error_in_the_thread_reaches_the_step_that_needs_it(tmp_path):
    loader = StepLoader(batcher(tmp_path, [3, -1]), Order(2, seed=0, shuffle=False), 1)
    assert ids([loader.next_step()]) == ["a.jsonl:1"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: negative"):
        loader.next_step()
    loader.close()


def test_the_last_step_starts_nothing(tmp_path):
    loader = StepLoader(batcher(tmp_path, [3, -1]), Order(2, seed=0, shuffle=False), 1)
    loader.next_step(last=True)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("duetvl-data")]


def test_an_evaluation_sees_every_record_once(tmp_path):
    batches = passes(batcher(tmp_path, [3, 4, 5, 6, 2, 1, 7]), 3)
    assert sorted(name for batch in batches for name in batch.sample_ids) == [f"a.jsonl:{i}" for i in range(1, 8)]
