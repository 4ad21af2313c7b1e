"""Starts the tiny run of `tiny_run.py` over and over, and kills it: python killed_run.py BACKEND RECIPE [override ...]

Reads a moment, a run directory and more overrides from each line, tabs between them, and answers with `killed` or
`done`. `call 17` kills the process before its 17th call that changes a directory or waits for the disk, whichever
thread makes it; `save 2` before the second file of a checkpoint is on the disk; `after 0.2` that many seconds after
training has begun; `never` lets it run to its end. Each start is a fork: the framework is imported once, before any
of its threads exist, and nothing of one start is left for the next but its files.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from itertools import count

from duetvl.core.backend import load_backend
from duetvl.training.train import train
from duetvl.training.watching.callbacks import Callback

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


class Begin(Callback):
    """What happens when training begins."""

    def __init__(self, action):
        self.action = action

    def on_start(self, run):
        self.action()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(moment):
    numbers = count(1)  # next() is one step for all threads

    def counted(real):
        def call(*args, **kwargs):
            if next(numbers) == moment:
                die()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def die_in_save(moment):
    """Before the checkpoint being written has its file number `moment` on the disk."""
    numbers, real = count(1), os.fsync

    def call(descriptor):
        if ".saving" in os.readlink(f"/proc/self/fd/{descriptor}") and next(numbers) == moment:
            die()
        return real(descriptor)

    os.fsync = call


def die_after(seconds):
    def wait():
        time.sleep(seconds)
        die()

    threading.Thread(target=wait, daemon=True).start()


def run(backend, recipe, overrides, how, value):
    if how in ("call", "save"):
        (die_at_call if how == "call" else die_in_save)(int(value))
    action = (lambda: die_after(float(value))) if how == "after" else (lambda: None)
    train(recipe, overrides, backend=load_backend(backend, "cpu"), callbacks=[Begin(action)])


def main():
    backend, recipe, *overrides = sys.argv[1:]
    __import__({"torch_npu": "torch", "mindspore": "mindspore"}[backend])
    for line in sys.stdin:
        moment, place, *more = line.rstrip("\n").split("\t")
        how, _, value = moment.partition(" ")
        child = os.fork()
        if not child:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            code = 1
            try:
                run(backend, recipe, [*overrides, *more, f"train.output_dir={place}"], how, value or 0)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        sys.stdout.write("killed\n" if killed else "done\n" if status == 0 else f"failed {status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
