"""The collectives between the cards of a node: each against what it should give, and how fast the largest one is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.collectives import Receive, Send
from duetvl.doctor.check import Check, compared, tolerance
from duetvl.doctor.speed import seconds_of

PART = "cards"


def check_between(backend: Backend) -> Iterator[Check]:
    """Every rank runs this, after they have met; the rows of each are about what it received itself."""
    collectives, ops = backend.collectives, backend.ops
    ranks, rank = collectives.size, collectives.rank
    rows = [_numbers(ranks, one) for one in range(ranks)]
    half = "bfloat16" if backend.device.supports("bfloat16") else "float16"
    mine, total = ops.from_numpy(rows[rank]), np.sum(rows, 0)
    before, after = (rank - 1) % ranks, (rank + 1) % ranks
    yield _check(backend, "all_reduce float32", collectives.all_reduce(mine), total)
    summed = collectives.all_reduce(ops.cast(mine, half))
    yield _check(backend, f"all_reduce {half}", summed, total, tolerance(half, 2 * ranks))
    yield _check(backend, "all_gather", collectives.all_gather(mine), np.concatenate(rows))
    yield _check(backend, "reduce_scatter", collectives.reduce_scatter(mine), np.split(total, ranks)[rank])
    pieces = np.concatenate([np.split(row, ranks)[rank] for row in rows])
    yield _check(backend, "all_to_all", collectives.all_to_all(mine), pieces)
    yield _check(backend, "broadcast", collectives.broadcast(mine, ranks - 1), rows[-1])
    (received,) = collectives.exchange([Send(mine, after)], [Receive(tuple(rows[before].shape), "float32", before)])
    yield _check(backend, "exchange", received, rows[before])
    count = 2**18 if backend.device.name.startswith("cpu") else 2**26
    large = ops.zeros((count,))
    seconds = _seconds(backend, large)
    bus = 2 * (ranks - 1) / ranks * 4 * count / seconds / 1e9
    yield Check(PART, f"all_reduce of {4 * count >> 20} MiB, {ranks} ranks", True, figure=f"{bus:.3g} GB/s of bus")


def _seconds(backend: Backend, large: Any) -> float:
    """Of one all_reduce; every rank calls it as often as the others, so the number is fixed by the first trial."""
    collectives = backend.collectives
    alone = seconds_of(backend, lambda: collectives.all_reduce(large), seconds=0.0)
    return max(collectives.gather_objects(alone))


def _numbers(ranks: int, rank: int) -> np.ndarray:
    return np.random.default_rng([7, rank]).standard_normal((4 * ranks, 8)).astype(np.float32)


def _check(backend: Backend, name: str, ours: Any, expected: np.ndarray, allowed: float = 2e-6) -> Check:
    return compared(PART, name, [(backend.to_numpy(ours), expected)], allowed)
