"""Passes of fixed shapes, kept as CUDA graphs: the device repeats them without waiting for the host's launches.

Not run on hardware. So it is tried, not believed: what a graph gives is compared once with what it was recorded from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import torch

from duetvl.core.kv_cache import Append, Given, Recorder

Tensor = torch.Tensor
Replay = Callable[[], Tensor]  # does what was recorded; the same tensor every time
Record = Callable[[Callable[[], Tensor]], Replay]  # raises RuntimeError where the device refuses
Move = Callable[[np.ndarray, str | None], Tensor]
# Passes of a kind before one is recorded: libraries set themselves up, and rare kinds stay as they are.
WARM_UP: Final = 2
DIFFERENCE: Final = 2.0**-6  # between two runs of the same kernels, as a share of the largest number


class Inlet(Protocol):
    """What `CudaOps.from_numpy` does meanwhile."""

    def __call__(self, array: np.ndarray, dtype: str | None) -> Tensor:
        """The array on the device."""
        ...


@dataclass
class Places:
    """The n-th array of every pass of a kind, in the same tensor."""

    move: Move
    tensors: list[Tensor] = field(default_factory=list)
    number: int = 0

    def __call__(self, array: np.ndarray, dtype: str | None) -> Tensor:
        fresh = self.move(array, dtype)
        if self.number == len(self.tensors):
            self.tensors.append(fresh.clone())  # on a CPU it may be the caller's own memory
        else:
            held = self.tensors[self.number]
            assert (held.shape, held.dtype) == (fresh.shape, fresh.dtype), "the passes of a kind have the same arrays"
            held.copy_(fresh)
        self.number += 1
        return self.tensors[self.number - 1]


def closed(array: np.ndarray, dtype: str | None) -> Tensor:
    """The `Inlet` of what is recorded: a copy from the host would be repeated with memory that is another's by then."""
    raise AssertionError("a pass that is recorded moves nothing to the device")


class Host(Protocol):
    """What moves arrays, through an inlet for a time."""

    def move(self, array: np.ndarray, dtype: str | None) -> Tensor:
        """To the device, whatever the inlet."""
        ...

    def through(self, inlet: Inlet) -> AbstractContextManager[None]:
        """Meanwhile `from_numpy` is this."""
        ...


@dataclass
class Kept:
    """Of one kind of pass. tried: whether a repetition was compared with the pass itself."""

    places: Places
    seen: int = 0
    replay: Replay | None = None
    tried: bool = False


class GraphRecorder(Recorder):
    """See core/kv_cache.py.

    `kind`: what is the same in all passes that one recording serves; None for a pass that no recording can serve.
    """

    def __init__(self, host: Host, kind: Callable[[Append], Hashable | None], record: Record):
        self.host, self.kind, self.record = host, kind, record
        self.off = False
        self.kept: dict[Hashable, Kept] = {}

    def run(self, append: Append, prepare: Callable[[], Given], run: Callable[[Given], Tensor]) -> Tensor:
        kind = None if self.off else self.kind(append)
        if kind is None:
            return run(prepare())
        kept = self.kept.setdefault(kind, Kept(Places(self.host.move)))
        kept.places.number = 0
        with self.host.through(kept.places):
            given = prepare()
        with self.host.through(closed):
            if kept.replay is None:
                return self._observe(kept, lambda: run(given))
            if kept.tried:
                return kept.replay()
            return self._compare(kept, kept.replay, lambda: run(given))

    def _observe(self, kept: Kept, run: Callable[[], Tensor]) -> Tensor:
        """Run a pass, and record it once there have been enough of its kind."""
        kept.seen += 1
        if kept.seen > WARM_UP:
            try:
                kept.replay = self.record(run)
            except RuntimeError as error:
                self._give_up(str(error).splitlines()[0])
        return run()

    def _compare(self, kept: Kept, replay: Replay, run: Callable[[], Tensor]) -> Tensor:
        """The pass by itself, as the first repetition is to be like it; both write the same rows of the cache."""
        repeated, expected = replay().clone(), run()
        largest = expected.float().abs().max()
        if bool((repeated.float() - expected.float()).abs().max() <= DIFFERENCE * largest):
            kept.tried = True
        else:
            self._give_up("a repetition gives other numbers")
        return expected

    def _give_up(self, reason: str) -> None:
        self.off = True
        self.kept.clear()
        warnings.warn(f"passes are not recorded, as tried here: {reason}", stacklevel=2)


class Graphs:
    """Records CUDA graphs, which share their memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of a server may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class Recording:
    """Mixed into operations whose `from_numpy` may go through an inlet for a time. See `Host`."""

    inlet: Inlet | None = None

    @contextmanager
    def through(self, inlet: Inlet) -> Iterator[None]:
        """Meanwhile `from_numpy` is this."""
        self.inlet = inlet
        try:
            yield
        finally:
            self.inlet = None
