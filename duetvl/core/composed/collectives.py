"""What all collectives share: the identity on one rank, uneven pieces by padding, half precision summed in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from duetvl.core.collectives import Collectives, Group, Receive, Send
from duetvl.core.ops import Ops

Tensor = Any
HALF = ("bfloat16", "float16")


class ComposedCollectives(Collectives):
    """See core/collectives.py. A backend supplies the functions that begin with `even_` and `group_ranks`."""

    rank = 0
    size = 1

    def __init__(self, ops: Ops):
        self.ops = ops

    def group_ranks(self, group: Group) -> Sequence[int]:
        """The members of a group, as numbers in the whole run."""
        raise NotImplementedError

    def even_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        """float32, int32 or int64."""
        raise NotImplementedError

    def even_all_gather(self, x: Tensor, group: Group) -> Tensor:
        """All pieces have x's shape."""
        raise NotImplementedError

    def even_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        """x's rows divide by the group's size."""
        raise NotImplementedError

    def all_reduce(self, x: Tensor, group: Group = None, op: str = "sum") -> Tensor:
        if self._alone(group):
            return x
        dtype = self.ops.dtype_of(x)
        if dtype in HALF:
            return self.ops.cast(self.even_all_reduce(self.ops.cast(x, "float32"), group, op), dtype)
        return self.even_all_reduce(x, group, op)

    def all_gather(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        if self._alone(group):
            return x
        if sizes is None or len(set(sizes)) == 1:
            return self.even_all_gather(x, group)
        longest = max(sizes)
        whole = self.even_all_gather(self._pad(x, longest), group)
        return self.ops.concat([whole[i * longest : i * longest + n] for i, n in enumerate(sizes)], 0)

    def reduce_scatter(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        if self._alone(group):
            return x
        dtype = self.ops.dtype_of(x)
        wide = self.ops.cast(x, "float32") if dtype in HALF else x
        if sizes is None or len(set(sizes)) == 1:
            return self.ops.cast(self.even_reduce_scatter(wide, group), dtype)
        pieces = self.ops.split(wide, list(sizes), 0)
        padded = self.ops.concat([self._pad(piece, max(sizes)) for piece in pieces], 0)
        mine = self.even_reduce_scatter(padded, group)
        return self.ops.cast(mine[: sizes[list(self.group_ranks(group)).index(self.rank)]], dtype)

    def _alone(self, group: Group) -> bool:
        return self.size == 1 or len(self.group_ranks(group)) == 1

    def _pad(self, x: Tensor, rows: int) -> Tensor:
        if x.shape[0] == rows:
            return x
        blank = self.ops.zeros((rows - x.shape[0], *x.shape[1:]), self.ops.dtype_of(x))
        return self.ops.concat([x, blank], 0)


__all__ = ["ComposedCollectives", "Receive", "Send"]
