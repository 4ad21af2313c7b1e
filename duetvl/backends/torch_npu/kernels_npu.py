"""Ascend kernels by torch_npu: attention, norm, rotation, gate, cached attention, optimizer. Not run on hardware.

tests/npu checks every call against the operators' schemas (torch_npu 2.6, 2.9, 2.13), and the numbers and whole runs
against CPU references under those schemas; docs/ascend.md says what that leaves open.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from duetvl.backends.torch_npu.autograd import TorchAutograd
from duetvl.backends.torch_npu.kv_cache import TorchKVCache
from duetvl.backends.torch_npu.npu_operators import NpuOperators
from duetvl.backends.torch_npu.ops import TorchOps
from duetvl.backends.torch_npu.optimizer import TorchOptimizer
from duetvl.core.composed import AscendAttention
from duetvl.core.composed.ascend_attention import RIGHT_DOWN_CAUSAL
from duetvl.core.composed.attention import check_groups
from duetvl.core.composed.kv_cache import PagedCache
from duetvl.core.kv_cache import Append, CachePlan, check_append, places
from duetvl.core.optimizer import AdamWState, ParameterGroup
from duetvl.core.spans import Spans

Tensor = torch.Tensor

BLOCK = 128  # rows of a cache block; the paged kernel takes multiples of this
LARGEST_BLOCK = 512
CACHE_LIMIT = 2**31  # elements of one paged tensor
WIDEST_ROW = 65535  # numbers of a row, all heads
PAGED_HEADS = (64, 128)  # sizes that the paged kernel is used with elsewhere, in this layout
HALF = (torch.float16, torch.bfloat16)  # all that the inference kernel takes; the other kernels take float32 too
LARGEST_HEAD = 768  # of attention
MOST_ROWS = 2**20  # in one call of attention
ROTATED_HEAD = 896  # a head that is rotated is smaller


def why_missing() -> str | None:
    """None where an NPU can be used, else the reason why not."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install 'duetvl[npu]'"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu does not load ({error}); is CANN there, and its set_env.sh sourced?"
    return None if torch.get_device_module("npu").is_available() else "torch_npu sees no device; try npu-smi info"


