"""Worker processes: what they send, how they end, and what is said when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import counting
import numpy as np
import pytest
from counting import CountingEncoder, write

from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, OutOfMemory
from duetvl.data.loading.loader import Findings
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.transfer import receive, send
from duetvl.data.loading.workers import WorkerPool
from duetvl.data.sources.catalog import Records
from duetvl.data.survey import survey


@pytest.fixture
def pool_of(tmp_path):
    """A pool of two workers over records, and their places."""
    pools = []

    def make(count, encoder=None, **special):
        records = Records([write(tmp_path / "a.jsonl", count, **special)])
        pools.append(WorkerPool(SampleMaker(records.files, encoder or CountingEncoder()), 2))
        return pools[-1], [records.ref(i) for i in range(count)]

    yield make
    for pool in pools:
        pool.close()


# -- what goes over a socket ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 3, 1 << 18])
def test_values_arrive_as_they_were(rows):
    value = {
        "a": np.arange(rows, dtype=np.float32),
        "b": [np.ones((2, 3), np.int64), "text"],
        "c": np.asfortranarray([[1, 2]]),
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=send, args=(ours, value))
        thread.start()
        found = receive(theirs)
        thread.join()
        np.testing.assert_array_equal(found["a"], value["a"])
        np.testing.assert_array_equal(found["b"][0], value["b"][0])
        assert found["b"][1] == "text"
        found["a"] += 1  # they may be written to
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_record_that_kills_its_worker_is_named_and_the_rest_is_made(pool_of):
    pool, refs = pool_of(12, what={5: "crash"})
    outcomes = pool.drafts(refs)
    assert [i for i, outcome in enumerate(outcomes, 1) if not isinstance(outcome, Draft)] == [5]
    assert "a.jsonl:5: the data worker at work on it has died (killed by signal 9, as the system does when" in str(
        outcomes[4]
    )
    assert all(isinstance(outcome, Draft) for outcome in pool.drafts(refs[5:]))


def test_a_record_that_was_killed_beside_others_is_tried_once_more(pool_of, tmp_path):
    flag = str(tmp_path / "flag")
    pool, refs = pool_of(8, what={3: "crash once"}, flag={3: flag})
    assert all(isinstance(outcome, Draft) for outcome in pool.drafts(refs)) and os.path.exists(flag)


@pytest.mark.parametrize(("what", "kind"), [("crash", OutOfMemory), ("memory", OutOfMemory), ("fault", DataError)])
def test_what_memory_does_not_suffice_for_ends_a_run_that_skips_bad_records(pool_of, what, kind):
    pool, refs = pool_of(2, what={2: what})
    outcome = pool.drafts(refs)[1]
    assert type(outcome) is kind
    if kind is OutOfMemory:
        with pytest.raises(DataError, match=r"a\.jsonl:2: .*memory"):
            Findings(skip_bad=True).leave_out(outcome)
        with pytest.raises(OutOfMemory):
            survey([outcome], merge=2)
    else:
        Findings(skip_bad=True).leave_out(outcome)


def test_pixels_that_kill_their_worker_are_named(pool_of):
    pool, refs = pool_of(2, what={1: "crash pixels"})
    loads = [pool.load(draft) for draft in pool.drafts(refs)]
    assert "a.jsonl:1: the data worker at work on it has died" in str(loads[0].result())
    assert loads[1].result().id == "a.jsonl:2"


def test_an_encoder_of_the_script_itself_is_refused(pool_of, monkeypatch):
    main = type("Encoder", (CountingEncoder,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Encoder", main, raising=False)
    pool, refs = pool_of(2, encoder=main())
    with pytest.raises(DataError, match=r"cannot be given the encoder: .*Encoder.*define its class in a module"):
        pool.drafts(refs)


def test_an_encoder_that_cannot_be_pickled_is_refused(pool_of):
    encoder = CountingEncoder()
    encoder.function = lambda: None
    pool, refs = pool_of(2, encoder=encoder)
    with pytest.raises(DataError, match=r"cannot be given the encoder: .*lambda"):
        pool.drafts(refs)


def test_workers_load_no_framework(pool_of):
    pool, refs = pool_of(1, encoder=ModulesEncoder())
    (draft,) = pool.drafts(refs)
    assert draft.media[0] != os.getpid()
    assert not {"torch", "mindspore", "transformers"} & set(draft.media[1])


class ModulesEncoder(CountingEncoder):
    """Tells what is loaded where it works."""

    def draft(self, record):
        draft = super().draft(record)
        object.__setattr__(draft, "media", (os.getpid(), sorted({name.partition(".")[0] for name in sys.modules})))
        return draft


# -- ends -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, sys, os
from counting import CountingEncoder
from test_workers import steps
streaming, workers, begin, count = sys.argv[2] == "stream", int(sys.argv[3]), json.loads(sys.argv[4]), int(sys.argv[5])
for step in steps(sys.argv[1], streaming, workers, begin, count):
    print(json.dumps([step.sample_ids, step.end]), flush=True)
"""


def steps(file: str, streaming: bool, workers: int, position, count: int):
    """Steps of four samples, made ahead by workers."""
    from duetvl.data.loading.ahead import StepLoader
    from duetvl.data.loading.loader import BatchMaker, Packing
    from duetvl.data.loading.order import Mixture, RecordCursor
    from duetvl.data.loading.stream import StreamCursor, StreamSource
    from duetvl.data.sources.catalog import open_source

    if streaming:
        source = StreamSource([open_source(file)])
        files, mixture = source.files, Mixture(source.counts, seed=1)
        cursor = StreamCursor(source, mixture, buffer=5, position=position)
    else:
        records = Records([file])
        files, mixture = records.files, Mixture(records.counts, seed=1)
        cursor = RecordCursor(records, mixture, position=position)
    pool = WorkerPool(SampleMaker(files, CountingEncoder()), workers)
    loader = StepLoader(BatchMaker(pool, CountingEncoder(), Packing(20), True), cursor, 4, steps=count, prefetch=3)
    try:
        for _ in range(count):
            yield loader.next_step()
    finally:
        pool.close()
        loader.close()


def run(*arguments) -> subprocess.Popen:
    paths = [str(Path(counting.__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def children(pid: int) -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and parent_of(name) == pid]


def parent_of(name: str) -> int:
    try:
        return int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_killed_process_takes_its_workers_along_and_is_gone_on_from(tmp_path, kind):
    file = write(tmp_path / "a.jsonl", 30, what={4: "drop", 9: "bad", 11: "bad pixels"})
    expected = [[list(s.sample_ids), s.end] for s in steps(str(file), kind == "stream", 1, None, 14)]
    process = run(file, kind, 2, "null", 1000)
    found = [json.loads(process.stdout.readline()) for _ in range(6)]
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker has outlived its parent"
        time.sleep(0.02)
    on = run(file, kind, 3, json.dumps(found[-1][1]), 8)
    found += [json.loads(line) for line in on.communicate()[0].splitlines()]
    assert found == json.loads(json.dumps(expected))
