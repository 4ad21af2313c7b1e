"""Layers put on the stages of a pipeline, so that the slowest stage is as fast as can be."""

from __future__ import annotations

from collections.abc import Sequence

from duetvl.core.stages import Rows


def placed(tower: Sequence[float], decoder: Sequence[float], pp: int, virtual: int) -> tuple[Rows, Rows]:
    """Rows of layers of both towers, in the notation of a recipe, for layers that take these times.

    Each stage has a layer at least. What is left over where layers do not divide evenly is on the last stages: the
    first ones hold most micro-batches at once. There must be as many layers as stages.
    """
    costs, stages = [*tower, *decoder], pp * virtual
    low, high = max(sum(costs) / stages, max(costs)), sum(costs)
    best = _filled(costs, stages, high)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        ends = _filled(costs, stages, middle)
        if _slowest(costs, ends) <= middle:
            best, high = ends, middle
        else:
            low = middle
    depth = len(tower)
    vision = [max(0, min(stop, depth) - min(start, depth)) for start, stop in _spans(best)]
    language = [stop - start - seen for (start, stop), seen in zip(_spans(best), vision, strict=True)]
    return _rows(vision, pp), _rows(language, pp)


def _filled(costs: Sequence[float], stages: int, limit: float) -> list[int]:
    """Where each stage ends, filled from the last one up to a limit; the first stage has what is left."""
    ends, stop = [len(costs)], len(costs)
    for before in range(stages - 1, 0, -1):
        start, total = stop - 1, costs[stop - 1]
        while start > before and total + costs[start - 1] <= limit:
            start, total = start - 1, total + costs[start - 1]
        ends.append(start)
        stop = start
    return ends[::-1]


def _spans(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _slowest(costs: Sequence[float], ends: Sequence[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in _spans(ends))


def _rows(counts: Sequence[int], pp: int) -> Rows:
    return tuple(tuple(counts[start : start + pp]) for start in range(0, len(counts), pp))
