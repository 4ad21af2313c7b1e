"""What is missing where no layout fits, and the nearest that would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from duetvl.planning.search import Proposal, Search, Wish, degrees

_DOUBLINGS: Final = 6  # of the devices that are tried


def shortage(search: Search) -> str:
    """One line: the layout that takes least, how much it lacks, and what would fit."""
    wish, least = search.wish, search.smallest()
    lacking = least.memory.on_device - wish.memory
    mode = least.recipe.train.recompute
    said = (
        f"no layout of {wish.devices} x {wish.device.name} fits in {_gib(wish.memory)} a device: the smallest, "
        f"{_named(least)} with train.recompute={mode}, takes {_gib(least.memory.on_device)}, {_gib(lacking)} too much"
    )
    ways = [f"{words} ({_named(smallest)}, {_gib(smallest.memory.on_device)})" for words, smallest in _ways(wish)]
    return f"{said}; it fits {', or '.join(ways)}" if ways else f"{said}; lower --seq or take a smaller model"


def _ways(wish: Wish) -> Iterator[tuple[str, Proposal]]:
    """Changes after which a layout fits, each with the one that takes least."""
    for words, changed in _changes(wish):
        search = Search(changed)
        smallest = search.smallest()
        if smallest.fits(wish.memory):
            yield words, smallest
    for power in range(1, _DOUBLINGS + 1):
        more = replace(wish, devices=wish.devices * 2**power)
        smallest = Search(more).smallest()
        if smallest.fits(wish.memory):
            yield f"on {more.devices} devices", smallest
            return


def _changes(wish: Wish) -> Iterator[tuple[str, Wish]]:
    base = wish.base

    def changed(**sections: Any) -> Wish:
        return replace(wish, base=base.model_copy(update=sections))

    if base.train.recompute != "full" and wish.modes[-1] != "full":
        train = base.train.model_copy(update={"recompute": "full"})
        yield "with train.recompute=full", changed(train=train)
    if base.lora is None:
        if not base.optim.offload:
            yield "with optim.offload=true", changed(optim=base.optim.model_copy(update={"offload": True}))
        yield "with --lora", changed(lora=type(base).model_validate({**_least(base), "lora": {}}).lora)


def _least(base: Any) -> dict[str, Any]:
    """The sections that a recipe cannot do without."""
    return {"model": {"path": base.model.path}, "data": {"train": base.data.train}}


def _named(proposal: Proposal) -> str:
    parallel = proposal.recipe.parallel
    return degrees(parallel) + " zero 3" * (parallel.zero == 3)


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
