"""Communication by mindspore.communication, started by msrun: hccl on Ascend, mccl and our own transport on CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import mindspore.communication as comm
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.mint import distributed as dist

from duetvl.backends.mindspore.ops import DTYPES
from duetvl.core.collectives import Group, Receive, Send
from duetvl.core.composed import ComposedCollectives
from duetvl.core.composed.collectives import time_limit
from duetvl.core.errors import BackendError
from duetvl.core.host_transport import Address, HostTransport, Incoming, Outgoing

NEEDED = ("MS_ROLE", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT")


class MindSporeCollectives(ComposedCollectives):
    """See core/collectives.py. For Ascend, by mint.distributed over hccl: not run on hardware.

    The scheduler process that msrun adds runs the same program and stays in `start` until the workers have ended.
    """

    engine_name = "hccl"

    def launched(self) -> int:
        count = _worker_count()
        if count == 1 and os.environ.get("MS_ROLE") == "MS_SCHED":
            raise SystemExit(0)  # it runs the same program, and two must not train in one place
        return count

    def start(self) -> None:
        if self.size > 1 or self.launched() == 1:
            return
        _join(self.engine_name)
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
    """See core/collectives.py. On CPU: mccl sums, gathers and broadcasts; the host transport does the rest.

    mccl gives up on a rank that comes 30 seconds late, and then the whole run is killed, so the ranks meet on the
    transport first, which waits longer and says who is missing.
    """

    engine_name = "mccl"
    transport: HostTransport

    def start(self) -> None:
        super().start()
        if self.size > 1:
            limit = time_limit("DUETVL_PEER_TIMEOUT")
            self.transport = HostTransport(self.rank, self.size, self.meeting_host(), limit)
            mine = Tensor(np.frombuffer(self.transport.address.packed(), np.uint8)[None])
            self.transport.connect([Address.unpack(row.tobytes()) for row in self._gather(mine, None).asnumpy()])

    def stop(self) -> None:
        if self.size > 1:
            self.transport.close()
        super().stop()

    def raw_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        self.raw_barrier(group)
        return super().raw_all_reduce(x, group, op)

    def raw_all_gather(self, x: Tensor, group: Group) -> Tensor:
        self.raw_barrier(group)
        return _without_bool(lambda y: self._gather(y, group), x)

    def raw_broadcast(self, x: Tensor, source: int, group: Group) -> Tensor:
        self.raw_barrier(group)
        return _without_bool(lambda y: super(MindSporeCpuCollectives, self).raw_broadcast(y, source, group), x)

    def raw_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        ranks = self.group_ranks(group)
        pieces = x.asnumpy().reshape(len(ranks), -1, *x.shape[1:])
        got = np.empty_like(pieces)
        got[ranks.index(self.rank)] = pieces[ranks.index(self.rank)]
        self.transport.swap(
            [Outgoing(r, pieces[i]) for i, r in enumerate(ranks) if r != self.rank],
            [Incoming(r, got[i]) for i, r in enumerate(ranks) if r != self.rank],
        )
        return Tensor.from_numpy(got.sum(0, dtype=got.dtype))

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

    def _gather(self, x: Tensor, group: Group) -> Tensor:
        pieces = [mint.zeros(x.shape, dtype=x.dtype) for _ in self.group_ranks(group)]
        dist.all_gather(pieces, x.contiguous(), _engine(group))
        return ops.cat(tuple(pieces), 0)


def _engine(group: Group) -> str | None:
    return None if group is None else group.engine


def _copy(x: Tensor) -> Tensor:
    return ops.stop_gradient(x).copy()


def _without_bool(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """mccl moves every dtype but bool, which goes as int8."""
    return move(x) if x.dtype != ms.bool_ else ops.cast(move(ops.cast(x, ms.int8)), ms.bool_)


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
        raise BackendError(f"the environment of msrun is not whole: {found}; start with msrun")
    return int(count)


def _join(engine: str) -> None:
    limit = time_limit("DUETVL_START_TIMEOUT")
    os.environ["MS_TOPO_TIMEOUT"] = str(max(1, round(limit)))  # how long scheduler and workers wait for each other
    try:
        comm.init(engine)
    except RuntimeError as error:
        address = f"{os.environ['MS_SCHED_HOST']}:{os.environ['MS_SCHED_PORT']}"
        raise BackendError(
            f"{os.environ['MS_ROLE']} {os.environ.get('MS_NODE_ID', '')} did not meet {os.environ['MS_WORKER_NUM']} "
            f"workers at the scheduler {address} within {limit:.0f} s: check that all of them and the scheduler "
            "started, that MS_SCHED_HOST and MS_SCHED_PORT are the same and reachable from every node, and the other "
            f"ranks' logs; DUETVL_START_TIMEOUT sets the limit ({str(error).strip().splitlines()[0]})"
        ) from None
