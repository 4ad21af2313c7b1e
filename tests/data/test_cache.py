"""The cache gives what was made before for the same content, settings and code, and nothing else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import counting
import numpy as np
import pytest
from counting import CountingEncoder, write

from duetvl.core.errors import ConfigError, DataError
from duetvl.data.loading.cache import CachedEncoder
from duetvl.data.sources.catalog import Records, RecordSource
from duetvl.data.sources.records import Reading, Record


class Counted(CountingEncoder):
    """Counts what it has to make, and has a setting."""

    made = 0

    def __init__(self, setting=1):
        self.setting = setting

    def draft(self, record):
        Counted.made += 1
        return super().draft(record)


@pytest.fixture(autouse=True)
def fresh():
    Counted.made = 0


@pytest.fixture
def records(tmp_path) -> Records:
    (tmp_path / "p.png").write_bytes(b"1")
    return Records([write(tmp_path / "a.jsonl", 3, image={2: "p.png"}, what={3: "drop"})])


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_values_nested_deeply_are_drafted_without_an_entry(tmp_path):
    nested: list = []
    for _ in range(100_000):  # whatever limit of recursion hypothesis has set
        nested = [nested]
    encoder = CachedEncoder(CountingEncoder(), tmp_path / "cache")
    draft = encoder.draft(Record(tmp_path / "a.jsonl", 1, "a.jsonl:1", {"extra": nested}))
    assert draft.id == "a.jsonl:1" and not list((tmp_path / "cache").iterdir())


def test_the_second_time_is_a_hit_wherever_the_record_lies(records, tmp_path):
    first = [CachedEncoder(Counted(), tmp_path / "c").draft(records[i]) for i in (0, 1)]
    assert Counted.made == 2
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_bytes(b"\n\n" + lines[0] + lines[1])
    moved = Records([tmp_path / "b.jsonl"])
    again = [CachedEncoder(Counted(), tmp_path / "c").draft(moved[i]) for i in (0, 1)]
    assert Counted.made == 2
    assert [draft.id for draft in again] == ["b.jsonl:3", "b.jsonl:4"]
    assert again[1].where == f"{tmp_path}/b.jsonl:4"
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        assert one.media == other.media


def test_what_changes_the_result_is_a_miss(records, tmp_path):
    def draft(encoder, record):
        CachedEncoder(encoder, tmp_path / "c").draft(record)
        return Counted.made

    assert draft(Counted(), records[1]) == 1
    assert draft(Counted(), records[1]) == 1
    assert draft(Counted(2), records[1]) == 2
    assert draft(Counted(), Records([RecordSource(str(tmp_path / "a.jsonl"), Reading(boxes="pixels"))])[1]) == 3
    (tmp_path / "p.png").write_bytes(b"22")
    assert draft(Counted(), records[1]) == 4
    os.utime(tmp_path / "p.png", ns=(1, 1))
    assert draft(Counted(), records[1]) == 5
    other = Record(records[1].file, 2, "x", {**records[1].values, "name": b"bytes"})
    assert draft(Counted(), other) == 6
    assert draft(Counted(), Record(other.file, 2, "x", {**other.values, "name": b"other"})) == 7


def test_what_is_left_out_is_not_kept(records, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError):
            CachedEncoder(Counted(), tmp_path / "c").draft(records[2])
    assert Counted.made == 2 and entries(tmp_path / "c") == []


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b"", lambda b: b[:40] + b"?" + b[41:], lambda b: b + b"x"]
)
def test_a_damaged_entry_is_made_anew(records, tmp_path, damage):
    cache = CachedEncoder(Counted(), tmp_path / "c")
    cache.draft(records[0])
    (entry,) = entries(tmp_path / "c")
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    cache.draft(records[0])
    assert Counted.made == 2 and entry.read_bytes() == whole


def test_an_entry_runs_no_code(records, tmp_path):
    cache = CachedEncoder(Counted(), tmp_path / "c")
    cache.draft(records[0])
    (entry,) = entries(tmp_path / "c")
    body = pickle.dumps(Evil(tmp_path / "harm"))
    head = entry.read_bytes()[:15]
    entry.write_bytes(head + zlib.crc32(body).to_bytes(4, "little") + body)
    cache.draft(records[0])
    assert Counted.made == 2 and not (tmp_path / "harm").exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_two_writers_at_once_leave_one_whole_entry(records, tmp_path):
    caches = [CachedEncoder(Counted(), tmp_path / "c") for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(30):
            for path in entries(tmp_path / "c"):
                path.unlink()
            drafts = list(threads.map(lambda cache: cache.draft(records[0]), caches))
            assert len({draft.id for draft in drafts}) == 1
            assert len(entries(tmp_path / "c")) == 1
    made = Counted.made
    caches[0].draft(records[0])
    assert Counted.made == made


def test_another_process_finds_the_same_entries(records, tmp_path):
    """Whatever order its sets are in."""
    CachedEncoder(CountingEncoder(), tmp_path / "c").draft(records[0])
    before = entries(tmp_path / "c")
    program = (
        "import sys; from counting import CountingEncoder; from duetvl.data.loading.cache import CachedEncoder; "
        "from duetvl.data.sources.catalog import Records; "
        "CachedEncoder(CountingEncoder(), sys.argv[1]).draft(Records([sys.argv[2]])[0])"
    )
    paths = os.pathsep.join([str(Path(counting.__file__).parent), *filter(None, sys.path)])
    arguments = [str(tmp_path / "c"), str(tmp_path / "a.jsonl")]
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, env=environment)
    assert entries(tmp_path / "c") == before


def test_a_directory_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache .*file/c: cannot be created"):
        CachedEncoder(CountingEncoder(), tmp_path / "file" / "c")


def test_a_directory_that_cannot_be_written_is_said(records, tmp_path, monkeypatch):
    cache = CachedEncoder(Counted(), tmp_path / "c")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="cannot be written: No space left on device"):
        cache.draft(records[0])
    assert entries(tmp_path / "c") == []
