"""NpuOps, NpuKVCache and NpuOptimizer against float64, through the operators' schemas."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from duetvl.backends.torch_npu.autograd import TorchAutograd  # noqa: E402
from duetvl.backends.torch_npu.kernels_npu import (  # noqa: E402
    NpuKVCache,
    NpuOps,
    NpuOptimizer,
    PagedPlan,
    why_missing,
)
from duetvl.backends.torch_npu.ops import TorchOps  # noqa: E402
from duetvl.backends.torch_npu.optimizer import TorchOptimizer  # noqa: E402
from duetvl.core.backend import load_backend  # noqa: E402
from duetvl.core.composed import ComposedKVCache  # noqa: E402
from duetvl.core.errors import BackendError, ConfigError  # noqa: E402
from duetvl.core.kv_cache import Append  # noqa: E402
from duetvl.core.optimizer import ParameterGroup  # noqa: E402
from duetvl.core.params import Parameter  # noqa: E402
from duetvl.core.spans import Spans  # noqa: E402

from .schemas import SCHEMAS, TORCH_NPU  # noqa: E402

Tensor = torch.Tensor
REAL = bool(os.environ.get("DUETVL_REAL_TORCH_NPU"))

# Rounding of the result and of the residuals (out, inverse root) in the dtype; the references add none of their own.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """`attention` written out: one softmax over all rows, those of other spans masked."""
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    bounds = zip(spans.cu_seqlens, spans.cu_seqlens[1:], spans.key_offsets, spans.key_offsets[1:], strict=False)
    for first, last, key, key_end in bounds:
        block = torch.ones(last - first, key_end - key, dtype=torch.bool)
        seen[first:last, key:key_end] = block.tril(key_end - key - last + first) if spans.causal else block
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
    blind = ~seen.any(1)
    scores = scores.masked_fill(~seen & ~blind[:, None], float("-inf"))
    out = torch.einsum("hts,shk->thk", scores.softmax(-1), v) * ~blind[:, None, None]
    return out, scores.logsumexp(-1).masked_fill(blind, float("-inf"))


def expect_gradients(fn: Callable[..., Tensor], inputs: list[Tensor], d: Tensor) -> list[Tensor]:
    leaves = [x.double().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(fn(*leaves), leaves, d.double()))


def find_gradients(ops: NpuOps, fn: Callable[..., Any], inputs: list[Tensor], d: Tensor) -> list[Tensor]:
    _, tape = ops.autograd.run_stage(lambda _, *xs: fn(*xs), inputs, ())
    return list(ops.autograd.backward(tape, [d, None][: len(tape.outputs)]))


# -- the operators themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_those_of_the_operators(operators: Any, name: str) -> None:
    schema = getattr(operators, name).default._schema
    assert str(schema) == str(torch._C.parse_schema(f"npu::{SCHEMAS[name]}"))


@pytest.mark.skipif(not REAL, reason="scripts/npu_schema_check.sh runs it, in an environment with torch_npu")
def test_version_of_the_real_operators(operators: Any) -> None:
    import torch_npu

    assert torch_npu.__version__ == TORCH_NPU


def test_wrong_argument_names_fail(operators: Any) -> None:
    q = made(4, 2, 16)
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'head_number'"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 2, "TND", head_number=2)
    with pytest.raises(RuntimeError, match="positional"):
        torch.ops.npu.npu_fusion_attention_grad(q, q, q, q, 2, "TND", None)


def test_reference_refuses_the_leading_zero_and_unpacked_statistics(ops: NpuOps) -> None:
    q = made(4, 2, 16)
    with pytest.raises(AssertionError, match="leading zero"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 2, "TND", actual_seq_qlen=[0, 4], actual_seq_kvlen=[0, 4])
    ends = {"actual_seq_qlen": [1, 4], "actual_seq_kvlen": [1, 4]}
    default, by_row = (
        torch.ops.npu.npu_fusion_attention(q, q, q, 2, "TND", softmax_layout=layout, **ends)[1]
        for layout in ("", "TND")
    )
    assert torch.equal(default.view(-1)[16:].view(2, 3, 8), by_row[1:].transpose(0, 1))


# -- attention -------------------------------------------------------------------------------------------------------

CASES = [
    pytest.param([5], True, 4, 4, 16, id="one span"),
    pytest.param([3, 1, 7, 2], True, 4, 2, 80, id="causal, groups, head size 80"),
    pytest.param([3, 1, 7, 2], False, 4, 1, 128, id="whole, one group, head size 128"),
    pytest.param([2, 2, 2], False, 3, 3, 80, id="equal spans"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("lengths", "causal", "heads", "groups", "size"), CASES)
def test_attention(
    ops: NpuOps, lengths: list[int], causal: bool, heads: int, groups: int, size: int, dtype: torch.dtype
) -> None:
    spans = Spans.of_lengths(lengths, causal=causal)
    q, k, v, d = (made(spans.rows, n, size, dtype=dtype, seed=i) for i, n in enumerate((heads, groups, groups, heads)))
    out, lse = ops.attention(q, k, v, spans)
    wanted, wanted_lse = dense_attention(*(x.double() for x in (q, k, v)), spans)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_near(out, wanted, dtype)
    assert_near(lse, wanted_lse, torch.float32)
    found = find_gradients(ops, lambda *t: ops.attention(*t, spans), [q, k, v], d)
    for one, other in zip(found, expect_gradients(lambda *t: dense_attention(*t, spans)[0], [q, k, v], d), strict=True):
        assert_near(one, other, dtype)


KEYED = [
    pytest.param([5, 1, 7], [9, 4, 7], True, id="causal, more keys"),
    pytest.param([9, 4, 2], [5, 1, 6], True, id="causal, more rows"),
    pytest.param([3, 0, 4, 2], [0, 5, 6, 0], True, id="causal, some without keys or rows"),
    pytest.param([3, 0, 4, 2], [0, 5, 6, 1], False, id="whole, some without keys or rows"),
    pytest.param([3, 2], [0, 0], True, id="no keys"),
]


@pytest.mark.parametrize(("lengths", "keys", "causal"), KEYED)
def test_attention_to_other_keys(ops: NpuOps, lengths: list[int], keys: list[int], causal: bool) -> None:
    spans = Spans.of_lengths(lengths, keys, causal=causal)
    q, d = (made(spans.rows, 4, 16, seed=i) for i in (0, 3))
    k, v = (made(spans.key_rows, 2, 16, seed=i) for i in (1, 2))
    out, lse = ops.attention(q, k, v, spans)
    wanted, wanted_lse = dense_attention(*(x.double() for x in (q, k, v)), spans)
    assert_near(out, wanted, torch.float32)
    assert_near(lse, wanted_lse, torch.float32)
    found = ops.attention_grad(d, q, k, v, out, lse, spans)
    for one, other in zip(found, expect_gradients(lambda *t: dense_attention(*t, spans)[0], [q, k, v], d), strict=True):
        assert_near(one, other, torch.float32)


def test_operators_without_a_layout_for_statistics(ops: NpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch_npu 2.6.0 has them: the statistics of several spans lie in another order than their shape says."""
    spans = Spans.of_lengths([5, 1, 7], [9, 4, 7], causal=True)
    q, d = (made(13, 4, 16, seed=i) for i in (0, 3))
    k, v = (made(20, 2, 16, seed=i) for i in (1, 2))
    assert ops.by_row
    out, lse = ops.attention(q, k, v, spans)
    wanted = [out, lse, *ops.attention_grad(d, q, k, v, out, lse, spans)]
    monkeypatch.setattr(ops, "by_row", False)
    out, lse = ops.attention(q, k, v, spans)
    for one, other in zip([out, lse, *ops.attention_grad(d, q, k, v, out, lse, spans)], wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [784, 1024])
