"""Ranks that save together, as plain processes without a framework: python saving_ranks.py CASE DIRECTORY

Ranks are forks of one process that exchange objects over sockets. As a launcher does, the parent ends the others once
one has died. What each rank has come to is printed, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from divided_state import LAYOUTS, held, snapshot, whole
from numpy_backend import numpy_backend

import duetvl.storage.finding as module
from duetvl.core.errors import CheckpointError
from duetvl.core.ranks import Ranks
from duetvl.storage.finding import checkpoints_dir, find_checkpoint, found_by_all
from duetvl.training.checkpoints.saving import Saver
from duetvl.training.checkpoints.writing import remove_leftovers

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
NUMBERS = {step: whole(step) for step in (1, 2, 3)}


class Sockets:
    """As much of collectives as `Ranks` needs; rank 0 is the hub."""

    def __init__(self, rank, size, ends):
        self.rank, self.size, self.ends = rank, size, ends

    def gather_objects(self, value):
        if self.rank:
            self.ends[0].send(value)
            return self.ends[0].recv()
        values = [value, *[end.recv() for end in self.ends]]
        for end in self.ends:
            end.send(values)
        return values


def run(size, work, patient=True):
    """`work(ranks)` on each rank; how each ended: what it gave, or "killed N". The first death ends all."""
    pairs = [socket.socketpair() for _ in range(size - 1)]
    results = [os.pipe() for _ in range(size)]
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            ends = [Connection(os.dup(pair[0].fileno())) for pair in pairs]
            if rank:
                ends = [Connection(os.dup(pairs[rank - 1][1].fileno()))]
            for pair in pairs:
                pair[0].close(), pair[1].close()
            one(rank, size, ends, work, results[rank][1])
        children.append(child)
    for pair in pairs:
        pair[0].close(), pair[1].close()
    ended = {}
    while len(ended) < size:
        child, status = os.wait()
        ended[children.index(child)] = status
        if os.WIFSIGNALED(status) and not patient:
            for other in set(range(size)) - ended.keys():
                os.kill(children[other], signal.SIGKILL)
    return [outcome(results[rank], ended[rank]) for rank in range(size)]


def one(rank, size, ends, work, result):
    try:
        found = work(Ranks(Sockets(rank, size, ends)))
    except BaseException:
        found = traceback.format_exc()
    os.write(result, json.dumps(found).encode())
    os._exit(0)


def outcome(pipe, status):
    os.close(pipe[1])
    with os.fdopen(pipe[0], "rb") as end:
        text = end.read()
    return f"killed {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else json.loads(text)


# -- what a rank does -------------------------------------------------------------------------------------------------


def saver(place, ranks, told, **options):
    return Saver(
        Path(place),
        ranks=ranks,
        on_saved=lambda path, step: told.append(f"saved {path.name}"),
        warn=told.append,
        **options,
    )


def taking(division, step):
    state = held(division, NUMBERS[step], seed=step)
    return lambda copy: snapshot(state, division, numpy_backend(), step, copy)


def saving(place, division, step, **options):
    """Save one step, as a periodic checkpoint."""

    def work(ranks):
        told = []
        mine = division.of_rank(ranks.index)
        with saver(place, ranks, told, **options) as one:
            one.save(taking(mine, step))
            one.wait()
        return told

    return work


def die_at(moment):
    """Killed before the call number `moment` that changes a directory or waits for the disk."""
    numbers = count(1)

    def counted(real):
        def call(*args, **kwargs):
            if next(numbers) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


# -- cases ------------------------------------------------------------------------------------------------------------


def together(place):
    """Four ranks, in the foreground and in the background; a last one; leftovers of another number of ranks."""
    division = LAYOUTS["dp 2 x tp 2"]
    stale = checkpoints_dir(place) / ".step-0000001.saving"
    stale.mkdir(parents=True)
    for name in ("weights-00006-of-00007.safetensors", "written-00006.json", "written-00001.json"):
        (stale / name).write_text("{}")

    def work(ranks):
        told = []
        mine = division.of_rank(ranks.index)
        with saver(place, ranks, told, background=True, keep_last=2) as one:
            for step in (1, 2):
                one.save(taking(mine, step))
                while one._pending:
                    one.poll()
                    time.sleep(0.01)
            one.save(taking(mine, 2))
            one.save_last(taking(mine, 3))
        return told

    return run(4, work)


def full(place):
    """Rank 1 alone finds the disk full: a warning, an error for the last one, and a save that goes well again."""
    division = LAYOUTS["dp 2"]
    run(2, saving(place, division, 1))

    def work(ranks):
        told = []
        mine = division.of_rank(ranks.index)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with saver(place, ranks, told) as one:
            limit = 1000 if ranks.index == 1 else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            one.save(taking(mine, 2))
            try:
                one.save_last(taking(mine, 2))
            except CheckpointError as error:
                told.append(f"raised {error}")
            told.append(f"kept {sorted(os.listdir(checkpoints_dir(place)))}")
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            one.save_last(taking(mine, 3))
        return told

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return run(2, work)


def first_full(place):
    """Rank 0 cannot even make a directory: `checkpoints` is a file. All ranks are told; nothing hangs."""
    Path(place).mkdir(exist_ok=True)
    checkpoints_dir(place).write_text("")
    return run(3, saving(place, LAYOUTS["dp 3"], 1))


def silent(place):
    """Rank 1 stops without a word before it writes: rank 0 gives up after DUETVL_PEER_TIMEOUT."""
    os.environ["DUETVL_PEER_TIMEOUT"] = "0.5"
    division = LAYOUTS["dp 2"]

    def work(ranks):
        told = []
        with saver(place, ranks, told, background=True) as one:
            if ranks.index == 1:
                one._outcome = lambda *_: None
            one.save(taking(division.of_rank(ranks.index), 1))
        return [*told, sorted(os.listdir(checkpoints_dir(place)))]

    return run(2, work)


def killed(place):
    """One of two ranks is killed before each call that changes a directory, in turn; every time a checkpoint is there
    to be loaded, by both ranks, and the next save, of another number of ranks, tidies up."""
    os.fsync = lambda descriptor: None  # what a killed process has written is there all the same
    two, three = LAYOUTS["dp 2"], LAYOUTS["dp 3"]
    found = {0: [], 1: []}
    before = Path(place) / "before"
    run(2, saving(before, two, 1))
    for victim in (0, 1):
        for moment in count(1):
            run_dir = Path(place) / f"{victim}-{moment}"
            shutil.copytree(before, run_dir)

            def work(ranks, run_dir=run_dir, victim=victim, moment=moment):
                if ranks.index == victim:
                    die_at(moment)
                return saving(run_dir, two, 2, keep_last=1)(ranks)

            ended = run(2, work, patient=False)
            step, rejected = looked(run_dir)
            assert not rejected, rejected
            if ended == [["saved step-0000002"]] * 2:
                assert step == 2
                break
            assert ended[victim] == "killed 9", ended
            found[victim].append(step)
            remove_leftovers(run_dir)
            assert looked(run_dir) == (step, ())
            run(3, saving(run_dir, three, 3, keep_last=1))
            assert sorted(os.listdir(checkpoints_dir(run_dir))) == ["latest", "step-0000003"]
            shutil.rmtree(run_dir)
    return found


def looked(run_dir):
    ref = find_checkpoint(run_dir)
    for kind in ("weights", "exp_avg"):
        for path in ref.manifest.tensors[kind]:
            assert (ref.stored.read(kind, path)[0] == NUMBERS[ref.step][kind][path]).all(), (kind, path)
    return ref.step, ref.rejected


def finding(place):
    """Files are verified a share each; what one rank finds, all hear of. One damaged, one missing, nothing at all."""
    division = LAYOUTS["dp 2 x tp 2"]
    for step in (1, 2, 3):
        run(4, saving(place, division, step))
    folder = checkpoints_dir(place)
    damaged = folder / "step-0000003/exp_avg-00002-of-00004.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (folder / "step-0000002/weights-00001-of-00004.safetensors").unlink()

    def work(ranks):
        read = []
        plain = module.file_record
        module.file_record = lambda path: read.append(path.name) or plain(path)

        def search(where, **options):
            try:
                ref = found_by_all(ranks, lambda verify: find_checkpoint(where, verify=verify, **options))
            except CheckpointError as error:
                return str(error)
            return [ref.step, *ref.rejected]

        found = [search(place, pass_over=True), search(place), search(Path(place) / "nowhere")]
        return [*found, read]

    return run(3, work)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
