"""CudaOps without a card: which heads its kernel takes, and its calls, on CPU references under torch's own schemas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from duetvl.backends.torch_npu.autograd import TorchAutograd  # noqa: E402
from duetvl.backends.torch_npu.kernels_cuda import CudaKVCache, CudaOps, flash_attention_takes  # noqa: E402
from duetvl.core.composed import ComposedKVCache  # noqa: E402
from duetvl.core.kv_cache import Append  # noqa: E402
from duetvl.core.spans import Spans  # noqa: E402

from . import reference  # noqa: E402
from .flash_references import CALLS, flash_attention_on_cpu  # noqa: E402
from .tolerances import HALF, TOLERANCES, error  # noqa: E402

Tensor = Any


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    with flash_attention_on_cpu():
        yield


@pytest.fixture
def ops(kernels: None) -> CudaOps:
    made = CudaOps(TorchAutograd(), torch.device("cpu"))
    made.capability = (9, 0)
    CALLS.clear()
    return made


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "taken"),
    [
        ("bfloat16", 128, (8, 0), True), ("float16", 80, (9, 0), True), ("bfloat16", 8, (12, 0), True),
        ("float32", 128, (9, 0), False), ("bfloat16", 84, (9, 0), False), ("float16", 12, (9, 0), False),
        ("bfloat16", 256, (9, 0), True), ("bfloat16", 264, (9, 0), False), ("bfloat16", 128, (7, 5), False),
        ("float16", 64, (6, 1), False), ("bfloat16", 192, (8, 6), True), ("bfloat16", 200, (8, 6), False),
        ("bfloat16", 224, (8, 9), False), ("bfloat16", 224, (12, 1), False), ("bfloat16", 224, (8, 0), True),
        ("bfloat16", 128, (0, 0), False),
    ],
)  # fmt: skip
def test_which_heads_the_kernel_takes(dtype: str, size: int, capability: tuple[int, int], taken: bool) -> None:
    assert flash_attention_takes(getattr(torch, dtype), size, capability) is taken


def test_schemas_have_the_arguments_that_are_passed() -> None:
    forward, backward = (
        [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
        for name in ("_flash_attention_forward", "_flash_attention_backward")
    )
    ends = ["max_q", "max_k", "dropout_p", "is_causal"]
    assert "seqused_k" in forward
    assert forward[:10] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", *ends, "return_debug_mask"]
    assert backward[:12] == ["grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", *ends]


SPANS = [
    ((5, 1, 17, 3), None), ((4, 4, 4), None), ((5, 1, 7), (9, 4, 7)), ((9, 4, 2), (5, 1, 6)), ((3, 0, 4), (0, 5, 6)),
    ((3,), (0,)), ((), None),
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("lengths", "keys"), SPANS)
def test_attention(ops: CudaOps, lengths: Sequence[int], keys: Sequence[int] | None, causal: bool) -> None:
    spans = Spans.of_lengths(lengths, keys, causal=causal)
    compare(ops, spans, lengths, keys, size=16, dtype=torch.bfloat16)
    expected = 0 if not spans.seeing[0].rows else 1
    assert (CALLS.count("forward"), CALLS.count("backward")) == (expected, expected)


@pytest.mark.parametrize(("size", "dtype"), [(20, "bfloat16"), (264, "float16"), (16, "float32")])
def test_what_the_kernel_does_not_take_is_composed(ops: CudaOps, size: int, dtype: str) -> None:
    compare(ops, Spans.of_lengths([5, 3], causal=True), (5, 3), None, size, getattr(torch, dtype))
    assert not CALLS


def test_an_old_card_computes_attention_without_the_kernel(ops: CudaOps) -> None:
    ops.capability = (7, 5)
    compare(ops, Spans.of_lengths([5, 3], causal=True), (5, 3), None, 16, torch.float16)
    assert not CALLS


def compare(
    ops: CudaOps, spans: Spans, lengths: Sequence[int], keys: Sequence[int] | None, size: int, dtype: Any
) -> None:
    """Output, lse and gradients are those of the reference, to a few roundings."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((spans.rows, 4), (spans.key_rows, 2), (spans.key_rows, 2), (spans.rows, 4))
    q, k, v, d = (torch.randn(*shape, size, generator=draw).to(dtype) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = ops.attention(*leaves, spans)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = reference.attention(*exact, lengths, spans.causal, keys)
    allowed = 1e-5 if dtype == torch.float32 else 9 * HALF[str(dtype).removeprefix("torch.")]
    assert out.dtype == dtype and lse.dtype == torch.float32
    pairs = [(out, wanted), (lse, wanted_lse)]
    if spans.rows:
        found = torch.autograd.grad(out, leaves, d)
        theirs = torch.autograd.grad(wanted, exact, d.double(), allow_unused=True, materialize_grads=True)
        pairs += list(zip(found, theirs, strict=True))
    for ours, other in pairs:
        assert error(ours.detach().float().numpy(), other.detach().numpy()) < allowed


def test_lse_is_a_natural_logarithm(ops: CudaOps) -> None:
    q = torch.zeros(4, 2, 16, dtype=torch.bfloat16)
    _, lse = ops.attention(q, q, q, Spans.of_lengths([4], causal=False))
    assert lse.flatten().tolist() == pytest.approx([math.log(4)] * 8)


# -- the cache --------------------------------------------------------------------------------------------------------

TABLES = {"in place": [[2, 3], [0, 1]], "gathered": [[2, 3], [1, 0]]}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 128), ("float16", 80), ("float32", 128), ("float16", 20)])
def test_cached_attention(ops: CudaOps, kind: str, dtype: str, size: int) -> None:
    """Prefill beside a chunk, then decoding: one call a pass where the kernel takes the heads."""
    caches = [CudaKVCache(ops), ComposedKVCache(ops)]
    stores = [
        cache.cache_create(layers=1, blocks=4, block_size=16, kv_heads=2, head_size=size, dtype=dtype)
        for cache in caches
    ]
    takes = flash_attention_takes(stores[0].keys[0].dtype, size, (9, 0))
    assert not takes or caches[0].reads_in_place(stores[0])
    before, draw = np.array([0, 0]), torch.Generator().manual_seed(0)
    for new in ([5, 20], [13, 1], [1, 1]):
        append = Append(np.array(TABLES[kind], np.int32), before, np.array(new))
        q, k, v = (torch.randn(sum(new), n, size, generator=draw).to(getattr(torch, dtype)) for n in (6, 2, 2))
        found, wanted = (extended(*pair, append, q, k, v) for pair in zip(caches, stores, strict=True))
        allowed = 1e-5 if dtype == "float32" else 9 * HALF[dtype]
        assert error(found.float().numpy(), wanted.double().numpy()) < allowed
        before = append.held


