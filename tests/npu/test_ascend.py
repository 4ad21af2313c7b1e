"""AscendOps without an Ascend: MindSpore's own argument checks for the calls, references for the numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from duetvl.core.spans import Spans

if os.environ.get("DUETVL_REAL_TORCH_NPU"):
    pytest.skip("the environment of torch_npu has no MindSpore", allow_module_level=True)
ms = pytest.importorskip("mindspore")

from duetvl.backends.mindspore import kernels_ascend  # noqa: E402
from duetvl.backends.mindspore.kernels_ascend import AscendKVCache, AscendOps, BlockCache  # noqa: E402
from duetvl.backends.mindspore.ops import MindSporeOps  # noqa: E402
from duetvl.core.backend import load_backend  # noqa: E402
from duetvl.core.composed import ComposedKVCache  # noqa: E402
from duetvl.core.composed.ascend_attention import statistic_places  # noqa: E402
from duetvl.core.kv_cache import Append  # noqa: E402

pytest.importorskip("torch")

from .mindspore_references import stand_in  # noqa: E402

TOLERANCE = 3e-3  # float16
NO_KERNEL = r"The kernel \w+ unregistered"


@pytest.fixture(scope="module")
def ops() -> AscendOps:
    return AscendOps(load_backend("mindspore", device="cpu").autograd)


def made(*shape: int, seed: int = 0, dtype: type = np.float16) -> Any:
    return ms.Tensor(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


# -- the calls are accepted as they are, up to the kernel ------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_attention_calls_reach_the_kernel(ops: AscendOps, causal: bool) -> None:
    q, k, spans = made(6, 4, 16), made(6, 2, 16), Spans.of_lengths([2, 4], causal=causal)
    with pytest.raises(RuntimeError, match=NO_KERNEL):
        ops.attention(q, k, k, spans)
    with pytest.raises(RuntimeError, match=NO_KERNEL):
        ops.attention_grad(q, q, k, k, q, ms.Tensor(np.zeros((4, 6), np.float32)), spans)


def test_calls_of_the_cache_reach_the_kernel(ops: AscendOps) -> None:
    cache = AscendKVCache(ops)
    store = cache.cache_create(layers=1, blocks=4, block_size=128, kv_heads=2, head_size=128, dtype="float16")
    plan = cache.plan(store, Append(np.array([[2, 0], [1, -1]], np.int32), np.array([130, 4]), np.array([1, 1])))
    k = made(2, 2, 128)
    with pytest.raises(RuntimeError, match=NO_KERNEL):
        cache.cache_append(store, 0, k, k, plan)
    with pytest.raises(RuntimeError, match=NO_KERNEL):
        cache.attention_cached(made(2, 12, 128), store, 0, plan)
    with pytest.raises(RuntimeError, match="num_tokens of slot mapping and key must be the same"):
        kernels_ascend.reshape_and_cache(k, k, *store.keys, *store.values, plan.written)


def test_the_other_calls_reach_the_kernel(ops: AscendOps) -> None:
    x, half = made(6, 4, 16), made(6, 8, dtype=np.float32)
    inverse = ms.Tensor(np.ones((6, 4, 1), np.float32))
    calls: list[Callable[[], Any]] = [
        lambda: ops.rms_norm(x, made(16), eps=1e-6),
        lambda: kernels_ascend.rms_norm_grad(x, x, inverse, made(16)),
        lambda: ops.rope(x, half, half),
        lambda: ops.swiglu(x, x),
        lambda: kernels_ascend.swiglu_grad(x, made(6, 4, 32), -1),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=NO_KERNEL):
            call()


def test_wrong_arguments_fail_before_the_kernel(ops: AscendOps) -> None:
    q, ends = made(6, 4, 16), {"actual_seq_qlen": [2, 6], "actual_seq_kvlen": [2, 6]}
    with pytest.raises(TypeError, match="head_num"):
        kernels_ascend.speed_fusion_attention(q, q, q, "four", "TND", **ends)
    with pytest.raises(ValueError, match="input_layout"):
        kernels_ascend.speed_fusion_attention(q, q, q, 4, "TNX", **ends)
    with pytest.raises(TypeError, match="softmax_layout"):
        kernels_ascend.speed_fusion_attention(q, q, q, 4, "TND", softmax_layout="TND", **ends)
    type(ops.autograd)()  # MindSpore stops recording after a refused argument; this starts it again


# -- the numbers, with references in the kernels' places --------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """References for all of AscendOps' kernels."""
    stand_in(monkeypatch)


