"""CUDA kernels of torch: its variable-length flash attention. tests/conformance/test_cuda.py holds the calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from duetvl.backends.torch_npu.autograd import TorchAutograd
from duetvl.backends.torch_npu.kv_cache import TorchKVCache
from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.backends.torch_npu.recording import GraphRecorder, Graphs, Record, Recording
from duetvl.core.composed import FusedAttention
from duetvl.core.composed.attention import check_groups
from duetvl.core.composed.kv_cache import PagedCache
from duetvl.core.kv_cache import Append, CachePlan, Recorder, check_append, consecutive, rows_of
from duetvl.core.spans import Spans

Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256
LARGEST_HEAD_OF_ALL_CARDS = 192
SERVER_CARDS = ((8, 0), (9, 0), (10, 0), (10, 3))  # A100, H100, B200, B300: the gradient takes larger heads there


def flash_attention_takes(dtype: torch.dtype, head_size: int, capability: tuple[int, int]) -> bool:
    """Whether the kernel and its gradient take heads of this dtype and size on a card of this compute capability."""
    if dtype not in HALF or head_size % 8 or capability < (8, 0):
        return False
    return head_size <= (LARGEST_HEAD if capability in SERVER_CARDS else LARGEST_HEAD_OF_ALL_CARDS)


class CudaOps(Recording, FusedAttention, TorchOps):
    """See core/ops.py."""

    spans_a_call = 2**31

    def __init__(self, autograd: TorchAutograd, place: torch.device):
        super().__init__(autograd, place)
        self._moved: WeakKeyDictionary[Spans, tuple[Tensor, Tensor]] = WeakKeyDictionary()

    def from_numpy(self, array: np.ndarray, dtype: str | None = None) -> Tensor:
        return self.move(array, dtype) if self.inlet is None else self.inlet(array, dtype)

    def move(self, array: np.ndarray, dtype: str | None) -> Tensor:
        """The array on the device, whatever the inlet."""
        return super().from_numpy(array, dtype)

    def _staged(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.place.type == "cuda" else tensor  # else the copy waits for the device

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        if x.dtype != scale.dtype:
            return super().rms_norm(x, scale, eps=eps)
        return F.rms_norm(x, (x.shape[-1],), scale, eps)

    def compile(self, compiler: str = "inductor") -> None:
        """Make one kernel each of rotation, gate and its gradient, for any number of rows.

        Not done by itself: whether it wins on a card, and enough, is what benchmarks/gpu.py measures.
        """
        for name in ("_rotate", "_gate", "_gate_grad"):
            setattr(self, name, torch.compile(getattr(self, name), backend=compiler, dynamic=True, fullgraph=True))

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Of the card, such as (9, 0); (0, 0) where this torch has no flash attention whose lse we know.

        Before 2.7, and on AMD, lse comes padded to the longest span.
        """
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if version < (2, 7) or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return (0, 0)
        return torch.cuda.get_device_capability(self.place)

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        return flash_attention_takes(q.dtype, q.shape[-1], self.capability)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._bounds(spans), spans.longest, spans.most_keys, 0.0, spans.causal, False
        )
        return out, lse

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is off
        return torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), *self._bounds(spans), spans.longest, spans.most_keys, 0.0,
            spans.causal, unused, unused[:0],
        )  # fmt: skip

    def _bounds(self, spans: Spans) -> tuple[Tensor, Tensor]:
        """Where the query and the key rows of each span begin, on the device: moved once for all layers."""
        if (bounds := self._moved.get(spans)) is None:
            bounds = self.from_numpy(spans.cu_seqlens), self.from_numpy(spans.key_offsets)
            self._moved[spans] = bounds
        return bounds


@dataclass(frozen=True, eq=False)
class FlashPlan:
    """written: (T,) int64. ends (S + 1,): of packed rows; starts (S + 1,): where a sequence's keys begin, all int32.

    held (S,): keys of each where they lie anywhere in the cache; else index (keys,), of all of them, end to end.
    """

    written: Tensor
    ends: Tensor
    starts: Tensor
    held: Tensor | None
    index: Tensor | None
    longest: int
    most_keys: int


def allowed_keys(most: int) -> int:
    """The next power of two from 4,096 on. The kernel takes it as a bound, by which it divides its work; lengths have
    their own tensor. So passes of one size and about one length are launched alike."""
    return max(4096, 1 << (most - 1).bit_length())


class CudaKVCache(TorchKVCache):
    """See core/kv_cache.py. One call for the pass; sequences whose blocks are not consecutive are gathered first."""

    block_size = 256
    consecutive = True
    recorded = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16))
    recording: Callable[[], Record] = Graphs

    ops: CudaOps

    def reads_in_place(self, cache: PagedCache) -> bool:
        """Whether the kernel reads sequences that lie apart, by their starts and lengths: tried.

        torch documents the arguments, and not that gaps between sequences are left alone.
        """
        return self.agree(cache, partial(self._plan, in_place=True), partial(self._plan, in_place=False))

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        if not self._takes(cache):
            return super().plan(cache, append)
        check_append(append, cache.blocks, cache.block_size)
        return self._plan(cache, append, self._in_place(cache, append))

    def recorder(self, cache: PagedCache) -> Recorder:
        def kind(append: Append) -> Hashable | None:
            """Decoding at one of these sizes, read in place; how many rows a launch allows for is part of it."""
            if len(append.new) not in self.recorded or append.rows != len(append.new):
                return None
            if not self._takes(cache) or not self._in_place(cache, append):
                return None
            return len(append.new), allowed_keys(int(append.held.max()))

        return GraphRecorder(self.ops, kind, self.recording())

    def _takes(self, cache: PagedCache) -> bool:
        keys = cache.keys[0]
        return flash_attention_takes(keys.dtype, keys.shape[2], self.ops.capability)

    def _in_place(self, cache: PagedCache, append: Append) -> bool:
        return bool(consecutive(append, cache.block_size).all()) and self.reads_in_place(cache)

    def _plan(self, cache: PagedCache, append: Append, in_place: bool) -> FlashPlan:
        size, held = cache.block_size, append.held
        lasting = np.append(append.tables[:, 0] * size, 0) if in_place else np.append(0, np.cumsum(held))
        rows = [rows_of(table, n, size) for table, n in zip(append.tables, held.tolist(), strict=True)]
        return FlashPlan(
            written=self.index(cache, append),
            ends=self.ops.from_numpy(np.append(0, np.cumsum(append.new)).astype(np.int32)),
            starts=self.ops.from_numpy(lasting.astype(np.int32)),
            held=self.ops.from_numpy(held.astype(np.int32)) if in_place else None,
            index=None if in_place else self.ops.from_numpy(np.concatenate(rows)),
            longest=int(append.new.max()),
            most_keys=allowed_keys(int(held.max())) if in_place else int(held.max()),
        )

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        if not isinstance(plan, FlashPlan):
            return super().attention_cached(q, cache, layer, plan)
        held = (cache.keys[layer], cache.values[layer])
        check_groups(q.shape[1], held[0].shape[1])
        k, v = held if plan.index is None else (x.index_select(0, plan.index) for x in held)
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, plan.ends, plan.starts, plan.longest, plan.most_keys, 0.0, True, False, seqused_k=plan.held
        )
        return out