def extended(cache: Any, store: Any, append: Append, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    CALLS.clear()
    plan = cache.plan(store, append)
    cache.cache_append(store, 0, k, v, plan)
    out = cache.attention_cached(q, store, 0, plan)
    kernel = isinstance(cache, CudaKVCache) and flash_attention_takes(q.dtype, q.shape[2], (9, 0))
    assert len(CALLS) == kernel
    return out


def test_keys_are_gathered_where_the_kernel_does_not_read_them_in_place(
    ops: CudaOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried, not believed: a kernel that refuses lengths, and one that takes sequences to lie end to end."""

    def end_to_end(*given: Any, seqused_k: Tensor | None = None, **named: Any) -> Any:
        starts = given[4]
        if seqused_k is not None:
            starts = torch.cat([starts[:1] * 0, seqused_k.cumsum(0)]).int()
            most = int(starts.diff().max())
            kept = [x[: int(starts[-1])] for x in given[1:3]]
            given = (given[0], *kept, given[3], starts, given[5], most, *given[7:])
        return kernel(*given, **named)

    def refusing(*given: Any, seqused_k: Tensor | None = None, **named: Any) -> Any:
        if seqused_k is not None:
            raise RuntimeError("seqused_k is not supported")
        return kernel(*given, **named)

    kernel = torch.ops.aten._flash_attention_forward
    for stand_in in (end_to_end, refusing):
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_in)
        cache = CudaKVCache(ops)
        store = cache.cache_create(layers=1, blocks=4, block_size=16, kv_heads=2, head_size=64, dtype="float16")
        append = Append(np.array([[2, 3]], np.int32), np.array([0]), np.array([20]))
        with pytest.warns(UserWarning, match="in float16 with head size 64 is off, as tried here"):
            assert cache.plan(store, append).index is not None


def test_the_bounds_of_spans_are_moved_once_for_all_layers(ops: CudaOps, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[np.ndarray] = []
    place = ops.from_numpy
    monkeypatch.setattr(ops, "from_numpy", lambda array, *rest: moved.append(array) or place(array, *rest))
    spans = Spans.of_lengths((5, 1, 17), causal=True)
    q = torch.randn(23, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        ops.attention(q, q, q, spans)[0].sum().backward()
    assert CALLS == ["forward", "backward"] * 3
    assert len(moved) == 2
    ops.attention(q, q, q, Spans.of_lengths((23,), causal=True))
    assert len(moved) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(37, 256), (3, 5, 80), (0, 16)])
def test_rms_norm(ops: CudaOps, shape: tuple[int, ...], dtype: str) -> None:
    kind = getattr(torch, dtype)
    x, d = (torch.randn(shape).to(kind).requires_grad_() for _ in range(2))
    scale = torch.randn(shape[-1]).to(kind).requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, scale)]
    out, expected = ops.rms_norm(x, scale, eps=1e-6), reference.rms_norm(*wide, 1e-6)
    assert out.dtype == kind
    ours = torch.autograd.grad(out, [x, scale], d.detach())
    theirs = torch.autograd.grad(expected, wide, d.detach().double())
    for found, right in zip((out, *ours), (expected, *theirs), strict=True):
        assert error(found.detach().double().numpy(), right.detach().numpy()) <= 2 * TOLERANCES["rms_norm"].of(dtype)
    halves = ops.rms_norm(x.to(torch.float32), scale, eps=1e-6)
    assert halves.dtype == torch.float32