def assert_same(found: Any, wanted: Any) -> None:
    assert found.dtype == ms.float16
    np.testing.assert_allclose(found.asnumpy().astype(np.float64), wanted.asnumpy(), rtol=TOLERANCE, atol=TOLERANCE)


def both(ops: AscendOps, fn: Callable[[MindSporeOps], Callable[..., Any]], inputs: list[Any], d: Any) -> None:
    """`fn` and its gradients by kernels in float16 are those of the composed one in float32."""
    composed = MindSporeOps(ops.autograd)
    wide = [ms.ops.cast(x, ms.float32) for x in (*inputs, d)]
    results = []
    for chosen, tensors in ((ops, [*inputs, d]), (composed, wide)):
        run = fn(chosen)
        outputs, tape = chosen.autograd.run_stage(lambda _, *xs, run=run: run(*xs), tensors[:-1], ())
        gradients = chosen.autograd.backward(tape, [tensors[-1], None][: len(outputs)])
        results.append((outputs[0], *gradients))
    for found, wanted in zip(*results, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [80, 128])
def test_attention(ops: AscendOps, kernels: None, causal: bool, size: int) -> None:
    spans = Spans.of_lengths([3, 1, 7, 2], causal=causal)
    inputs = [made(13, n, size, seed=i) for i, n in enumerate((4, 2, 2))]
    both(ops, lambda o: lambda *t: o.attention(*t, spans), inputs, made(13, 4, size, seed=9))
    lse = ops.attention(*inputs, spans)[1].asnumpy()
    wanted = MindSporeOps(ops.autograd).attention(*(ms.ops.cast(x, ms.float32) for x in inputs), spans)[1]
    np.testing.assert_allclose(lse, wanted.asnumpy(), atol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "keys"), [([5, 1, 7], [9, 4, 7]), ([3, 0, 4, 6], [0, 5, 6, 2])], ids=["more keys", "none of either"]
)
def test_attention_to_other_keys(
    ops: AscendOps, kernels: None, lengths: list[int], keys: list[int], causal: bool
) -> None:
    spans = Spans.of_lengths(lengths, keys, causal=causal)
    inputs = [made(spans.rows, 4, 16), *(made(spans.key_rows, 2, 16, seed=i) for i in (1, 2))]
    both(ops, lambda o: lambda *t: o.attention(*t, spans), inputs, made(spans.rows, 4, 16, seed=9))
    lse, wanted = (
        o.attention(*x, spans)[1].asnumpy()
        for o, x in ((ops, inputs), (MindSporeOps(ops.autograd), [ms.ops.cast(x, ms.float32) for x in inputs]))
    )
    np.testing.assert_allclose(lse, wanted, atol=2e-5)


def test_more_spans_than_one_call_takes(ops: AscendOps, kernels: None) -> None:
    spans = Spans.of_lengths([1, 2] * 520, causal=True)
    inputs = [made(spans.rows, 1, 16, seed=i) for i in range(3)]
    both(ops, lambda o: lambda *t: o.attention(*t, spans), inputs, made(spans.rows, 1, 16, seed=9))


