"""The references in the places of AscendOps' kernels, on MindSpore tensors.

MindSpore takes no CPU kernels from outside, so names of `kernels_ascend` are replaced. A reference gets what the
kernel's own signature makes of a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch

from duetvl.backends.mindspore import kernels_ascend

from . import references

CALLS = references.CALLS
TOKENS = {"next_tokens": "next_tockens", "pre_tokens": "pre_tockens"}
NORM = {"x": "input", "cos": "r1", "sin": "r2"}
STAND_INS = {  # kernel -> operator of torch_npu, and its names of arguments where they differ
    "speed_fusion_attention": ("npu_fusion_attention", TOKENS),
    "speed_fusion_attention_grad": ("npu_fusion_attention_grad", TOKENS),
    "rms_norm_grad": ("npu_rms_norm_backward", NORM),
    "rotate": ("npu_rotary_mul", NORM),
    "swiglu": ("npu_swiglu", {}),
    "swiglu_grad": ("npu_swiglu_backward", {}),
}


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """References for all kernels. No layout is named: the statistics come as the kernel keeps them."""
    for name, (reference, names) in STAND_INS.items():
        patch.setattr(kernels_ascend, name, standing_in(reference, getattr(kernels_ascend, name), names))
    norm = kernels_ascend.RmsNorm
    patch.setattr(kernels_ascend, "RmsNorm", lambda epsilon: standing_in("npu_rms_norm", norm(epsilon), NORM, epsilon))
    patch.setattr(kernels_ascend, "reshape_and_cache", reshape_and_cache)
    patch.setattr(kernels_ascend, "PagedAttention", paged_attention)


def to_torch(x: Any) -> Any:
    return torch.from_numpy(x.asnumpy().copy()) if isinstance(x, ms.Tensor) else x


def to_mindspore(x: Any) -> Any:
    return ms.Tensor(x.numpy()) if isinstance(x, torch.Tensor) else x


def standing_in(operator: str, kernel: Any, names: dict[str, str], epsilon: float | None = None) -> Callable[..., Any]:
    """The torch reference of an operator, called with the arguments of a MindSpore kernel, renamed where they differ.

    `epsilon` is what the kernel was made with, where its calls do not have it.
    """
    reference = references.with_names(references.SCHEMAS[operator], getattr(references, operator))
    signature = inspect.signature(kernel if inspect.isfunction(kernel) else type(kernel).__call__)
    blank = [] if inspect.isfunction(kernel) else [None]
    more = {} if epsilon is None else {"epsilon": epsilon}

    def call(*given: Any, **named: Any) -> Any:
        arguments = signature.bind(*blank, *given, **named).arguments
        results = reference(**{names.get(k, k): to_torch(v) for k, v in arguments.items() if k != "self"}, **more)
        return tuple(to_mindspore(x) for x in results) if isinstance(results, tuple) else to_mindspore(results)

    return call


def reshape_and_cache(key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> Any:
    """Writes in place, into whole tensors, the rows (1, T, G * K)."""
    CALLS["reshape_and_cache"] += 1
    places = slot_mapping.asnumpy()
    assert places.dtype == np.int32
    assert len(np.unique(places)) == len(places)
    for rows, cache in ((key, key_cache), (value, value_cache)):
        assert rows.dtype == cache.dtype
        assert rows.shape == (1, len(places), cache.shape[2] * cache.shape[3])
        array = cache.asnumpy()
        assert np.may_share_memory(array, cache.asnumpy()), "what is written into a view is lost"
        array.reshape(-1, *cache.shape[2:])[places] = rows.asnumpy().reshape(-1, *cache.shape[2:])
    return key


def paged_attention(head_num: int, scale_value: float, kv_head_num: int) -> Callable[..., Any]:
    """The last row of each sequence; `context_lens` counts it."""

    def call(query: Any, key_cache: Any, value_cache: Any, block_tables: Any, context_lens: Any) -> Any:
        CALLS["PagedAttention"] += 1
        size = key_cache.shape[3]
        assert query.shape == (len(block_tables), 1, head_num * size)
        assert key_cache.shape[2] == kv_head_num
        tables, lengths = block_tables.asnumpy(), context_lens.asnumpy()
        assert tables.dtype == lengths.dtype == np.int32
        assert ((tables >= 0) & (tables < key_cache.shape[0])).all()
        outs = []
        for row, table, length in zip(query.asnumpy(), tables, lengths, strict=True):
            k, v = (
                x.asnumpy()[table]
                .reshape(-1, kv_head_num, size)[:length]
                .astype(np.float64)
                .repeat(head_num // kv_head_num, 1)
                for x in (key_cache, value_cache)
            )
            p = np.exp(np.einsum("hk,mhk->hm", row.reshape(head_num, size).astype(np.float64), k) * scale_value)
            outs.append(np.einsum("hm,mhk->hk", p / p.sum(1, keepdims=True), v).reshape(1, -1))
        return ms.Tensor(np.stack(outs).astype(query.asnumpy().dtype))

    return call
