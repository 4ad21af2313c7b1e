"""What all collectives share: one rank, uneven and empty pieces, half precision, messages to oneself, the counting."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from duetvl.core.collectives import Collectives, Group, Pending, Receive, Send
from duetvl.core.errors import BackendError
from duetvl.core.ops import Ops

Tensor = Any
_NO_MEMORY = ("allocate memory", "out of memory", "bad_alloc", "memory not enough", "memory isn't enough")
HALF = ("bfloat16", "float16")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "bool": 1}


@dataclass(frozen=True)
class RankGroup:
    """A group of ranks: its members, and the engine's own handle of it (None for a single rank)."""

    ranks: tuple[int, ...]
    engine: Any


class ComposedCollectives(Collectives):
    """See core/collectives.py. A backend supplies `start`, `stop` and the functions that begin with `raw_`.

    These get a handle of the engine (`group.engine`, None for all ranks), never empty tensors or a single rank, and
    report failure by RuntimeError or BackendError.
    """

    sums_halves = False  # whether the engine sums half precision as it is

    def __init__(self, ops: Ops):
        self.ops = ops
        self.rank, self.size = 0, 1
        self.traffic: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._made: dict[tuple[tuple[int, ...], ...], Group] = {}

    # -- what a backend supplies -----------------------------------------------------------------------------------

    def raw_group(self, members: tuple[int, ...]) -> Any:
        """Make a group. Called on every rank for every group, in one order."""
        raise NotImplementedError

    def raw_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        """float32, int32 or int64; half precision where `sums_halves`."""
        raise NotImplementedError

    def raw_all_gather(self, x: Tensor, group: Group) -> Tensor:
        """All pieces have x's shape."""
        raise NotImplementedError

    def raw_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        """The same dtypes; x's rows divide by the group's size."""
        raise NotImplementedError

    def raw_reduce_scatter_later(self, x: Tensor, group: Group) -> Callable[[], Tensor]:
        """Begin the same; what is returned waits for it. Unless a backend overrides this, it is done at once."""
        piece = self.raw_reduce_scatter(x, group)
        return lambda: piece

    def raw_all_to_all(self, x: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows for each rank and rows from each rank; some of them may be 0, and so may be x's."""
        raise NotImplementedError

    def raw_broadcast(self, x: Tensor, source: int, group: Group) -> Tensor:
        """`source` is a number in the whole run."""
        raise NotImplementedError

    def raw_exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        """Between different ranks."""
        raise NotImplementedError

    def raw_gather_objects(self, value: Any, group: Group) -> list[Any]:
        """In group order."""
        raise NotImplementedError

    def raw_barrier(self, group: Group) -> None:
        """Wait for all."""
        raise NotImplementedError

    # -- the protocol ----------------------------------------------------------------------------------------------

    def groups(self, ranks: Sequence[Sequence[int]]) -> Group:
        wanted = tuple(tuple(members) for members in ranks)
        if sorted(r for members in wanted for r in members) != list(range(self.size)) or any(
            list(members) != sorted(members) for members in wanted
        ):
            raise ValueError(f"groups must be ascending and hold each of {self.size} ranks once, found {wanted}")
        if len(wanted) == 1:
            return None
        if wanted not in self._made:
            made = [RankGroup(m, self.raw_group(m) if len(m) > 1 else None) for m in wanted]
            self._made[wanted] = next(group for group in made if self.rank in group.ranks)
        return self._made[wanted]

    def group_ranks(self, group: Group) -> Sequence[int]:
        return range(self.size) if group is None else group.ranks

    def all_reduce(self, x: Tensor, group: Group = None, op: str = "sum") -> Tensor:
        count = len(self.group_ranks(group))
        if count == 1 or _empty(x.shape):
            return x
        dtype = self.ops.dtype_of(x)
        wide = self._summable(x, dtype)
        self._count("all_reduce", self._bytes(wide) * 2 * (count - 1) // count)
        with self._failing("all_reduce", self.group_ranks(group)):
            return self.ops.cast(self.raw_all_reduce(wide, group, op), dtype)

    def all_gather(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        ranks = self.group_ranks(group)
        if len(ranks) == 1:
            return x
        sizes = [x.shape[0]] * len(ranks) if sizes is None else list(sizes)
        _expect(x.shape[0], sizes[ranks.index(self.rank)], "all_gather: rows of this rank")
        longest = max(sizes)
        if _empty((longest, *x.shape[1:])):
            return self.ops.zeros((sum(sizes), *x.shape[1:]), self.ops.dtype_of(x))
        piece = self._pad(x, longest)
        self._count("all_gather", self._bytes(piece) * (len(ranks) - 1))
        with self._failing("all_gather", self.group_ranks(group)):
            whole = self.raw_all_gather(piece, group)
        if min(sizes) == longest:
            return whole
        return self.ops.concat([whole[i * longest : i * longest + n] for i, n in enumerate(sizes)], 0)

    def reduce_scatter(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Tensor:
        return self.reduce_scatter_later(x, group, sizes).wait()

    def reduce_scatter_later(self, x: Tensor, group: Group = None, sizes: Sequence[int] | None = None) -> Pending:
        ranks = self.group_ranks(group)
        if len(ranks) == 1:
            return Pending(lambda: x)
        sizes = even(x.shape[0], len(ranks), "reduce_scatter") if sizes is None else list(sizes)
        _expect(x.shape[0], sum(sizes), "reduce_scatter: rows")
        rows, longest = sizes[ranks.index(self.rank)], max(sizes)
        dtype = self.ops.dtype_of(x)
        if _empty(x.shape):
            return Pending(lambda: self.ops.zeros((rows, *x.shape[1:]), dtype))
        wide = self._summable(x, dtype)
        if min(sizes) != longest:
            pieces = self.ops.split(wide, sizes, 0)
            wide = self.ops.concat([self._pad(piece, longest) for piece in pieces], 0)
        self._count("reduce_scatter", self._bytes(wide) * (len(ranks) - 1) // len(ranks))
        with self._failing("reduce_scatter", self.group_ranks(group)):
            wait = self.raw_reduce_scatter_later(wide, group)

        def finish() -> Tensor:
            with self._failing("reduce_scatter", self.group_ranks(group)):
                piece = wait()
            return self.ops.cast(piece if rows == longest else piece[:rows], dtype)

        return Pending(finish)

    def all_to_all(
        self, x: Tensor, group: Group = None, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        ranks = self.group_ranks(group)
        if len(ranks) == 1:
            return x
        send = even(x.shape[0], len(ranks), "all_to_all") if send is None else list(send)
        receive = send if receive is None else list(receive)
        _expect(x.shape[0], sum(send), "all_to_all: rows")
        own = ranks.index(self.rank)
        _expect(receive[own], send[own], "all_to_all: rows from itself")
        if _empty(x.shape[1:]):
            return self.ops.zeros((sum(receive), *x.shape[1:]), self.ops.dtype_of(x))
        row = math.prod(x.shape[1:]) * BYTES[self.ops.dtype_of(x)]
        self._count("all_to_all", row * (sum(send) - send[own]))
        with self._failing("all_to_all", self.group_ranks(group)):
            return self.raw_all_to_all(x, group, send, receive)

    def broadcast(self, x: Tensor, source: int, group: Group = None) -> Tensor:
        if len(self.group_ranks(group)) == 1 or _empty(x.shape):
            return x
        self._count("broadcast", self._bytes(x) if self.rank == source else 0)
        with self._failing("broadcast", self.group_ranks(group)):
            return self.raw_broadcast(x, source, group)

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        own = deque(s.tensor for s in sends if s.to == self.rank)
        _expect(len(own), sum(r.source == self.rank for r in receives), "exchange: messages to itself")
        away = [s for s in sends if s.to != self.rank and not _empty(s.tensor.shape)]
        wanted = [r for r in receives if r.source != self.rank and not _empty(r.shape)]
        self._count("exchange", sum(self._bytes(s.tensor) for s in away))
        peers = sorted({s.to for s in away} | {r.source for r in wanted})
        with self._failing("exchange", peers):
            arrived = iter(self.raw_exchange(away, wanted) if away or wanted else [])
        results = []
        for r in receives:
            if r.source == self.rank:
                results.append(own.popleft())
            else:
                results.append(self.ops.zeros(r.shape, r.dtype) if _empty(r.shape) else next(arrived))
        return results

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        if len(self.group_ranks(group)) == 1:
            return [value]
        self._called("gather_objects")
        with self._failing("gather_objects", self.group_ranks(group)):
            return self.raw_gather_objects(value, group)

    def barrier(self, group: Group = None) -> None:
        if len(self.group_ranks(group)) > 1:
            self._called("barrier")
            with self._failing("barrier", self.group_ranks(group)):
                self.raw_barrier(group)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _summable(self, x: Tensor, dtype: str) -> Tensor:
        return self.ops.cast(x, "float32") if dtype in HALF and not self.sums_halves else x

    def _count(self, name: str, count: int) -> None:
        self.traffic[name] = self.traffic.get(name, 0) + count
        self._called(name)

    def _called(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def _bytes(self, x: Tensor) -> int:
        return math.prod(x.shape) * BYTES[self.ops.dtype_of(x)]

    def _pad(self, x: Tensor, rows: int) -> Tensor:
        if x.shape[0] == rows:
            return x
        blank = self.ops.zeros((rows - x.shape[0], *x.shape[1:]), self.ops.dtype_of(x))
        return self.ops.concat([x, blank], 0)

    @contextmanager
    def _failing(self, name: str, ranks: Iterable[int]) -> Iterator[None]:
        """Tell an engine's error as one of this call, which these ranks make together."""
        try:
            yield
        except BackendError as error:
            raise BackendError(f"{name} failed on rank {self.rank} of {self.size}: {error}") from None
        except RuntimeError as error:
            if _is_of_memory(error):  # this rank's own failure, and the cause of what the others will meet
                raise
            others = ", ".join(f"rank {rank}" for rank in ranks if rank != self.rank)
            raise BackendError(
                f"{name} failed on rank {self.rank} of {self.size}: {_plain(error)}; see the logs of {others}"
            ) from error


def _is_of_memory(error: RuntimeError) -> bool:
    """Whether this rank had no memory for the call, in PyTorch's, C++'s or MindSpore's words."""
    words = str(error).lower()
    return any(sign in words for sign in _NO_MEMORY)


def _plain(error: RuntimeError) -> str:
    """What an engine's error means, whose own words name files of its source."""
    words = str(error).lower()
    if "timed out" in words or "timeout" in words:
        return f"another rank has not answered for {time_limit('DUETVL_PEER_TIMEOUT'):g} seconds (DUETVL_PEER_TIMEOUT)"
    if "connection" in words:
        return "another rank has ended"
    return "another rank has probably ended, or is stuck"


def even(rows: int, count: int, name: str) -> list[int]:
    """`rows` in `count` equal parts; ValueError where that cannot be."""
    if rows % count:
        raise ValueError(f"{name}: {rows} rows do not divide by {count} ranks; give the sizes")
    return [rows // count] * count


def time_limit(variable: str) -> float:
    """Seconds from an environment variable: DUETVL_START_TIMEOUT or DUETVL_PEER_TIMEOUT, 600 unless set."""
    text = os.environ.get(variable, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise BackendError(f"{variable} must be a number of seconds above 0, found {text!r}")
    return seconds


def _empty(shape: Sequence[int]) -> bool:
    return 0 in shape


def _expect(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise ValueError(f"{what}: {found}, where {wanted} were announced")