def test_float32_attention_is_composed(ops: AscendOps) -> None:
    q, spans = made(6, 2, 16, dtype=np.float32), Spans.of_lengths([2, 4], causal=True)
    out, lse = ops.attention(q, q, q, spans)
    assert (out.shape, lse.shape) == ((6, 2, 16), (2, 6))


def test_norm_rotation_and_gate(ops: AscendOps, kernels: None) -> None:
    x, angles = made(6, 4, 16), np.random.default_rng(5).standard_normal((6, 8)) * 50
    cos, sin = (ms.Tensor(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    both(ops, lambda o: lambda x, s: o.rms_norm(x, s, eps=1e-6), [x, made(16, seed=1)], made(6, 4, 16, seed=2))
    both(ops, lambda o: lambda x: o.rope(x, cos, sin), [x], made(6, 4, 16, seed=2))
    both(ops, lambda o: o.swiglu, [made(5, 12), made(5, 12, seed=1)], made(5, 12, seed=2))


# Each pass: (sequence, new rows). The blocks of a sequence are in no order, and the first two share one.
TABLES = np.array([[4, 1], [4, 3], [0, 2]], np.int32)
STEPS = {
    "prefill": [([2, 0], [5, 3])],
    "decoding, more than a block": [([2, 0], [5, 20]), ([0, 2], [1, 1]), ([2], [1])],
    "decoding and prefill together": [([0, 2], [4, 6]), ([2, 0], [1, 7]), ([0, 2], [2, 1])],
    "a shared block": [([0], [16]), ([1, 0, 2], [9, 1, 4])],
}


@pytest.mark.parametrize(("heads", "groups", "size"), [(12, 2, 128), (3, 3, 64), (4, 2, 16)])
@pytest.mark.parametrize("kind", STEPS)
def test_cache(ops: AscendOps, kernels: None, kind: str, heads: int, groups: int, size: int) -> None:
    caches = [AscendKVCache(ops), ComposedKVCache(MindSporeOps(ops.autograd))]
    stores = [
        c.cache_create(layers=2, blocks=6, block_size=16, kv_heads=groups, head_size=size, dtype=name)
        for c, name in zip(caches, ("float16", "float32"), strict=True)
    ]
    assert isinstance(stores[0], BlockCache) is (size != 16)
    lengths = np.array([0, 16, 0])
    for number, (sequences, new) in enumerate(STEPS[kind]):
        append = Append(TABLES[sequences], lengths[sequences], np.array(new))
        tensors = [made(sum(new), n, size, seed=10 * number + i) for i, n in enumerate((heads, groups, groups))]
        found = cached(caches[0], stores[0], append, tensors)
        assert_same(found, cached(caches[1], stores[1], append, [ms.ops.cast(x, ms.float32) for x in tensors]))
        lengths[sequences] += new
    for cache, store in zip(caches, stores, strict=True):
        cache.cache_copy(store, 4, 5, 1)
    copied, original = (x.asnumpy().reshape(6, -1) for x in (stores[0].keys[1], stores[1].keys[1]))
    np.testing.assert_array_equal(copied[5], copied[4])
    np.testing.assert_array_equal(copied, original.astype(np.float16))


def cached(cache: Any, store: Any, append: Append, tensors: list[Any]) -> Any:
    plan = cache.plan(store, append)
    cache.cache_append(store, 1, tensors[1], tensors[2], plan)
    return cache.attention_cached(tensors[0], store, 1, plan)


def test_places_of_the_statistics() -> None:
    places = statistic_places(Spans.of_lengths([2, 3], causal=True), heads=2)
    assert places.tolist() == [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]]


def test_statistics_of_lse_and_back(ops: AscendOps) -> None:
    spans = Spans.of_lengths([3, 1, 7], causal=False)
    lse = made(4, 11, dtype=np.float32)
    top, total = ops.statistics_of(lse, spans)
    assert top.shape == total.shape == (11, 4, 8)
    np.testing.assert_array_equal(ops.lse_of(top, total, spans).asnumpy(), lse.asnumpy())
