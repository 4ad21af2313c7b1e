"""Communication by torch.distributed: gloo on CPU, nccl on CUDA, hccl on NPU; started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from duetvl.backends.torch_npu.ops import DTYPES
from duetvl.core.collectives import Group, Receive, Send
from duetvl.core.composed import ComposedCollectives
from duetvl.core.ops import Ops

Tensor = torch.Tensor
ENGINES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class TorchCollectives(ComposedCollectives):
    """See core/collectives.py."""

    def __init__(self, ops: Ops, place: torch.device):
        super().__init__(ops)
        self.place = place

    def start(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group(ENGINES[self.place.type])
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
            self.rank, self.size = 0, 1

    def groups(self, ranks: Sequence[Sequence[int]]) -> Group:
        made = [(members, dist.new_group(list(members))) for members in ranks] if self.size > 1 else []
        return next((group for members, group in made if self.rank in members), None)

    def group_ranks(self, group: Group) -> Sequence[int]:
        return range(self.size) if group is None else dist.get_process_group_ranks(group)

    def even_all_reduce(self, x: Tensor, group: Group, op: str) -> Tensor:
        result = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result, REDUCTIONS[op], group)
        return result

    def even_all_gather(self, x: Tensor, group: Group) -> Tensor:
        result = x.new_empty((x.shape[0] * len(self.group_ranks(group)), *x.shape[1:]))
        dist.all_gather_into_tensor(result, x.contiguous(), group)
        return result

    def even_reduce_scatter(self, x: Tensor, group: Group) -> Tensor:
        result = x.new_empty((x.shape[0] // len(self.group_ranks(group)), *x.shape[1:]))
        dist.reduce_scatter_tensor(result, x.contiguous(), group=group)
        return result

    def all_to_all(
        self, x: Tensor, group: Group = None, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        if self._alone(group):
            return x
        rows = x.shape[0] if receive is None else sum(receive)
        result = x.new_empty((rows, *x.shape[1:]))
        dist.all_to_all_single(
            result, x.contiguous(), None if receive is None else list(receive), None if send is None else list(send), group
        )
        return result

    def broadcast(self, x: Tensor, source: int, group: Group = None) -> Tensor:
        if self._alone(group):
            return x
        result = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(result, source, group)
        return result

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        results = [torch.empty(r.shape, dtype=DTYPES[r.dtype], device=self.place) for r in receives]
        pairs = [dist.P2POp(dist.isend, s.tensor.contiguous(), s.to) for s in sends]
        pairs += [dist.P2POp(dist.irecv, x, r.source) for x, r in zip(results, receives, strict=True)]
        for work in dist.batch_isend_irecv(pairs) if pairs else ():
            work.wait()
        return results

    def gather_objects(self, value: Any, group: Group = None) -> list[Any]:
        if self._alone(group):
            return [value]
        results: list[Any] = [None] * len(self.group_ranks(group))
        dist.all_gather_object(results, value, group)
        return results

    def barrier(self, group: Group = None) -> None:
        if not self._alone(group):
            dist.barrier(group)
