"""Many ranks make the steps, the evaluations and the errors of one process: in real processes, without a framework."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from clips import write_clip
from PIL import Image
from rank_process import Case, Seen

from duetvl.core.errors import DataError
from duetvl.core.mesh import Mesh
from duetvl.data.sources.fingerprint import FileFacts, check_same_data

PROGRAM = Path(__file__).with_name("rank_process.py")
SIZE = 4
STEPS = 6
LIMIT = 120.0
MESHES = {"dp 2": Mesh(dp=2), "dp 3": Mesh(dp=3), "dp 2 tp 2": Mesh(dp=2, tp=2), "tp 3": Mesh(tp=3)}
ALONE = Mesh()


# -- records ---------------------------------------------------------------------------------------------------------


def noise(path: Path, width: int, height: int, seed: int = 0) -> bytes:
    """A picture file; its content."""
    pixels = random.Random(seed).randbytes(width * height * 3)
    Image.frombytes("RGB", (width, height), pixels).save(path)
    return path.read_bytes()


def write_media(directory: Path) -> list[str]:
    """Pictures of several sizes and a clip, a picture that is cut off and one that is not there."""
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        noise(directory / name, 28 + 28 * number, 56 + 14 * (number % 3), number)
    write_clip(directory / "clip.mp4", 8)
    cut = noise(directory / "cut off.png", 84, 84, 7)
    (directory / "cut off.png").write_bytes(cut[: len(cut) // 2])
    return [*names, *names, "clip.mp4", "cut off.png", "missing.png"]


def write_records(path: Path, count: int, seed: int, media: Sequence[str]) -> Path:
    """Conversations of any length about some of the media, with lines that are no record among them."""
    dice = random.Random(seed)
    lines = []
    for _ in range(count):
        chosen = dice.sample(media, dice.choice([0, 0, 1, 1, 2]))
        marks = "".join("<video>" if name.endswith("mp4") else "<image>" for name in chosen)
        turns = [
            {"role": "user", "content": marks + "word " * dice.randrange(1, 20)},
            {"role": "assistant", "content": "answer " * dice.randrange(1, 30)},
        ]
        record = {"messages": turns, "images": [n for n in chosen if not n.endswith("mp4")]}
        record |= {"videos": [n for n in chosen if n.endswith("mp4")]}
        record |= {"label": 2} if dice.random() < 0.2 else {}
        lines.append(json.dumps(record) if dice.random() > 0.06 else '{"messages": [')
    path.write_text("\n".join(lines) + "\n")
    return path


# -- processes -------------------------------------------------------------------------------------------------------


def recipe(model: Path, mesh: Mesh, train: Path | str, **data: object) -> dict[str, object]:
    options = {"pack_tokens": 300, "cutoff_len": 260, "too_long": "drop", "on_bad_sample": "skip", **data}
    return {
        "model": {"path": str(model)},
        "data": {"train": str(train), **options},
        "train": {"global_batch": 7, "steps": 50},
        "parallel": {"dp": mesh.dp, "tp": mesh.tp},
    }


def start(place: Path, size: int, **environment: str) -> list[subprocess.Popen[bytes]]:
    """The rank processes, each in a directory of its own."""
    paths = [str(PROGRAM.parent), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    found = []
    for rank in range(size):
        (place / f"cwd{rank}").mkdir(exist_ok=True)
        command = [sys.executable, str(PROGRAM), str(place), str(rank)]
        with (place / f"output.{rank}").open("w") as output:
            found.append(subprocess.Popen(command, cwd=place / f"cwd{rank}", env=env, stdout=output, stderr=output))
    return found


def prepare(place: Path, cases: Sequence[Case]) -> None:
    for case in cases:
        (place / case.name).mkdir()
    (place / "cases").write_bytes(pickle.dumps(list(cases)))


def wait(processes: Sequence[subprocess.Popen[bytes]], place: Path) -> None:
    """Until all have ended; those that have not in time are killed."""
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            wrong = [rank for rank, process in enumerate(processes) if process.poll()]
            assert not wrong, (place / f"output.{wrong[0]}").read_text()[-3000:]
            time.sleep(0.02)
        codes = [process.poll() for process in processes]
        assert codes == [0] * len(codes), [file.read_text()[-1000:] for file in sorted(place.glob("output.*"))]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seen(place: Path, name: str) -> list[Seen]:
    """What the ranks of a case saw, in their order."""
    return [pickle.loads(file.read_bytes()) for file in sorted((place / name).glob("seen.*"))]


class Ranks:
    """The cases, run by four processes that are started once."""

    def __init__(self, place: Path, model: Path):
        self.place, self.model = place, model
        media = write_media(place)
        self.train = write_records(place / "train.jsonl", 40, 1, media)
        self.val = write_records(place / "val.jsonl", 30, 2, media)
        (place / "own").mkdir()
        self.local = place / "own" / "local.jsonl"
        cases = [*self._plain(), *self._streams(), *self._faults(), self._cached("cold"), self._cached("warm")]
        prepare(place, cases)
        self._own_files()
        wait(start(place, SIZE, DUETVL_PEER_TIMEOUT="60"), place)

    def __call__(self, name: str) -> list[Seen]:
        return seen(self.place, name)

    def _case(self, name: str, mesh: Mesh, train: Path | str | None = None, **options: object) -> Case:
        known = {key: options.pop(key) for key in ("steps", "position", "script") if key in options}
        return Case(name, recipe(self.model, mesh, train or self.train, **options), **{"steps": STEPS, **known})

    def _plain(self) -> Iterator[Case]:
        yield self._case("alone", ALONE)
        for name, mesh in MESHES.items():
            yield self._case(f"{name}, prefetch 1", mesh, prefetch=1)
            yield self._case(f"{name}, prefetch 3", mesh, prefetch=3)
        yield self._case("dp 2, workers", MESHES["dp 2"], workers=2, prefetch=3)
        yield self._case("tp 3, workers", MESHES["tp 3"], workers=2, prefetch=1)
        for name, mesh in {"alone": ALONE, **MESHES}.items():
            yield self._case(f"{name}, passes", mesh, val=str(self.val), script="evaluate", steps=3)

    def _streams(self) -> Iterator[Case]:
        """One process says where it is after each step; others go on from there."""
        options = {"streaming": True, "shuffle_buffer": 11}
        yield self._case("alone, stream", ALONE, **options)
        yield self._case("dp 3, stream", MESHES["dp 3"], steps=2, **options)

    def _cached(self, name: str) -> Case:
        return self._case(f"dp 2 tp 2, {name}", MESHES["dp 2 tp 2"], cache=str(self.place / "cache"))

    def _faults(self) -> Iterator[Case]:
        for policy in ("skip", "error"):
            options = {"on_bad_sample": policy, "too_long": "truncate", "pack_tokens": 70}
            for kind in ("absent", "damaged"):
                file = self.local.with_name(f"{kind}.jsonl")
                yield self._case(f"{kind} on one rank, {policy}", MESHES["dp 2 tp 2"], file, **options)
            yield self._case(
                f"a data file gone, {policy}", MESHES["dp 3"], f"own {policy}.jsonl", script="lose file", **options
            )
            yield self._case(f"bad lines, {policy}", MESHES["dp 3"], **options)
            yield self._case(f"bad lines alone, {policy}", ALONE, **options)
        yield self._case("a fault of one rank", MESHES["tp 3"], script="broken")

    def _own_files(self) -> None:
        """Pictures and records that each rank has a copy of; one of rank 1's pictures is absent, one damaged."""
        picture = noise(self.place / "own" / "picture.png", 84, 84)
        (self.place / "own" / "picture.png").unlink()
        for kind in ("absent", "damaged"):
            turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
            line = json.dumps({"messages": turns, "images": [f"{kind}.png"]})
            plain = json.dumps({"messages": [{"role": "user", "content": "b"}, turns[1]], "images": []})
            lines = [line if number % 4 == 0 else plain for number in range(60)]
            (self.place / "own" / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
        there = (self.place / "own" / "absent.jsonl").read_text().replace("absent.png", "there.png")
        for rank in range(SIZE):
            own = self.place / f"cwd{rank}"
            own.mkdir()
            for policy in ("skip", "error"):
                (own / f"own {policy}.jsonl").write_text(there)
            (own / "there.png").write_bytes(picture)
            if rank != 1:
                (own / "absent.png").write_bytes(picture)
            (own / "damaged.png").write_bytes(picture[: len(picture) // 2] if rank == 1 else picture)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, processor_dir: Path) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("ranks"), processor_dir)


def check_same(found: Sequence[Seen], mesh: Mesh) -> None:
    """All ranks have been told the same of each step, and those of a place train on the same packs."""
    assert len(found) == mesh.size
    for other in found:
        assert other.steps == found[0].steps
        assert other.error == found[0].error
    for rank, other in enumerate(found):
        for peer in mesh.ranks_along("tp", rank=rank):
            assert other.packs == found[peer].packs
    for number, step in enumerate(found[0].steps):
        places = [found[mesh.ranks_along("dp", rank=0)[d]].packs[number] for d in range(mesh.dp)]
        assert sum(map(len, places)) == len({n for place in places for n in place}) == step["totals"].packs


def packs_of_all(found: Sequence[Seen], number: int) -> dict[int, str]:
    return {pack: digest for rank in found for pack, digest in rank.packs[number].items()}


# -- the same steps --------------------------------------------------------------------------------------------------

PLAIN = [f"{name}, prefetch {n}" for name in MESHES for n in (1, 3)] + ["dp 2, workers", "tp 3, workers"]


@pytest.mark.parametrize("name", [*PLAIN, "dp 2 tp 2, cold", "dp 2 tp 2, warm"])
def test_ranks_make_the_steps_of_one_process(ranks: Ranks, name: str) -> None:
    (alone,), found = ranks("alone"), ranks(name)
    check_same(found, MESHES[name.partition(",")[0]])
    assert found[0].error == alone.error == ""
    assert found[0].steps == alone.steps and len(alone.steps) == STEPS
    assert [packs_of_all(found, n) for n in range(STEPS)] == alone.packs


def test_the_data_hold_everything_that_may_go_wrong(ranks: Ranks) -> None:
    (alone,) = ranks("alone")
    words = " ".join(line for step in alone.steps for line in step["left_out"])
    assert "dropped: " in words and "no such file" in words and "cut off.png" in words and "not JSON" in words
    assert any(step["unread"] for step in alone.steps)
    assert {len(step["sample_ids"]) for step in alone.steps} > {7}  # of some steps, samples were lost when loaded
    assert sum(step["totals"].packs for step in alone.steps) > STEPS


def test_a_cache_that_all_ranks_write_to_holds_every_draft(ranks: Ranks) -> None:
    entries = [file for file in (ranks.place / "cache").rglob("*") if file.is_file()]
    assert len(entries) > 20 and not [file for file in entries if file.name.startswith(".")]


# -- evaluations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESHES)
def test_ranks_make_the_passes_of_one_process(ranks: Ranks, name: str) -> None:
    """Also when one is stopped half-way, and while steps are made."""
    (alone,), found = ranks("alone, passes"), ranks(f"{name}, passes")
    mesh = MESHES[name]
    check_same(found, mesh)
    assert found[0].error == alone.error == "" and found[0].steps == alone.steps
    places = [found[rank].groups for rank in mesh.ranks_along("dp", rank=0)]
    for number, groups in enumerate(alone.groups):
        assert [len(place[number]) for place in places] == [len(groups)] * mesh.dp
        for at, expected in enumerate(groups):
            assert sorted(d for place in places for d in place[number][at]) == sorted(expected)
    assert len(alone.groups[1]) > 2 == len(alone.groups[2])
    for rank, other in enumerate(found):
        assert other.groups == found[mesh.ranks_along("tp", rank=rank)[0]].groups


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_gone_on_with_by_other_numbers_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (alone,), first = ranks("alone, stream"), ranks("dp 3, stream")
    check_same(first, MESHES["dp 3"])
    position = json.loads(json.dumps(first[0].steps[-1]["end"]))
    options = {"streaming": True, "shuffle_buffer": 11, "workers": 1, "prefetch": 2}
    mesh = MESHES["dp 2"]
    prepare(tmp_path, [Case("on", recipe(ranks.model, mesh, ranks.train, **options), STEPS - 2, position)])
    wait(start(tmp_path, 2), tmp_path)
    then = seen(tmp_path, "on")
    check_same(then, mesh)
    assert [*first[0].steps, *then[0].steps] == alone.steps
    packs = [packs_of_all(first, n) for n in range(2)] + [packs_of_all(then, n) for n in range(STEPS - 2)]
    assert packs == alone.packs
    assert alone.steps[-1]["end"]["epoch"] >= 1


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_bad_records_are_those_of_one_process(ranks: Ranks, policy: str) -> None:
    (alone,), found = ranks(f"bad lines alone, {policy}"), ranks(f"bad lines, {policy}")
    check_same(found, MESHES["dp 3"])
    assert (found[0].steps, found[0].error) == (alone.steps, alone.error)
    assert bool(alone.error) == (policy == "error")


@pytest.mark.parametrize("kind", ["absent", "damaged"])
def test_what_one_rank_cannot_read_is_left_out_by_all(ranks: Ranks, kind: str) -> None:
    found = ranks(f"{kind} on one rank, skip")
    check_same(found, MESHES["dp 2 tp 2"])
    assert found[0].error == "" and len(found[0].steps) == STEPS
    lost = [line for step in found[0].steps for line in step["left_out"]]
    assert lost and all(f"{kind}.png" in line for line in lost)
    for step in found[
        0
    ].steps:  # one that is missed when it is drafted is replaced, one that is when it is loaded is not
        late = [line for line in step["left_out"] if "are looked up in" not in line]
        assert len(step["sample_ids"]) == 7 - len(late)


@pytest.mark.parametrize("kind", ["absent", "damaged"])
def test_what_one_rank_cannot_read_ends_the_run_of_all_with_the_same_words(ranks: Ranks, kind: str) -> None:
    found = ranks(f"{kind} on one rank, error")
    check_same(found, MESHES["dp 2 tp 2"])
    assert f"{kind}.jsonl:" in found[0].error and f"{kind}.png" in found[0].error
    assert found[0].error.startswith("DataError: ")


@pytest.mark.parametrize("policy", ["skip", "error"])
def test_a_data_file_that_one_rank_loses_ends_the_run_of_all(ranks: Ranks, policy: str) -> None:
    found = ranks(f"a data file gone, {policy}")
    check_same(found, MESHES["dp 3"])
    assert found[0].error == f"DataError: own {policy}.jsonl: no such file"


def test_a_fault_of_one_rank_is_raised_there_and_noticed_by_the_others(ranks: Ranks) -> None:
    first, faulty, third = ranks("a fault of one rank")
    assert faulty.error.startswith("TypeError")
    for other in (first, third):
        assert "has gone" in other.error and other.error.startswith("BackendError: rank")


def deaf(tmp_path: Path, model: Path, train: Path, number: int) -> list[str]:
    """How the others end where rank 2 is sent a signal when all have met."""
    told = {"place": str(tmp_path)}
    prepare(tmp_path, [Case("deaf", recipe(model, Mesh(dp=3), train), script="deaf", told=told)])
    processes = start(tmp_path, 3, DUETVL_PEER_TIMEOUT="5")
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline and processes[2].poll() is None
        time.sleep(0.02)
    processes[2].send_signal(number)
    try:
        wait(processes[:2], tmp_path)
    finally:
        processes[2].kill()
        processes[2].wait()
    return [found.error for found in seen(tmp_path, "deaf")]


def test_a_rank_that_is_killed_is_noticed_by_those_that_wait_for_a_step(tmp_path: Path, ranks: Ranks) -> None:
    found = deaf(tmp_path, ranks.model, ranks.train, signal.SIGKILL)
    assert len(found) == 2 and all(error.startswith("BackendError: rank ") and "has gone" in error for error in found)
    assert any("rank 2 has gone" in error for error in found)


def test_a_rank_that_is_stopped_is_named_by_those_that_wait_for_a_step(tmp_path: Path, ranks: Ranks) -> None:
    found = deaf(tmp_path, ranks.model, ranks.train, signal.SIGSTOP)
    assert len(found) == 2 and all(error.startswith("BackendError: rank ") for error in found)
    assert any("has waited 5 s for ranks [2]" in error and "DUETVL_PEER_TIMEOUT" in error for error in found)


def test_a_rank_whose_main_thread_does_something_else_is_no_error(tmp_path: Path, ranks: Ranks) -> None:
    case = Case("patient", recipe(ranks.model, Mesh(dp=2), ranks.train, prefetch=1), 4, script="patient")
    prepare(tmp_path, [case])
    wait(start(tmp_path, 2, DUETVL_PEER_TIMEOUT="1"), tmp_path)
    found = seen(tmp_path, "patient")
    check_same(found, Mesh(dp=2))
    assert found[0].error == "" and len(found[0].steps) == 4


# -- the same files --------------------------------------------------------------------------------------------------


def test_a_rank_with_other_data_files_is_named() -> None:
    ours = (FileFacts("a.jsonl", 10, 2), FileFacts("b.tar", 7, None))
    hosts = ["here", "there", "beyond"]
    check_same_data([ours, ours, ours], hosts)
    fewer = (FileFacts("a.jsonl", 10, 1), ours[1])
    with pytest.raises(
        DataError, match=r"rank 2 \(beyond\) has found a.jsonl with 10 bytes and 1 records, where rank 0 \(here\) has a"
    ):
        check_same_data([ours, ours, fewer], hosts)
    with pytest.raises(
        DataError, match=r"rank 1 .* has found no further data file, where rank 0 .* has b.tar with 7 bytes;"
    ):
        check_same_data([ours, ours[:1]], hosts)