def test_heads_beyond_the_kernels_are_composed(ops: NpuOps, size: int) -> None:
    """The reference of attention refuses more than 768, that of the rotation 896 and more."""
    q, spans = made(3, 1, size), Spans.of_lengths([3], causal=True)
    assert_near(ops.attention(q, q, q, spans)[0], dense_attention(q, q, q, spans)[0], torch.float32)
    cos = torch.ones(3, size // 2)
    assert torch.equal(ops.rope(q, cos, torch.zeros(3, size // 2)), q)


def test_gradient_with_the_lse_of_more_keys(ops: NpuOps) -> None:
    """Ring attention: the keys are two halves, out and lse come from both, each half has a gradient of its own."""
    spans = Spans.of_lengths([3, 4], causal=False)
    q, d = made(7, 4, 16), made(7, 4, 16, seed=9)
    halves = [(made(7, 2, 16, seed=i), made(7, 2, 16, seed=i + 1)) for i in (1, 3)]

    def both(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
        (out1, lse1), (out2, lse2) = dense_attention(q, k1, v1, spans), dense_attention(q, k2, v2, spans)
        share = (lse1 - lse2).sigmoid().T[:, :, None]
        return out1 * share + out2 * (1 - share)

    flat = [q, *halves[0], *halves[1]]
    out = both(*(x.double() for x in flat)).float()
    lses = [dense_attention(q.double(), *(x.double() for x in half), spans)[1] for half in halves]
    lse = torch.logaddexp(*lses).float()
    found = [ops.attention_grad(d, q, k, v, out, lse, spans) for k, v in halves]
    dq, *rest = expect_gradients(both, flat, d)
    assert_near(found[0][0] + found[1][0], dq, torch.float32)
    for one, other in zip((*found[0][1:], *found[1][1:]), rest, strict=True):
        assert_near(one, other, torch.float32)


def test_more_spans_than_one_call_takes(ops: NpuOps) -> None:
    spans = Spans.of_lengths([1, 2] * 600, causal=True)
    q, k, v, d = (made(spans.rows, 1, 16, seed=i) for i in range(4))
    out, lse = ops.attention(q, k, v, spans)
    wanted, wanted_lse = dense_attention(*(x.double() for x in (q, k, v)), spans)
    assert_near(out, wanted, torch.float32)
    assert_near(lse, wanted_lse, torch.float32)
    found = find_gradients(ops, lambda *t: ops.attention(*t, spans), [q, k, v], d)
    for one, other in zip(found, expect_gradients(lambda *t: dense_attention(*t, spans)[0], [q, k, v], d), strict=True):
        assert_near(one, other, torch.float32)


def test_no_rows(ops: NpuOps) -> None:
    q, spans = made(0, 2, 16), Spans.of_lengths([], causal=False)
    out, lse = ops.attention(q, q, q, spans)
    assert (out.shape, lse.shape) == ((0, 2, 16), (2, 0))
    assert [g.shape[0] for g in ops.attention_grad(q, q, q, q, out, lse, spans)] == [0, 0, 0]
    assert ops.rms_norm(made(0, 8), made(8), eps=1e-6).shape == (0, 8)
    assert ops.rope(q, made(0, 8), made(0, 8)).shape == (0, 2, 16)


# -- norm, rotation, gate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)], ids=str)
def test_rms_norm(ops: NpuOps, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, d = [made(*shape, dtype=dtype), made(16, dtype=dtype, seed=1)], made(*shape, dtype=dtype, seed=2)

    def wanted(x: Tensor, scale: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    check(ops, lambda *t: ops.rms_norm(*t, eps=1e-6), wanted, inputs, d)


def test_rms_norm_of_two_dtypes_is_composed(ops: NpuOps) -> None:
    x, scale = made(4, 16, dtype=torch.bfloat16), made(16)
    assert torch.equal(ops.rms_norm(x, scale, eps=1e-6), super(NpuOps, ops).rms_norm(x, scale, eps=1e-6))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [16, 80, 128])
def test_rope(ops: NpuOps, size: int, dtype: torch.dtype) -> None:
    angles = made(6, size // 2, seed=3) * 100
    cos, sin = angles.cos(), angles.sin()

    def wanted(x: Tensor) -> Tensor:
        (a, b), c, s = x.chunk(2, -1), cos[:, None].double(), sin[:, None].double()
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    check(ops, lambda x: ops.rope(x, cos, sin), wanted, [made(6, 3, size, dtype=dtype)], made(6, 3, size, dtype=dtype))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_swiglu(ops: NpuOps, dtype: torch.dtype) -> None:
    inputs, d = [made(5, 12, dtype=dtype, seed=i) for i in range(2)], made(5, 12, dtype=dtype, seed=2)
    check(ops, ops.swiglu, lambda gate, up: gate * gate.sigmoid() * up, inputs, d)


def check(ops: NpuOps, fn: Callable, wanted: Callable, inputs: list[Tensor], d: Tensor) -> None:
    """Value and gradients of `fn` are those of `wanted` in float64, in the inputs' dtype."""
    value = fn(*inputs)
    assert value.dtype == d.dtype
    assert_near(value, wanted(*(x.double() for x in inputs)), d.dtype)
    for found, other in zip(find_gradients(ops, fn, inputs, d), expect_gradients(wanted, inputs, d), strict=True):
        assert found.dtype == d.dtype
        assert_near(found, other, d.dtype)


# -- the cache -------------------------------------------------------------------------------------------------------

# Each pass: (sequence, new rows). The blocks of a sequence are in no order, and the first two share one.
TABLES = np.array([[4, 1], [4, 3], [0, 2]], np.int32)
STEPS = [
    pytest.param([([2, 0], [5, 3])], id="prefill"),
    pytest.param([([2, 0], [5, 130]), ([0, 2], [1, 1]), ([2], [1])], id="decoding, more than a block"),
    pytest.param([([0, 2], [4, 6]), ([2, 0], [1, 7])], id="decoding and prefill in parts together"),
    pytest.param([([0], [128]), ([1, 0, 2], [9, 1, 4])], id="a shared block"),
]


@pytest.mark.parametrize(("heads", "groups", "size"), [(12, 2, 128), (28, 4, 128), (3, 3, 64), (4, 2, 80)])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_cache(
    ops: NpuOps, steps: list[tuple[list[int], list[int]]], dtype: torch.dtype, heads: int, groups: int, size: int
) -> None:
    caches = [NpuKVCache(ops), ComposedKVCache(TorchOps(TorchAutograd(), torch.device("cpu")))]
    names = [str(dtype).removeprefix("torch."), "float32"]
    stores = [
        c.cache_create(layers=2, blocks=5, block_size=NpuKVCache.block_size, kv_heads=groups, head_size=size, dtype=n)
        for c, n in zip(caches, names, strict=True)
    ]
    lengths = np.array([0, 128, 0])
    for number, (sequences, new) in enumerate(steps):
        append = Append(TABLES[sequences], lengths[sequences], np.array(new))
        q, k, v = (
            made(sum(new), n, size, dtype=dtype, seed=10 * number + i) for i, n in enumerate((heads, groups, groups))
        )
        outs = []
        for cache, store, name in zip(caches, stores, names, strict=True):
            plan = cache.plan(store, append)
            tensors = [ops.cast(x, name) for x in (q, k, v)]
            cache.cache_append(store, 1, tensors[1], tensors[2], plan)
            outs.append(cache.attention_cached(tensors[0], store, 1, plan))
        assert outs[0].dtype == dtype
        assert_near(outs[0], outs[1], dtype)
        lengths[sequences] += new


def test_a_pass_is_one_call_of_each_kernel(ops: NpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score"):
        kernel = getattr(torch.ops.npu, name)

        def counted(*given: Any, name: str = name, kernel: Any = kernel, **named: Any) -> Any:
            calls.append(name)
            return kernel(*given, **named)

        counted.default = kernel.default  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.ops.npu, name, counted)
    cache = NpuKVCache(ops)
    store = cache.cache_create(layers=1, blocks=5, block_size=128, kv_heads=2, head_size=64, dtype="float16")
    plan = cache.plan(store, Append(TABLES[[0, 2]], np.array([0, 0]), np.array([130, 1])))
    calls.clear()  # of the trial
    q, k = made(131, 4, 64, dtype=torch.float16), made(131, 2, 64, dtype=torch.float16)
    cache.cache_append(store, 0, k, k, plan)
    cache.attention_cached(q, store, 0, plan)
    assert calls == ["npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score"]


def test_without_the_argument_for_the_layout_torch_writes(ops: NpuOps) -> None:
    """An older torch_npu: its kernel would write another layout. The rows are the same."""
    stores = []
    for scatters in (True, False):
        cache = NpuKVCache(ops)
        assert cache.scatters
        cache.scatters = scatters
        store = cache.cache_create(layers=1, blocks=5, block_size=128, kv_heads=2, head_size=64, dtype="float16")
        plan = cache.plan(store, Append(TABLES[[0]], np.array([0]), np.array([130])))
        k, v = (made(130, 2, 64, dtype=torch.float16, seed=i) for i in range(2))
        cache.cache_append(store, 0, k, v, plan)
        stores.append(store)
    assert torch.equal(stores[0].keys[0], stores[1].keys[0])
    assert torch.equal(stores[0].values[0], stores[1].values[0])


@pytest.mark.parametrize("reason", ["its numbers are others", "no such kernel on Ascend 310P"])
def test_the_kernels_are_tried_before_they_are_used(ops: NpuOps, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """A device that refuses, and one that takes lengths of the keys for cumulative."""
    kernel = torch.ops.npu.npu_fused_infer_attention_score

    def another(*given: Any, actual_seq_lengths_kv: list[int], **named: Any) -> Any:
        if "Ascend" in reason:
            raise RuntimeError(reason)
        lengths = np.diff(actual_seq_lengths_kv, prepend=0)
        return kernel(*given, actual_seq_lengths_kv=np.maximum(lengths, 4).tolist(), **named)

    shape = {"layers": 1, "blocks": 1, "block_size": 128, "kv_heads": 2, "dtype": "bfloat16"}
    cache = NpuKVCache(ops)
    assert cache.paged(cache.cache_create(head_size=128, **shape))
    monkeypatch.setattr(torch.ops.npu, "npu_fused_infer_attention_score", another)
    assert cache.paged(cache.cache_create(head_size=128, **shape))  # tried once
    with pytest.warns(UserWarning, match=f"in bfloat16 with head size 64 is off, as tried here: {reason}"):
        assert not cache.paged(cache.cache_create(head_size=64, **shape))


def test_a_device_without_the_kernels_reads_by_torch(ops: NpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the 300I DUO does: the same numbers."""
    outs = []
    for paged in (True, False):
        cache = NpuKVCache(ops)
        monkeypatch.setattr(cache, "paged", lambda store, paged=paged: paged)
        store = cache.cache_create(layers=1, blocks=5, block_size=128, kv_heads=2, head_size=64, dtype="float16")
        plan = cache.plan(store, Append(TABLES[[0, 2]], np.array([0, 0]), np.array([130, 3])))
        assert isinstance(plan, PagedPlan) is paged
        q, k, v = (made(133, n, 64, dtype=torch.float16, seed=n + i) for i, n in enumerate((4, 2, 2)))
        cache.cache_append(store, 0, k, v, plan)
        outs.append(cache.attention_cached(q, store, 0, plan))
    assert_near(outs[0], outs[1], torch.float16)


def test_the_cache_refuses_groups_that_do_not_divide_the_heads(ops: NpuOps) -> None:
    cache = NpuKVCache(ops)
    store = cache.cache_create(layers=1, blocks=1, block_size=128, kv_heads=2, head_size=16, dtype="float16")
    plan = cache.plan(store, Append(np.array([[0]], np.int32), np.array([0]), np.array([1])))
    with pytest.raises(ConfigError, match="7 query heads with 2 key-value groups"):
        cache.attention_cached(made(1, 7, 16, dtype=torch.float16), store, 0, plan)


# -- optimizer, and the choice of a device ---------------------------------------------------------------------------


def test_optimizer_scales_gradients_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu's `_fused_adamw_` takes grad_scale and ignores it: whatever it is handed must be 1."""
    scales = []
    plain = torch._fused_adamw_

    def watched(*lists: Any, grad_scale: Tensor, **options: Any) -> None:
        scales.append(float(grad_scale))
        plain(*lists, grad_scale=grad_scale, **options)

    results = []
    for optimizer in (TorchOptimizer(), NpuOptimizer()):
        parameters = [Parameter("w", made(3, 4)), Parameter("b", made(4, dtype=torch.bfloat16))]
        groups = [ParameterGroup(parameters, weight_decay=0.1)]
        state = optimizer.create(groups)
        if isinstance(optimizer, NpuOptimizer):
            monkeypatch.setattr(torch, "_fused_adamw_", watched)
        for step in range(3):
            for p in parameters:
                p.main_grad = made(*p.tensor.shape, seed=step) * 1e-6
            optimizer.step(state, groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, grad_scale=0.01)
        assert all(p.main_grad is None for p in parameters)
        results.append([p.tensor.float() for p in parameters])
    assert scales
    assert set(scales) == {1.0}
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_asking_for_an_npu_says_what_is_missing() -> None:
    reason = why_missing()
    assert reason is not None
    assert ("no device" if REAL else "not installed") in reason
    with pytest.raises(BackendError, match="device 'npu' is not available: torch_npu"):
        load_backend("torch_npu", device="npu")
