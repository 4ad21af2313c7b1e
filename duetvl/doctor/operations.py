"""Every longer operation of a device against the composed one of core/composed, computed there in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.composed import ComposedKVCache, ComposedOps
from duetvl.core.composed.attention import ComposedAttention
from duetvl.core.errors import first_line
from duetvl.core.kv_cache import Append, KVCache
from duetvl.core.ops import Ops
from duetvl.core.optimizer import ParameterGroup
from duetvl.core.params import Parameter
from duetvl.core.spans import Spans
from duetvl.doctor.check import Check, compared, tolerance

Tensor = Any
Compute = Callable[..., tuple[Tensor, ...]]

PART = "operations"
DTYPES = ("float32", "bfloat16", "float16")
KEY = (3, 2**40 + 5, 0, 77)


@dataclass(frozen=True, eq=False)
class Operation:
    """`run(ops, *tensors)` gives results; a gradient comes through the first. `hook`: what a backend overrides."""

    name: str
    hook: str
    run: Compute
    arrays: tuple[np.ndarray, ...]
    roundings: float
    differentiable: bool = True
    spans: Spans | None = None


def composed_of(backend: Backend) -> ComposedOps:
    """The device's small functions with every longer operation as core/composed makes it."""
    composed = type("Composed", (ComposedOps,), {})(backend.autograd)
    longer = {**vars(ComposedAttention), **vars(ComposedOps)}
    small = [name for name in vars(Ops) if not name.startswith("_") and name not in longer]
    vars(composed).update({name: getattr(backend.ops, name) for name in small})
    return composed


def check_operations(backend: Backend) -> Iterator[Check]:
    """All operations in every dtype that the device has; what raises is a line that failed."""
    dtypes = [dtype for dtype in DTYPES if backend.device.supports(dtype)]
    for operation in operations():
        for dtype in dtypes:
            yield _guarded(f"{operation.name} {dtype}", partial(_check, backend, operation, dtype))
    for dtype in dtypes:
        yield _guarded(f"cached attention {dtype}", partial(_check_cache, backend, dtype))
        yield _guarded(f"adamw {dtype}", partial(_check_adamw, backend, dtype))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever a kernel raises: the examination goes on
        return Check(PART, name, False, detail=f"{type(error).__name__}: {first_line(error)}")


# -- the operations ---------------------------------------------------------------------------------------------------


