"""The findings of a walk over records whose lengths and faults are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from duetvl.core.batch import IGNORE
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Dropped, Unread
from duetvl.data.loading.loader import Findings, Step
from duetvl.data.survey import histogram, survey


def draft(length: int, *, grids: tuple = (), trained: int = 1, notes: tuple = ()) -> Draft:
    labels = np.full(length, IGNORE)
    labels[:trained] = 7
    images = np.array(grids, np.int64).reshape(-1, 3)
    return Draft("s", "s", np.zeros(length, np.int64), labels, images, np.zeros((0, 3), np.int64), notes=notes)


def test_good_left_out_and_bad_records_are_told_apart_and_named():
    outcomes = [
        draft(10, grids=((1, 4, 4),), trained=5),
        draft(30, notes=("truncated",)),
        Dropped("a.jsonl:3: is too long"),
        *(DataError(f"a.jsonl:{line}: no such file") for line in range(4, 11)),
    ]
    found = survey(outcomes, merge=2)
    assert (found.records, found.dropped, found.bad) == (10, 1, 7)
    lines = list(found.lines())
    assert lines[0] == "10 records: 2 good, 1 left out, 7 bad"
    assert lines[1].startswith("tokens: 40 in total, mean 20, median 20,")
    assert lines[2] == "shares: images 10.0% (1), videos 0.0% (0), text 90.0%; trained 15.0%"
    assert "truncated: 1 samples" in lines
    assert "  left out: a.jsonl:3: is too long" in lines
    assert lines[-2:] == ["  bad: a.jsonl:8: no such file", "  bad: and 2 more"]


def test_keys_that_are_not_read_are_named_once_for_a_file():
    drafts = [
        replace(draft(9), id=f"{file}:{line}", where=f"data/{file}:{line}", unread=("a message's key 'mask'",))
        for file in ("a.jsonl", "b.jsonl")
        for line in (4, 5)
    ]
    named = [line for line in survey(drafts, merge=2).lines() if "mask" in line]
    told = "a message's key 'mask' is not read (named once for a file)"
    assert named == [f"data/a.jsonl:4: {told}", f"data/b.jsonl:4: {told}"]


def test_of_very_many_keys_the_first_are_named():
    """Keys may be numbers or times, of which each record has others."""
    drafts = [replace(draft(9), id="a.jsonl:1", where="a.jsonl:1", unread=(f"key {n}",)) for n in range(100)]
    named = [line for line in survey(drafts, merge=2).lines() if "key" in line]
    assert len(named) == 21 and named[-1].endswith("further keys of this file are not named")
    steps = Findings(skip_bad=True)
    for each in drafts:
        found = Unread()
        found.add(each)
        steps.take_in(Step((), (), unread=found))
    assert list(steps.unread.values()) == named


def test_records_that_train_nothing_are_counted():
    assert "without a trained token: 1 samples" in list(survey([draft(9), draft(9, trained=0)], merge=2).lines())


def test_a_set_without_a_good_record_has_no_lengths():
    assert list(survey([DataError("x")], merge=2).lines()) == ["1 record: 0 good, 0 left out, 1 bad", "  bad: x"]


def test_the_histogram_has_round_edges_and_counts_everything():
    lines = list(histogram([1, 2, 99, 100, 1150]))
    assert lines[0].split() == ["0", "to", "99", "tokens", "#" * 40, "3"]
    assert lines[-1].split() == ["1100", "to", "1199", "tokens", "#" * 13, "1"]
    assert sum(int(line.split()[-1]) for line in lines) == 5
    assert [line.split()[0] for line in histogram([70, 87, 88])] == [str(n) for n in range(70, 90, 2)]


def test_the_picture_of_lengths_is_written(tmp_path):
    found = survey([draft(5), draft(9)], merge=2)
    found.draw(tmp_path / "new" / "lengths.png")
    assert (tmp_path / "new" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_every_record_left_out_is_named_in_a_file_which_goes_when_there_is_none(tmp_path):
    target = tmp_path / "new" / "left_out.txt"
    outcomes = [Dropped("a.jsonl:3: is too long"), *(DataError(f"a.jsonl:{line}: no") for line in range(4, 12))]
    assert survey(outcomes, merge=2).list_left_out(target)
    lines = target.read_text().splitlines()
    assert lines[0] == "left out: a.jsonl:3: is too long"
    assert lines[1:] == [f"bad: a.jsonl:{line}: no" for line in range(4, 12)]
    assert not survey([draft(5)], merge=2).list_left_out(target)
    assert not target.exists()
