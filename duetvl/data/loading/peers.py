"""How the ranks of a run share the work of its data, and which of them train on which packs.

Each rank drafts a share of a step's records and makes the pixels of a share of its packs, and the ranks exchange the
results. A framework's communication belongs to the main thread, so this has connections of its own: a channel
for each thread that uses one, as all ranks must make the same calls on a channel in the same order. Alone each function
is the identity, and there is no connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from duetvl.core.composed.collectives import time_limit
from duetvl.core.host_transport import Address, HostTransport
from duetvl.core.mesh import AXES, Mesh
from duetvl.data.loading.packing import assign

T = TypeVar("T")


class Channel:
    """What one thread of this rank exchanges with the same thread of the others. Without a transport it is alone."""

    def __init__(self, transport: HostTransport | None = None):
        self._transport = transport
        self.rank, self.size = (transport.rank, transport.size) if transport else (0, 1)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of some items that are this rank's share."""
        return items[self.rank :: self.size]

    def whole(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """All items in their order, from the shares of all ranks."""
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def gather(self, value: T) -> list[T]:
        """Every rank's value."""
        return self.route([value] * self.size)

    def route(self, parcels: Sequence[T]) -> list[T]:
        """What every rank has for this one; `parcels` is what this one has for each."""
        received = {self.rank: parcels[self.rank]}
        if self._transport is not None:
            received |= self._transport.swap_values({r: x for r, x in enumerate(parcels) if r != self.rank})
        return [received[rank] for rank in range(self.size)]

    def check_waiting(self, since: float) -> None:
        """See `HostTransport.check_waiting`."""
        if self._transport is not None:
            self._transport.check_waiting(since)

    def abandon(self) -> None:
        """End every exchange under way, here and at the others; any thread may call it."""
        if self._transport is not None:
            self._transport.abandon()

    def close(self) -> None:
        """Close the connections, when no thread uses them any more."""
        if self._transport is not None:
            self._transport.close()


class Deal(NamedTuple):
    """`own`: the packs that this rank trains on. `makers`: for each pack the rank that makes its pixels."""

    own: list[int]
    makers: list[int]


@dataclass(frozen=True)
class Peers:
    """The ranks of a run as its data sees them. By default there is this one.

    `places` holds for each place of data parallelism the ranks that train on its packs: they differ in the other axes.
    `plans` and `pixels` are the channels of the two threads that make steps ahead, `passes` is the main thread's.
    """

    rank: int = 0
    places: Sequence[Sequence[int]] = ((0,),)
    plans: Channel = field(default_factory=Channel)
    pixels: Channel = field(default_factory=Channel)
    passes: Channel = field(default_factory=Channel)

    @classmethod
    def meet(cls, mesh: Mesh, rank: int, host: str, gather: Callable[[list[bytes]], list[list[bytes]]]) -> Peers:
        """Connect with all ranks of the mesh, each of which calls this. Raises BackendError where one is missing.

        `host` is one that all can reach (`Collectives.meeting_host`); `gather` gives every rank's value to each
        (`Collectives.gather_objects`).
        """
        if mesh.size == 1:
            return cls()
        limit = time_limit("DUETVL_PEER_TIMEOUT")
        ahead = [HostTransport(rank, mesh.size, host, limit, patient=True) for _ in ("plans", "pixels")]
        transports = [*ahead, HostTransport(rank, mesh.size, host, limit)]
        addresses = gather([transport.address.packed() for transport in transports])
        for transport, packed in zip(transports, zip(*addresses, strict=True), strict=True):
            transport.connect([Address.unpack(address) for address in packed])
        places = mesh.groups(*(axis for axis in AXES if axis != "dp"))
        return cls(rank, places, *map(Channel, transports))

    def for_passes(self) -> Peers:
        """The same for what the main thread makes while steps are made ahead."""
        return replace(self, plans=self.passes, pixels=self.passes)

    @property
    def team(self) -> Sequence[int]:
        """The ranks that train on the same packs as this one, itself among them."""
        return next(ranks for ranks in self.places if self.rank in ranks)

    def deal(self, costs: Sequence[tuple[int, int]]) -> Deal:
        """Give packs of (tokens, patches) to places, and within each to the ranks that make their pixels."""
        own, makers = list[int](), [0] * len(costs)
        for ranks, packs in zip(self.places, assign(costs, len(self.places)), strict=True):
            for rank, made in zip(ranks, assign([costs[pack] for pack in packs], len(ranks)), strict=True):
                for place in made:
                    makers[packs[place]] = rank
            if self.rank in ranks:
                own = packs
        return Deal(own, makers)

    def check_waiting(self, since: float) -> None:
        """Raise BackendError where nothing comes to the threads that make steps ahead.

        For DUETVL_PEER_TIMEOUT seconds, counted from `since` (of time.monotonic) at the earliest.
        """
        self.plans.check_waiting(since)
        self.pixels.check_waiting(since)

    def abandon(self) -> None:
        """End the exchanges of the threads that make steps ahead, here and at the others."""
        self.plans.abandon()
        self.pixels.abandon()

    def close(self) -> None:
        """Close all connections, when no thread uses them any more."""
        for channel in (self.plans, self.pixels, self.passes):
            channel.close()