def operations() -> Iterator[Operation]:
    """With inputs of the shapes that models have, and awkward ones."""
    x, w, b = _normal(37, 256), _normal(256, seed=1), _normal(256, seed=2)
    yield Operation("rms_norm", "rms_norm", lambda o, x, w: (o.rms_norm(x, w, eps=1e-6),), (x, w), 4)
    yield Operation("layer_norm", "layer_norm", lambda o, x, w, b: (o.layer_norm(x, w, b, eps=1e-6),), (x, w, b), 6)
    yield Operation("swiglu", "_swiglu", lambda o, a, b: (o.swiglu(a, b),), (x, _normal(37, 256, seed=3)), 7)
    yield Operation("quick_gelu", "quick_gelu", lambda o, a: (o.quick_gelu(a),), (x,), 10)
    for size in (64, 80, 128):
        angles = np.random.default_rng(size).uniform(0, 1000, (19, size // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        yield Operation(
            f"rope, heads of {size}", "_rotate",
            lambda o, x, c=cos, s=sin: (o.rope(x, o.from_numpy(c), o.from_numpy(s)),), (_normal(19, 3, size),), 4,
        )  # fmt: skip
    yield Operation(  # the masks come of products of int32 that wrap around
        "dropout", "_kept", lambda o, x: (o.dropout(x, 0.3, KEY, np.arange(2**32, 2**32 + 37), 5),), (x,), 2
    )
    yield from _attentions()
    yield from _vocabulary()
    factors = (_normal(96, 64), _normal(8, 64, seed=1), _normal(96, 8, seed=2))
    yield Operation(
        "low_rank_row_norms", "low_rank_row_norms",
        lambda o, w, a, b: (o.low_rank_row_norms(w, o.cast(a, "float32"), o.cast(b, "float32"), 0.5),), factors, 2,
        differentiable=False,
    )  # fmt: skip


def _attentions() -> Iterator[Operation]:
    packed, windows = (33, 1, 70, 128), (64,) * 8 + (16, 36)
    cases = (
        ("causal, 128, groups", Spans.of_lengths(packed, causal=True), (6, 2, 128)),
        ("causal, 64", Spans.of_lengths(packed, causal=True), (4, 4, 64)),
        ("windows, 80", Spans.of_lengths(windows, causal=False), (2, 2, 80)),
        ("1,100 spans, 80", Spans.of_lengths((4,) * 1100, causal=False), (1, 1, 80)),
        ("more keys, 128, groups", Spans.of_lengths((5, 1, 30), (9, 4, 90), causal=True), (4, 1, 128)),
    )
    for label, spans, (heads, groups, size) in cases:
        q = _normal(spans.rows, heads, size)
        k, v = (_normal(spans.key_rows, groups, size, seed=seed) for seed in (1, 2))
        yield Operation(
            f"attention, {label}", "_attend", lambda o, q, k, v, s=spans: o.attention(q, k, v, s), (q, k, v), 9,
            spans=spans,
        )  # fmt: skip


def _vocabulary() -> Iterator[Operation]:
    h, weight = _normal(37, 64), _normal(500, 64, seed=1)
    labels = np.random.default_rng(2).integers(0, 500, 37).astype(np.int32)
    for name, hook in (("linear_cross_entropy", "_cross_entropy_block"), ("linear_logprobs", "linear_logprobs")):
        yield Operation(
            name, hook, lambda o, h, w, n=name: _as_tuple(getattr(o, n)(h, w, o.from_numpy(labels))), (h, weight), 14
        )


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


# -- comparing --------------------------------------------------------------------------------------------------------


def _check(backend: Backend, operation: Operation, dtype: str) -> Check:
    composed = composed_of(backend)
    inputs = [backend.ops.from_numpy(array, dtype) for array in operation.arrays]
    ours = _results(backend, backend.ops, operation, inputs)
    wide = [backend.ops.cast(x, "float32") for x in inputs]
    expected = _results(backend, composed, operation, wide)
    path = maker(backend.ops, operation.hook)
    takes = getattr(backend.ops, "_takes", None)
    if operation.spans and takes and not takes(inputs[0], operation.spans.seeing[0]):
        path = "composed: the kernel does not take it"
    pairs = list(zip(ours, expected, strict=True))
    return compared(PART, f"{operation.name} {dtype}", pairs, tolerance(dtype, operation.roundings), path)


def _results(backend: Backend, ops: Ops, operation: Operation, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """Results, and gradients to all inputs."""
    results = operation.run(ops, *inputs)
    arrays = [backend.to_numpy(x) for x in results]
    if not operation.differentiable:
        return arrays
    cotangent = ops.from_numpy(np.asarray(_normal(*arrays[0].shape, seed=9), np.float32))

    def pulled(*tensors: Tensor) -> Tensor:
        return ops.sum(ops.cast(operation.run(ops, *tensors)[0], "float32") * cotangent)

    _, gradients = backend.autograd.value_and_grad(pulled, inputs)
    return arrays + [backend.to_numpy(gradient) for gradient in gradients]


def maker(implementation: Any, hook: str) -> str:
    """The module whose class has the last word on `hook`: `kernels_npu`, or `composed` where nobody overrides it."""
    owner = next(kind for kind in type(implementation).__mro__ if hook in vars(kind))
    package, _, module = owner.__module__.rpartition(".")
    return "composed" if package.endswith("composed") and module != "fused_attention" else _named(implementation, owner)


def _named(implementation: Any, owner: type) -> str:
    """A class of core/composed that calls kernels is named after those that it calls."""
    named = type(implementation) if owner.__module__.endswith("fused_attention") else owner
    return named.__module__.rpartition(".")[2]


def _check_cache(backend: Backend, dtype: str) -> Check:
    """A prompt, a chunk and single rows in blocks that lie in order and in any order."""
    composed = composed_of(backend)
    pairs = []
    for scattered in (False, True):
        ours = _cached(backend.kv_cache, backend.ops, dtype, dtype, scattered)
        expected = _cached(ComposedKVCache(composed), composed, dtype, "float32", scattered)
        pairs += list(zip(ours, expected, strict=True))
    path = maker(backend.kv_cache, "attention_cached")
    return compared(PART, f"cached attention {dtype}", pairs, tolerance(dtype, 6), path)


def _cached(cache: KVCache, ops: Ops, rounded: str, dtype: str, scattered: bool) -> list[np.ndarray]:
    """What the passes give: inputs are rounded to one dtype, and held and computed in the other."""
    size, heads, groups, width = cache.block_size, 4, 2, 128
    order = np.arange(8) if not scattered else np.array([5, 2, 7, 0, 3, 6, 1, 4])
    tables = order.reshape(2, 4).astype(np.int32)
    store = cache.cache_create(layers=1, blocks=8, block_size=size, kv_heads=groups, head_size=width, dtype=dtype)
    before, outs = np.zeros(2, np.int64), []
    for number, new in enumerate(((70, 9), (1, 40), (1, 1))):
        append = Append(tables, before, np.array(new))
        plan = cache.plan(store, append)
        q, k, v = (
            ops.cast(ops.from_numpy(_normal(append.rows, n, width, seed=10 * number + i), rounded), dtype)
            for i, n in enumerate((heads, groups, groups))
        )
        cache.cache_append(store, 0, k, v, plan)
        outs.append(ops.to_numpy(cache.attention_cached(q, store, 0, plan)))
        before = append.held
    return outs


def _check_adamw(backend: Backend, dtype: str) -> Check:
    """Three updates with a gradient scale, which some fused kernels take and do not use."""
    start, scale, lr, decay, (b1, b2), eps = _normal(7, 33), 0.25, 1e-2, 0.1, (0.9, 0.95), 1e-8
    ops = backend.ops
    parameter = Parameter("weight", ops.from_numpy(start, dtype))
    expected = backend.to_numpy(parameter.tensor).astype(np.float64)
    groups = [ParameterGroup([parameter], weight_decay=decay)]
    state = backend.optimizer.create(groups)
    first, second = np.zeros((2, *start.shape))
    for step in range(1, 4):
        gradient = _normal(*start.shape, seed=step)
        parameter.main_grad = ops.from_numpy(gradient)
        backend.optimizer.step(state, groups, lr=lr, betas=(b1, b2), eps=eps, grad_scale=scale)
        g = gradient.astype(np.float64) * scale
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g * g
        root = np.sqrt(second / (1 - b2**step)) + eps
        expected = expected * (1 - lr * decay) - lr * (first / (1 - b1**step)) / root
    pair = [(backend.to_numpy(parameter.tensor), expected)]
    return compared(PART, f"adamw {dtype}", pair, tolerance(dtype, 1.5), maker(backend.optimizer, "step"))
