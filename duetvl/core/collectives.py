"""Protocol of communication between ranks. Nothing here is differentiable; parallel/differentiable.py adds that."""

from __future__ import annotations

from collections.abc import Sequence
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


class Collectives(Protocol):
    """Every rank of a group calls the same functions in the same order. Results are new tensors.

    Works without being started as long as there is one rank: then each call is the identity.
    """

    rank: int
    size: int

    def start(self) -> None:
        """Join the run that torchrun or msrun started, if there is one; otherwise this is rank 0 of 1."""
        ...

    def stop(self) -> None:
        """Leave the run."""
        ...

    def groups(self, ranks: Sequence[Sequence[int]]) -> Group:
        """The group that this rank is in, of groups that do not overlap. All ranks call it with the same list."""
        ...

    def all_reduce(self, x: Tensor, group: Group = None, op: str = "sum") -> Tensor:
        """Sum or max over the group, the same on every rank. Half precision is summed in float32."""
        ...

    def all_gather(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The ranks' tensors joined along axis 0 in group order; `sizes` gives each rank's rows if they differ."""
        ...

    def reduce_scatter(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The sum over the group, cut along axis 0; rank i keeps piece i. Even pieces unless `sizes` is given."""
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
        """Send and receive at once, so that no order of ranks can block. Messages between two ranks keep order."""
        ...

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        """Every rank's picklable value, in group order, on every rank. For small things."""
        ...

    def barrier(self, group: Group = None) -> None:
        """Return when every rank of the group has called."""
        ...
