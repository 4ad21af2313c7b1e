"""How a step is cut into micro-batches, and which rank gets which. The cut knows neither ranks nor workers."""

from __future__ import annotations

from collections.abc import Sequence


def pack(
    tokens: Sequence[int], limit: int, patches: Sequence[int] | None = None, most_patches: int | None = None
) -> list[list[int]]:
    """Cut samples of the given sizes into packs of at most `limit` tokens and `most_patches` patches.

    First fit decreasing, by whichever of the two bounds a sample fills more of. Returns the samples of each pack.
    Samples keep their order within a pack, packs are ordered by their first sample. A sample beyond a bound is alone
    in its pack.
    """
    sizes: list[tuple[int, ...]] = [(n,) for n in tokens]
    bounds: tuple[int, ...] = (limit,)
    if patches is not None and most_patches is not None:
        sizes, bounds = list(zip(tokens, patches, strict=True)), (limit, most_patches)
    packs: list[list[int]] = []
    room: list[tuple[int, ...]] = []
    for sample in sorted(range(len(sizes)), key=lambda i: -max(map(_share, sizes[i], bounds))):
        size = sizes[sample]
        fits = (at for at, left in enumerate(room) if all(n <= free for n, free in zip(size, left, strict=True)))
        at = next(fits, len(packs))
        if at == len(packs):
            packs.append([])
            room.append(bounds)
        packs[at].append(sample)
        room[at] = tuple(free - n for n, free in zip(size, room[at], strict=True))
    return sorted(sorted(samples) for samples in packs)


def _share(size: int, bound: int) -> float:
    return size / bound


def assign(costs: Sequence[tuple[int, int]], dp: int) -> list[list[int]]:
    """Give packs of (tokens, patches) to ranks: the packs of each rank, in order.

    Numbers of packs differ by one at most, and are equal where dp divides them. Within that, the heaviest pack that
    is left goes to the rank that has least; a pack weighs its share of all tokens plus its share of all patches.
    """
    totals = [max(1, sum(cost[kind] for cost in costs)) for kind in (0, 1)]
    weights = [cost[0] / totals[0] + cost[1] / totals[1] for cost in costs]
    fewest, with_one_more = divmod(len(costs), dp)
    ranks: list[list[int]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for item in sorted(range(len(costs)), key=lambda i: -weights[i]):
        full = sum(len(packs) > fewest for packs in ranks) >= with_one_more
        open_ranks = [r for r in range(dp) if len(ranks[r]) < fewest + (not full)]
        rank = min(open_ranks, key=lambda r: loads[r])
        ranks[rank].append(item)
        loads[rank] += weights[item]
    return [sorted(packs) for packs in ranks]
