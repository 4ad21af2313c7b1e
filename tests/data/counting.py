"""A small real encoder, whose records say what is to become of them, and files of such records.

A record is {"name": ..., "tokens": n, "patches": p, "what": ...}; `what` is "ok", "drop", "bad", "bug", "bad pixels",
"shrunk", "crash" (the process is killed while it drafts), "fault" (it ends otherwise), "memory" (it has none left),
"crash once" (until the file `flag` is there) or "crash pixels". Importable by worker processes.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np

from duetvl.core.batch import IGNORE, Batch, Sample
from duetvl.core.errors import DataError
from duetvl.data.draft import Draft, Dropped
from duetvl.data.sources.records import Record

NONE = np.zeros((0, 3), np.int64)


class CountingEncoder:
    def draft(self, record: Record) -> Draft:
        values = record.values
        what, tokens, patches = values.get("what", "ok"), values.get("tokens", 3), values.get("patches", 0)
        if what == "drop":
            raise Dropped(f"{record.where}: too long")
        if what == "bad":
            raise DataError(f"{record.where}: a bad record")
        if what == "bug":
            return {}["missing"]
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "crash once":
            _once(values["flag"])
        if what == "memory":
            raise MemoryError
        if what == "fault":
            os.kill(os.getpid(), signal.SIGSEGV)
        grids = np.array([[1, 1, patches]], np.int64) if patches else NONE
        ids = np.full(tokens, record.number)
        notes = ("shrunk",) if what == "shrunk" else ()
        return Draft(record.id, record.where, ids, ids, grids, NONE, media=(what, patches), notes=notes)

    def load(self, draft: Draft) -> Sample:
        what, patches = draft.media
        if what == "bad pixels":
            raise DataError(f"{draft.where}: a picture that is cut off")
        if what == "crash pixels":
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = np.full((patches, 1176), len(draft.id), np.float32) if patches else None
        return Sample(draft.input_ids, draft.labels, pixels, draft.image_grid_thw, id=draft.id)

    def pack(self, samples) -> Batch:
        ids = np.concatenate([sample.input_ids for sample in samples])
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        none = np.zeros(0, np.int32)
        rows = np.concatenate(pixels) if pixels else np.zeros((0, 1176), np.float32)
        targets = np.full(len(ids), IGNORE)
        names = tuple(sample.id for sample in samples)
        return Batch(ids, none, none, targets, rows, NONE, none, none, names)


def _once(flag: str) -> None:
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def write(path: Path, count: int, *, words: int = 0, **special: dict[int, object]) -> Path:
    """A JSONL file of records; `special` maps a key to the values that it has in some records, by number from 1."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(1, count + 1):
            values = {"name": f"{path.stem}{number}", "padding": "x" * words}
            values |= {key: by_number[number] for key, by_number in special.items() if number in by_number}
            file.write(json.dumps(values) + "\n")
    return path