class NpuOps(AscendAttention, TorchOps):
    """See core/ops.py. On any other device than npu the operators must have been registered, as tests/npu does.

    `space` holds the operators: torch.ops.npu where None.
    """

    def __init__(self, autograd: TorchAutograd, place: torch.device, space: Any = None):
        super().__init__(autograd, place)
        if place.type == "npu":
            importlib.import_module("torch_npu")
        self.operators = NpuOperators(space or torch.ops.npu)
        self.npu = self.operators.space

    @cached_property
    def by_row(self) -> bool:
        """Whether the operator can be asked for statistics that lie as their shape (T, H, 8) says.

        torch_npu 2.6.0 has no such argument; there, as without it, each span's lie as (H, L, 8).
        """
        return self.operators.knows("npu_fusion_attention", "softmax_layout")

    # -- attention -------------------------------------------------------------------------------------------------

    def _takes(self, q: Tensor, spans: Spans) -> bool:
        fits = q.shape[-1] <= LARGEST_HEAD and max(spans.rows, spans.key_rows) <= MOST_ROWS
        return fits and "attention" not in self.operators.lacking

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        out, top, total, *_ = self.npu.npu_fusion_attention(
            q, k, v, q.shape[1], "TND", scale=q.shape[-1] ** -0.5, **self.layout_of(spans)
        )
        return out, self.lse_of(top, total, spans)

    def _fused_grad(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> tuple[Tensor, ...]:
        top, total = self.statistics_of(lse, spans)
        return self.npu.npu_fusion_attention_grad(
            q, k, v, dout, q.shape[1], "TND",
            softmax_max=top.contiguous(), softmax_sum=total, attention_in=out,
            scale_value=q.shape[-1] ** -0.5, **self.layout_of(spans),
        )[:3]  # fmt: skip

    def layout_of(self, spans: Spans) -> dict[str, Any]:
        return super().layout_of(spans) | ({"softmax_layout": "TND"} if self.by_row else {})

    def lse_of(self, top: Tensor, total: Tensor, spans: Spans) -> Tensor:
        if not self.by_row:
            return super().lse_of(top, total, spans)
        return (top[:, :, 0] + total[:, :, 0].log()).T.contiguous()

    def statistics_of(self, lse: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
        return self._repeated(lse.T) if self.by_row else super().statistics_of(lse, spans)

    # -- norm, rotation, gate --------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, scale: Tensor, *, eps: float) -> Tensor:
        if x.dtype != scale.dtype or x.ndim < 2 or x.numel() == 0 or "rms_norm" in self.operators.lacking:
            return super().rms_norm(x, scale, eps=eps)

        def forward(needs: Any, x: Tensor, scale: Tensor) -> Any:
            y, inverse = self.npu.npu_rms_norm(x, scale, epsilon=eps)
            return y, (x, scale, inverse)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            x, scale, inverse = residuals
            dx, dscale = self.npu.npu_rms_norm_backward(d, x, scale, inverse)
            return dx, dscale.to(scale.dtype)  # it comes in float32

        return self.autograd.custom_vjp(forward, backward)(x, scale)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The composed rope uses it for the gradient too, with -sin. In float32, as the kernel takes one dtype."""
        if x.numel() == 0 or x.shape[-1] >= ROTATED_HEAD or "rope" in self.operators.lacking:
            return super()._rotate(x, cos, sin)
        full_cos, full_sin = (torch.cat([half, half], -1)[None, :, None] for half in (cos, sin))
        return self.npu.npu_rotary_mul(x[None].float(), full_cos, full_sin)[0].to(x.dtype)

    @cached_property
    def _swiglu(self) -> Any:
        if "swiglu" in self.operators.lacking:
            return super()._swiglu

        def forward(needs: Any, gate: Tensor, up: Tensor) -> Any:
            return self.npu.npu_swiglu(torch.cat([gate, up], -1)), (gate, up)

        def backward(needs: Any, residuals: Any, d: Tensor) -> Any:
            return self.npu.npu_swiglu_backward(d, torch.cat(residuals, -1)).chunk(2, -1)

        return self.autograd.custom_vjp(forward, backward)


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """For the kernels: rows of the cache to write (T,), blocks (S, most) int32, ends of packed rows, lengths."""

    written: Tensor
    tables: Tensor
    ends: list[int]
    held: list[int]


class NpuKVCache(TorchKVCache):
    """See core/kv_cache.py. One call a layer writes, one reads, whatever the pass is made of."""

    block_size = BLOCK
    consecutive = False

    ops: NpuOps

    def paged(self, cache: PagedCache) -> bool:
        """Whether the kernels are there and give the numbers of torch's functions: tried.

        Atlas A2 and A3 have them. What is documented of the layout TND differs from what others use it for.
        """
        return self.agree(cache, self._paged_plan, super().plan)

    @cached_property
    def scatters(self) -> bool:
        """Whether a kernel writes; else torch does."""
        return "writing to the cache" not in self.ops.operators.lacking

    @cached_property
    def hidden_later(self) -> Tensor:
        """(2048, 2048) int8, 1 where a column is hidden from a row."""
        return self.ops.hidden_later.to(torch.int8)

    def plan(self, cache: PagedCache, append: Append) -> CachePlan:
        return self._paged_plan(cache, append) if self._takes(cache) else super().plan(cache, append)

    def _paged_plan(self, cache: PagedCache, append: Append) -> PagedPlan:
        check_append(append, cache.blocks, cache.block_size)
        rows = places(append, cache.block_size)
        written = self.ops.from_numpy(rows, "int32" if self.scatters else "int64")
        tables = self.ops.from_numpy(np.maximum(append.tables, 0).astype(np.int32))
        return PagedPlan(written, tables, np.cumsum(append.new).tolist(), append.held.tolist())

    def cache_append(self, cache: PagedCache, layer: int, k: Tensor, v: Tensor, plan: CachePlan) -> None:
        if not (isinstance(plan, PagedPlan) and self.scatters):
            super().cache_append(cache, layer, k, v, plan)
            return
        blocks = (x.unflatten(0, (-1, cache.block_size)) for x in (cache.keys[layer], cache.values[layer]))
        self.ops.npu.npu_scatter_pa_kv_cache(k.contiguous(), v.contiguous(), *blocks, plan.written, cache_mode="Norm")

    def attention_cached(self, q: Tensor, cache: PagedCache, layer: int, plan: CachePlan) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        check_groups(q.shape[1], keys.shape[1])
        if not isinstance(plan, PagedPlan):
            return super().attention_cached(q, cache, layer, plan)
        k, v = (x.view(cache.blocks, cache.block_size, -1) for x in (keys, values))
        out, _ = self.ops.npu.npu_fused_infer_attention_score(
            q.contiguous(), k, v,
            atten_mask=self.hidden_later, sparse_mode=RIGHT_DOWN_CAUSAL, input_layout="TND",
            block_table=plan.tables, block_size=cache.block_size,
            actual_seq_lengths=plan.ends, actual_seq_lengths_kv=plan.held,
            num_heads=q.shape[1], num_key_value_heads=keys.shape[1], scale=q.shape[-1] ** -0.5,
        )  # fmt: skip
        return out

    def _takes(self, cache: PagedCache) -> bool:
        rows, groups, size = cache.keys[0].shape
        fits = cache.keys[0].dtype in HALF and size in PAGED_HEADS and groups * size <= WIDEST_ROW
        blocks = cache.block_size % BLOCK == 0 and cache.block_size <= LARGEST_BLOCK
        there = "attention to the cache" not in self.ops.operators.lacking
        return there and fits and blocks and rows * groups * size < CACHE_LIMIT and self.paged(cache)


class NpuOptimizer(TorchOptimizer):
    """See core/optimizer.py. torch_npu's kernel for torch's fused AdamW takes `grad_scale` and does not use it."""

    @torch.no_grad()
    def step(
        self,
        state: AdamWState,
        groups: Sequence[ParameterGroup],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        grad_scale: float,
    ) -> None:
        gradients = [p.main_grad for group in groups for p in group.parameters if p.main_grad is not None]
        if gradients and grad_scale != 1.0:
            torch._foreach_mul_(gradients, grad_scale)
        super().step(state, groups, lr=lr, betas=betas, eps=eps, grad_scale=1.0)
