"""A walk over all records of a recipe: what each of them would become, from headers alone or with every pixel."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import islice

from duetvl.data.draft import Draft, Outcome
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.workers import InlinePool, Pool, make_pool
from duetvl.data.sources.records import Ref
from duetvl.data.survey import Survey
from duetvl.training.watching.progress import Progress

_AT_ONCE = 64  # records asked of each worker at a time
_FEW = 512  # records that are walked over faster than processes are started


def walk(
    name: str, refs: Iterator[Ref], count: int | None, maker: SampleMaker, *, merge: int, decode: bool = False
) -> Survey:
    """Draft every record with all cores, and with `decode` make its pixels too; nothing is kept but the sums.

    name and count (None where it is not known) are for the progress, which goes to stderr. `merge` patches along a
    side of a picture make a token.
    """
    few = count is not None and count <= _FEW and not decode
    workers = 0 if few else len(os.sched_getaffinity(0))
    found = Survey()
    shown: Progress | None = None
    if count is not None and not few:
        shown = Progress(count, unit=f"{name}: record", every=max(1, count // 10), stream=sys.stderr)
    pool = InlinePool(maker) if few else make_pool(maker, workers)
    try:
        for outcome in _outcomes(pool, refs, _AT_ONCE * max(1, workers), decode):
            found.add(outcome, merge)
            if shown is not None:
                shown.step({"step": found.records})
    finally:
        pool.close()
        if shown is not None:
            shown.close()
    return found


def _outcomes(pool: Pool, refs: Iterator[Ref], group: int, decode: bool) -> Iterator[Outcome]:
    while some := list(islice(refs, group)):
        outcomes = pool.drafts(some)
        if decode:
            yield from _decoded(pool, outcomes)
        else:
            yield from outcomes


def _decoded(pool: Pool, outcomes: list[Outcome]) -> Iterator[Outcome]:
    """Drafts whose pixels were made, and what is wrong with the others. A few samples are in memory at a time."""
    window = 8
    for start in range(0, len(outcomes), window):
        part = outcomes[start : start + window]
        loads = [pool.load(outcome) if isinstance(outcome, Draft) else None for outcome in part]
        for outcome, load in zip(part, loads, strict=True):
            made = None if load is None else load.result()
            yield made if isinstance(made, Exception) else outcome
