"""Communication by mindspore.communication, started by msrun: hccl on Ascend, our own transport on CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import mindspore as ms
import mindspore.communication as comm
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.mint import distributed as dist

from duetvl.backends.mindspore.meeting import Meeting, meet, schedule
from duetvl.backends.mindspore.ops import DTYPES
from duetvl.core.collectives import Group, Receive, Send
from duetvl.core.composed import ComposedCollectives
from duetvl.core.composed.collectives import time_limit
from duetvl.core.errors import BackendError
from duetvl.core.host_transport import HostTransport, Incoming, Outgoing

NEEDED = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")


class MindSporeCollectives(ComposedCollectives):
    """See core/collectives.py. For Ascend, by mint.distributed over hccl: not run on hardware.

    The scheduler process that msrun adds runs the same program and stays in `start` until the workers have ended.
    """

    sums_halves = True

    def launched(self) -> int:
        count = _worker_count()
        if count == 1 and os.environ.get("MS_ROLE") == "MS_SCHED":
            raise SystemExit(0)  # it runs the same program, and two must not train in one place
        return count

    def start(self) -> None:
        if self.size > 1 or self.launched() == 1:
            return
        with _joining() as limit:
            os.environ["MS_TOPO_TIMEOUT"] = str(max(1, round(limit)))  # how long scheduler and workers wait
            comm.init("hccl")
        self.rank, self.size = comm.get_rank(), comm.get_group_size()

    def stop(self) -> None:
        if self.size > 1:
            comm.release()
        self.rank, self.size = 0, 1
        self._made.clear()

    def meeting_host(self) -> str:
        return os.environ.get("MS_SCHED_HOST", "localhost")

    def raw_group(self, members: tuple[int, ...]) -> str | None:
        if self.rank not in members:
            return None  # only members may make a group
        name = f"duetvl_{'_'.join(map(str, members))}"
        comm.create_group(name, list(members))
        return name

    def raw_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        result = _copy(x)
        dist.all_reduce(result, op, _engine(group))
        return result

    def raw_all_gather(self, x: Tensor, group: Group) -> Tensor:
        result = mint.zeros((x.shape[0] * len(self.group_ranks(group)), *x.shape[1:]), dtype=x.dtype)
        dist.all_gather_into_tensor(result, x.contiguous(), _engine(group))
        return result

    def raw_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        result = mint.zeros((x.shape[0] // len(self.group_ranks(group)), *x.shape[1:]), dtype=x.dtype)
        dist.reduce_scatter_tensor(result, x.contiguous(), "sum", _engine(group))
        return result

    def raw_all_to_all(self, x: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        result = mint.zeros((sum(receive), *x.shape[1:]), dtype=x.dtype)
        dist.all_to_all_single(result, x.contiguous(), list(receive), list(send), _engine(group))
        return result

    def raw_broadcast(self, x: Tensor, source: int, group: Group) -> Tensor:
        result = _copy(x)
        dist.broadcast(result, source, _engine(group))
        return result

    def raw_exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        results = [mint.zeros(r.shape, dtype=DTYPES[r.dtype]) for r in receives]
        pairs = [dist.P2POp("isend", s.tensor.contiguous(), s.to) for s in sends]
        pairs += [dist.P2POp("irecv", x, r.source) for x, r in zip(results, receives, strict=True)]
        for handle in dist.batch_isend_irecv(pairs):
            handle.wait()
        return results

    def raw_gather_objects(self, value: Any, group: Group) -> list[Any]:
        results: list[Any] = [None] * len(self.group_ranks(group))
        dist.all_gather_object(results, value, _engine(group))
        return results

    def raw_barrier(self, group: Group) -> None:
        dist.barrier(_engine(group))


class MindSporeCpuCollectives(MindSporeCollectives):
    """See core/collectives.py. On CPU, all of it over the host transport.

    mccl, MindSpore's own, lacks half of the functions, gives up on a rank that comes 30 seconds late, and its scheduler
    ends ranks without a word. Sums are made in the order of the ranks: the same bits on all of them.
    """

    sums_halves = False
    transport: HostTransport
    meeting: Meeting

    def start(self) -> None:
        if self.size > 1 or (count := self.launched()) == 1:
            return
        scheduler = os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"])
        with _joining() as limit:
            if os.environ["MS_ROLE"] == "MS_SCHED":
                schedule(scheduler, count, limit)
                raise SystemExit(0)
            self.transport = HostTransport(-1, count, scheduler[0], time_limit("DUETVL_PEER_TIMEOUT"))
            number = int(os.environ.get("MS_NODE_ID") or -1)
            self.meeting = meet(scheduler, number, self.transport.address, count, limit)
        self.rank, self.size = self.meeting.rank, count
        self.transport.rank = self.rank
        self.transport.connect(self.meeting.addresses)

    def stop(self) -> None:
        if self.size > 1:
            self.transport.close()
            self.meeting.close()
        self.rank, self.size = 0, 1
        self._made.clear()

    def raw_group(self, members: tuple[int, ...]) -> None:
        return None  # the transport knows ranks alone

    def raw_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        """Each rank reduces a part, and gives it to all."""
        ranks, flat = self.group_ranks(group), x.asnumpy().reshape(-1)
        parts = np.array_split(flat, len(ranks))
        own = self._reduced(parts, ranks, op)
        result = np.empty_like(flat)
        self._gathered(own, np.array_split(result, len(ranks)), ranks)
        return Tensor.from_numpy(result.reshape(x.shape))

    def raw_all_gather(self, x: Tensor, group: Group) -> Tensor:
        ranks, piece = self.group_ranks(group), np.ascontiguousarray(x.asnumpy())
        result = np.empty((len(ranks), *piece.shape), piece.dtype)
        self._gathered(piece, list(result), ranks)
        return Tensor.from_numpy(result.reshape(-1, *piece.shape[1:]))

    def raw_broadcast(self, x: Tensor, source: int, group: Group) -> Tensor:
        others = [rank for rank in self.group_ranks(group) if rank != source]
        result = np.array(x.asnumpy())
        if self.rank == source:
            self.transport.swap([Outgoing(rank, result) for rank in others], [])
        else:
            self.transport.swap([], [Incoming(source, result)])
        return Tensor.from_numpy(result)

    def raw_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        ranks = self.group_ranks(group)
        pieces = np.ascontiguousarray(x.asnumpy()).reshape(len(ranks), -1, *x.shape[1:])
        return Tensor.from_numpy(self._reduced(list(pieces), ranks, "sum"))

    def raw_all_to_all(self, x: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        ranks, rows = self.group_ranks(group), x.asnumpy()
        result = np.empty((sum(receive), *x.shape[1:]), rows.dtype)
        out = np.split(rows, np.cumsum(send)[:-1])
        into = np.split(result, np.cumsum(receive)[:-1])
        own = ranks.index(self.rank)
        into[own][...] = out[own]
        self.transport.swap(
            [Outgoing(r, out[i]) for i, r in enumerate(ranks) if i != own and send[i]],
            [Incoming(r, into[i]) for i, r in enumerate(ranks) if i != own and receive[i]],
        )
        return Tensor.from_numpy(result)

    def raw_exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        results = [np.empty(r.shape, ms.dtype_to_nptype(DTYPES[r.dtype])) for r in receives]
        self.transport.swap(
            [Outgoing(s.to, s.tensor.asnumpy()) for s in sends],
            [Incoming(r.source, x) for x, r in zip(results, receives, strict=True)],
        )
        return [Tensor.from_numpy(x) for x in results]

    def raw_gather_objects(self, value: Any, group: Group) -> list[Any]:
        return self.transport.swap_objects(value, self.group_ranks(group))

    def raw_barrier(self, group: Group) -> None:
        others = [rank for rank in self.group_ranks(group) if rank != self.rank]
        nothing = np.empty(0, np.uint8)
        self.transport.swap([Outgoing(r, nothing) for r in others], [Incoming(r, nothing) for r in others])

    def _reduced(self, pieces: Sequence[np.ndarray], ranks: Sequence[int], op: str) -> np.ndarray:
        """Piece i of every rank goes to rank i, and is there reduced in the order of the ranks."""
        own = ranks.index(self.rank)
        got = [pieces[own] if i == own else np.empty_like(pieces[own]) for i in range(len(ranks))]
        self.transport.swap(
            [Outgoing(r, pieces[i]) for i, r in enumerate(ranks) if i != own and pieces[i].size],
            [Incoming(r, got[i]) for i, r in enumerate(ranks) if i != own and pieces[own].size],
        )
        return reduce(np.add if op == "sum" else np.maximum, got)

    def _gathered(self, piece: np.ndarray, places: Sequence[np.ndarray], ranks: Sequence[int]) -> None:
        """Fill place i with the piece of rank i."""
        own = ranks.index(self.rank)
        places[own][...] = piece
        self.transport.swap(
            [Outgoing(r, piece) for i, r in enumerate(ranks) if i != own and piece.size],
            [Incoming(r, places[i]) for i, r in enumerate(ranks) if i != own and places[i].size],
        )


def _engine(group: Group) -> str | None:
    return None if group is None else group.engine


def _copy(x: Tensor) -> Tensor:
    return ops.stop_gradient(x).copy()


def _worker_count() -> int:
    """The number of ranks that msrun announced; BackendError where its environment is not whole."""
    if "MS_WORKER_NUM" not in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise BackendError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but the backend is mindspore, which msrun "
            "starts: start with msrun, or choose --backend torch_npu"
        )
    count = os.environ.get("MS_WORKER_NUM", "1")
    if count == "1":
        return 1
    wrong = [name for name in NEEDED if not os.environ.get(name)]
    numbers = [name for name in ("MS_WORKER_NUM", "MS_SCHED_PORT") if name not in wrong]
    wrong += [name for name in numbers if not os.environ[name].isdigit()]
    if wrong:
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in NEEDED)
        raise BackendError(f"the environment of msrun is incomplete: {found}; start with msrun")
    return int(count)


@contextmanager
def _joining() -> Iterator[float]:
    """The seconds that meeting may take; BackendError where it fails."""
    limit = time_limit("DUETVL_START_TIMEOUT")
    try:
        yield limit
    except (OSError, RuntimeError) as error:
        address = f"{os.environ['MS_SCHED_HOST']}:{os.environ['MS_SCHED_PORT']}"
        raise BackendError(
            f"{os.environ['MS_ROLE']} {os.environ.get('MS_NODE_ID', '')} did not meet {os.environ['MS_WORKER_NUM']} "
            f"workers at the scheduler {address} within {limit:.0f} s: check that all of them and the scheduler "
            "started, that MS_SCHED_HOST and MS_SCHED_PORT are the same and reachable from every node, and the other "
            f"ranks' logs; DUETVL_START_TIMEOUT sets the limit ({str(error).strip().splitlines()[0]})"
        ) from None
