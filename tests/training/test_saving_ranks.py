"""Ranks that save together, in real processes: what all are told, what a full disk, a kill and silence leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import duetvl
from duetvl.storage.finding import checkpoints_dir, find_checkpoint

PROGRAM = Path(__file__).with_name("saving_ranks.py")


@pytest.fixture
def case(tmp_path):
    """Runs a case of saving_ranks.py: what each rank has come to."""
    place = {"PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), str(Path(duetvl.__file__).parents[1])])}

    def run(name):
        command = [sys.executable, str(PROGRAM), name, str(tmp_path)]
        done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


def test_all_ranks_are_told_the_same_at_the_same_time(case, tmp_path):
    steps = ["saved step-0000001", "saved step-0000002", "saved step-0000002", "saved step-0000003"]
    assert case("together") == [steps] * 4
    assert sorted(path.name for path in checkpoints_dir(tmp_path).iterdir()) == [
        "latest", "step-0000002", "step-0000003",
    ]  # fmt: skip
    path = find_checkpoint(tmp_path).path
    assert {file.name.split("-of-")[1] for file in path.glob("*.safetensors")} == {"00004.safetensors"}
    assert len(list(path.iterdir())) == 3 * 4 + 1  # no record is left


def test_a_disk_that_is_full_for_one_rank_fails_the_save_of_all(case, tmp_path):
    first, second = case("full")
    assert first == second
    warning, raised, kept, after = first
    reason = "checkpoint of step 2 could not be written: rank 1 ("
    assert warning.startswith("warning: ") and reason in warning and "File too large; earlier ones are" in warning
    assert raised == f"raised {warning.removeprefix('warning: ')}"
    assert kept == "kept ['latest', 'step-0000001']"
    assert after == "saved step-0000003"


def test_a_first_rank_that_cannot_begin_tells_the_others(case, tmp_path):
    told = case("first_full")
    assert told == [told[0]] * 3
    assert "could not be written: File exists" in told[0][0]


def test_a_rank_that_is_silent_is_not_waited_for_without_end(case, tmp_path):
    first, second = case("silent")
    assert first == second
    assert "nothing came from rank 1 for 0.5 s" in first[0]
    assert first[1] == []


def test_a_kill_of_one_rank_at_any_instant_leaves_a_loadable_checkpoint(case):
    found = case("killed")
    assert set(found["0"]) == {1, 2}
    *before, last = found["1"]
    assert set(before) == {1} and last in (1, 2)  # its last call comes after its record: rank 0 may have gone on
    assert len(found["0"]) > 20 and len(found["1"]) > 6


def test_checksums_are_read_a_share_each_and_all_hear_what_one_finds(case):
    ranks = case("finding")
    newest, chosen, nowhere, _ = ranks[0]
    assert [newest, chosen, nowhere] == ranks[1][:3] == ranks[2][:3]
    assert newest[0] == 1
    assert "exp_avg-00002-of-00004.safetensors does not match its checksum (rank " in newest[1]
    assert "weights-00001-of-00004.safetensors cannot be read: No such file or directory (rank " in newest[2]
    assert chosen.endswith("@1 for the undamaged one of step 1")
    assert "has no checkpoint" in nowhere
    shares = [set(rank[3]) for rank in ranks]
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    names = {f"{kind}-{writer:05}-of-00004.safetensors" for kind in kinds for writer in range(4)}
    assert set.union(*shares) == names
    assert not any(one & other for one, other in zip(shares, [*shares[1:], shares[0]], strict=True))
