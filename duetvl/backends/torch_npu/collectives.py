"""Communication by torch.distributed: gloo on CPU, nccl on CUDA, hccl on NPU; started by torchrun."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the world's group as a default argument. Were it imported later, as torch does of its own accord
# in a training step, the group would outlive `destroy_process_group`, and its threads the interpreter: one of them that
# gives back a tensor then aborts the process.
import torch.distributed.nn

from duetvl.backends.torch_npu.ops import DTYPES
from duetvl.core.collectives import Group, Receive, Send
from duetvl.core.composed import ComposedCollectives
from duetvl.core.composed.collectives import time_limit
from duetvl.core.errors import BackendError
from duetvl.core.ops import Ops

Tensor = torch.Tensor
ENGINES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
# Their names before torch 2.13, which warns of them.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TorchCollectives(ComposedCollectives):
    """See core/collectives.py. Run on gloo; nccl and hccl have not run with several ranks on hardware."""

    def __init__(self, ops: Ops, place: torch.device):
        super().__init__(ops)
        self.place = place
        self.sums_halves = place.type != "cpu"

    def launched(self) -> int:
        return _world_size()

    def start(self) -> None:
        if not dist.is_initialized():
            if self.launched() == 1:
                return
            if self.place.type != "cpu":
                torch.get_device_module(self.place).set_device(self.place)  # nccl's barrier and objects go there
            _join(ENGINES[self.place.type])
            atexit.register(self.stop)  # a thread of gloo that still runs at the end may abort the process
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self.rank, self.size = 0, 1
        self._made.clear()

    def meeting_host(self) -> str:
        return os.environ.get("MASTER_ADDR", "localhost")

    def raw_group(self, members: tuple[int, ...]) -> Any:
        # Every rank must make every group, in one order; only its members get a usable handle.
        return dist.new_group(list(members), timeout=timedelta(seconds=time_limit("DUETVL_PEER_TIMEOUT")))

    def raw_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        result = _copy(x)
        dist.all_reduce(result, REDUCTIONS[op], _engine(group))
        return result

    def raw_all_gather(self, x: Tensor, group: Group) -> Tensor:
        result = x.new_empty((x.shape[0] * len(self.group_ranks(group)), *x.shape[1:]))
        ALL_GATHER(result, x.detach().contiguous(), _engine(group))
        return result

    def raw_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        return self.raw_reduce_scatter_later(x, group)()

    def raw_reduce_scatter_later(self, x: Tensor, group: Group) -> Callable[[], Tensor]:
        given = x.detach().contiguous()
        result = given.new_empty((x.shape[0] // len(self.group_ranks(group)), *x.shape[1:]))
        work = REDUCE_SCATTER(result, given, group=_engine(group), async_op=True)

        def wait() -> Tensor:
            work.wait()
            return result

        return wait

    def raw_all_to_all(self, x: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        result = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(result, x.detach().contiguous(), list(receive), list(send), _engine(group))
        return result

    def raw_broadcast(self, x: Tensor, source: int, group: Group) -> Tensor:
        result = _copy(x)
        dist.broadcast(result, source, _engine(group))
        return result

    def raw_exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        results = [torch.empty(r.shape, dtype=DTYPES[r.dtype], device=self.place) for r in receives]
        pairs = [dist.P2POp(dist.isend, s.tensor.detach().contiguous(), s.to) for s in sends]
        pairs += [dist.P2POp(dist.irecv, x, r.source) for x, r in zip(results, receives, strict=True)]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()
        return results

    def raw_gather_objects(self, value: Any, group: Group) -> list[Any]:
        results: list[Any] = [None] * len(self.group_ranks(group))
        dist.all_gather_object(results, value, _engine(group))
        return results

    def raw_barrier(self, group: Group) -> None:
        dist.barrier(_engine(group))


def _engine(group: Group) -> Any:
    return None if group is None else group.engine


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _world_size() -> int:
    """The number of ranks that torchrun announced; BackendError where its environment is not whole."""
    if "WORLD_SIZE" not in os.environ and os.environ.get("MS_WORKER_NUM", "1") != "1":
        raise BackendError(
            f"msrun started {os.environ['MS_WORKER_NUM']} processes, but the backend is torch_npu, which torchrun "
            "starts: start with torchrun, or choose --backend mindspore"
        )
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    wrong = [name for name in NEEDED if not os.environ.get(name)]
    numbers = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name not in wrong]
    wrong += [name for name in numbers if not os.environ[name].isdigit()]
    if wrong or int(os.environ["RANK"]) >= int(size):
        found = ", ".join(f"{name}={os.environ.get(name)}" for name in NEEDED)
        raise BackendError(f"the environment of torchrun is incomplete: {found}; start with torchrun")
    return int(size)


def _join(engine: str) -> None:
    """Meet at the store, see who is there, and only then build the group, whose own limit is that of slow peers."""
    limit = time_limit("DUETVL_START_TIMEOUT")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    slow = timedelta(seconds=time_limit("DUETVL_PEER_TIMEOUT"))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
        # torchrun that starts its workers again keeps the store, with the addresses of those that have gone.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set(f"duetvl/{rank}", "here")
        store.wait([f"duetvl/{other}" for other in range(size)], timedelta(seconds=limit))
        dist.init_process_group(engine, store=store, rank=rank, world_size=size, timeout=slow)
        dist.barrier()  # nccl wants all ranks in the first call, and the first may be an exchange of two
    except (RuntimeError, ValueError) as error:
        raise BackendError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {address} within "
            f"{limit:.0f} s: check that all ranks started, that MASTER_ADDR and MASTER_PORT are the same and reachable "
            f"from every node, and the other ranks' logs; DUETVL_START_TIMEOUT sets the limit "
            f"({str(error).strip().splitlines()[0]})"
        ) from None
