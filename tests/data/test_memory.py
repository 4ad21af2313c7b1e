"""Memory that runs out says nothing about a record: it is never taken for a damaged file."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from counting import CountingEncoder, write

from duetvl.data.draft import OutOfMemory
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.media.video_index import opened
from duetvl.data.sources.catalog import Records
from tests.data.clips import write_clip


def test_a_decoder_without_memory_is_no_damaged_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_clip(path, 4)
    with pytest.raises(MemoryError), opened(path):
        raise av.error.MemoryError(12, "Cannot allocate memory")


def test_a_draft_without_memory_is_no_bad_record(tmp_path: Path) -> None:
    records = Records([write(tmp_path / "a.jsonl", 1, what={1: "memory"})])
    (outcome,) = SampleMaker(records.files, CountingEncoder()).drafts([records.ref(0)])
    assert isinstance(outcome, OutOfMemory) and "a.jsonl:1: memory ran out" in str(outcome)
