"""Four ranks save together, and every layout reads what they have written; for cases.py."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.ranks import Ranks
from duetvl.storage.finding import find_checkpoint, found_by_all
from duetvl.training.checkpoints.checkpoint import load_checkpoint
from duetvl.training.checkpoints.saving import Saver

sys.path.append(str(Path(__file__).parents[1] / "training"))

from divided_state import LAYOUTS, cut, held, ranks_of, snapshot, whole


def check(be: Backend) -> None:
    """Float32 in the foreground, and bfloat16 with its masters in the background."""
    ranks = Ranks(be.collectives)
    place = Path(ranks.agree(tempfile.mkdtemp() if ranks.writes else ""))
    for layout in ("dp 2 x tp 2", "dp 2 x cp 2, zero 3", "pp 2 x cp 2 tied in virtual stages"):
        for half in (False, True):
            _check(be, ranks, place / layout / str(half), layout, half=half)
    be.collectives.barrier()
    if ranks.writes:
        shutil.rmtree(place)


def _check(be: Backend, ranks: Ranks, place: Path, writer: str, *, half: bool) -> None:
    division, numbers = LAYOUTS[writer].of_rank(ranks.index), whole(1, half)
    told: list[Any] = []

    def make(array: np.ndarray) -> Any:
        dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
        return be.checkpoint_io.load(array, dtype, dtype)

    state = held(division, numbers, make, seed=7)
    with Saver(
        place, ranks=ranks, on_saved=lambda *saved: told.append(saved), warn=told.append, background=half
    ) as saver:
        saver.save(lambda copy: snapshot(state, division, be, 7, copy))
    assert told == [(place / "checkpoints/step-0000007", 7)], told
    ref = found_by_all(ranks, lambda verify: find_checkpoint(place, verify=verify))
    for layout in LAYOUTS.values():
        for reader in ranks_of(layout)[ranks.index % layout.mesh.size :: ranks.count]:
            found = held(reader, whole(2, half), make)
            load_checkpoint(
                ref,
                parameters=found.parameters,
                owned=found.owned,
                optimizer_state=found.optimizer,
                everything=found.everything,
                backend=be,
            )
            for kind, path, part, tensor in found.tensors():
                wanted = cut(numbers[kind][path], part)
                bits = be.checkpoint_io.save(tensor)[0].reshape(wanted.shape)
                assert np.array_equal(bits, wanted), (kind, path)
