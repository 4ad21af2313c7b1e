"""Protocol of communication between ranks. Nothing here is differentiable; parallel/differentiable.py adds that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Tensor = Any
Group = Any  # opaque handle of a process group; None stands for all ranks


class Send(NamedTuple):
    """A tensor for another rank (its number in the whole run)."""

    tensor: Tensor
    to: int


class Receive(NamedTuple):
    """A tensor expected from another rank: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: str
    source: int


@dataclass(frozen=True)
class Pending:
    """A collective that has begun. `wait`, called once, gives its result."""

    wait: Callable[[], Tensor]


class Collectives(Protocol):
    """Every rank of a group calls the same functions in the same order.

    Tensors have any dtype of core/ops.py, bool only where nothing is summed, and at least one axis where pieces are
    rows. Results are new tensors, except that a group of one rank gets its argument back: each call is then the
    identity, also when `start` was never called. A result is a constant to the autograd. Where a rank
    has gone, or nothing comes from it for DUETVL_PEER_TIMEOUT seconds (600 unless set), those that wait for it raise
    BackendError.
    """

    rank: int
    size: int
    traffic: dict[str, int]
    """Bytes this rank has sent, by function: what a ring needs (all_reduce 2 (n-1)/n of the tensor, all_gather n-1
    pieces, reduce_scatter (n-1)/n), what goes to others (all_to_all, exchange), the tensor at a broadcast's source;
    in the dtype that travels, padding included. Objects and barriers are not counted."""
    calls: dict[str, int]
    """How often this rank has met others in each function, objects and barriers among them."""

    def launched(self) -> int:
        """How many ranks torchrun or msrun announced to this process, 1 without them; known before they meet.

        Raises BackendError where the environment is incomplete or belongs to the other launcher. The scheduler that
        msrun starts beside a single worker has nothing to do and ends here.
        """
        ...

    def start(self) -> None:
        """Join the run that torchrun or msrun started, if there is one; otherwise this is rank 0 of 1.

        Raises BackendError, after at most DUETVL_START_TIMEOUT seconds (600 unless set), where the environment is
        incomplete or belongs to the other launcher, or where ranks are missing.
        """
        ...

    def stop(self) -> None:
        """Leave the run."""
        ...

    def meeting_host(self) -> str:
        """The host at which the ranks of this run met, by a name or address that each of them can reach."""
        ...

    def groups(self, ranks: Sequence[Sequence[int]]) -> Group:
        """The group that this rank is in, of ascending groups that do not overlap and together hold every rank.

        All ranks call it with the same list. The same list again gives the same group.
        """
        ...

    def group_ranks(self, group: Group) -> Sequence[int]:
        """The members of a group in order, as numbers in the whole run."""
        ...

    def all_reduce(self, x: Tensor, group: Group = None, op: str = "sum") -> Tensor:
        """Sum or max over the group, the same on every rank.

        Half precision is summed in float32 on a CPU, and in its own dtype by nccl and hccl, over which activations
        then travel in half the bytes. Gradients of parameters are float32.
        """
        ...

    def all_gather(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The ranks' tensors joined along axis 0 in group order; `sizes` gives each rank's rows if they differ."""
        ...

    def reduce_scatter(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The sum over the group, cut along axis 0; rank i keeps piece i. Even pieces unless `sizes` is given."""
        ...

    def reduce_scatter_later(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Pending:
        """`reduce_scatter` that may go on while the caller computes, where the backend can.

        Every rank of the group begins the same ones in the same order. x is not written to until it has been waited
        for.
        """
        ...

    def all_to_all(
        self, x: Tensor, group: Group = None, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """Piece i of x along axis 0 goes to rank i; the pieces received are joined in group order.

        `send` and `receive` are the rows for and from each rank; even pieces unless given.
        """
        ...

    def broadcast(self, x: Tensor, source: int, group: Group = None) -> Tensor:
        """The tensor of rank `source` (its number in the whole run); x gives shape and dtype elsewhere."""
        ...

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        """Send and receive all of it at once; the tensors received, in the order of `receives`.

        Messages between two ranks keep their order, also over several calls. A call may wait until the other rank
        calls too: two ranks that send to each other in one step do it in one call each, then nothing can block. A
        rank may send to itself within one call.
        """
        ...

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        """Every rank's picklable value, in group order, on every rank. For small things."""
        ...

    def barrier(self, group: Group = None) -> None:
        """Return when every rank of the group has called."""
        ...
