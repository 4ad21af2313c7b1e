"""Older versions of torch_npu: what their operators lack is found by their schemas, said once, and done otherwise."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from duetvl.core.kv_cache import Append
from duetvl.core.spans import Spans

torch = pytest.importorskip("torch")

from duetvl.backends.torch_npu.autograd import TorchAutograd  # noqa: E402
from duetvl.backends.torch_npu.kernels_npu import NpuKVCache, NpuOps  # noqa: E402
from duetvl.backends.torch_npu.npu_operators import USED, NpuOperators  # noqa: E402

from .references import registered  # noqa: E402
from .schemas import OLDER, TORCH_NPU  # noqa: E402

CPU = torch.device("cpu")
NO_SCATTER = {
    "2.6.0": "torch_npu has no npu_scatter_pa_kv_cache",
    "2.9.0": "npu_scatter_pa_kv_cache of this torch_npu has no cache_mode",
}


def ops_of(version: str) -> NpuOps:
    return NpuOps(TorchAutograd(), CPU, registered(version))


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_all_is_there_in_the_latest(operators: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops_of(TORCH_NPU).operators.lacking == {}


@pytest.mark.parametrize("version", OLDER)
def test_what_an_older_one_lacks_is_said_in_one_line(version: str) -> None:
    line = f"torch's own functions instead of fused operators for writing to the cache: {NO_SCATTER[version]}"
    with pytest.warns(UserWarning, match=f"^{re.escape(line)}$") as said:
        ops = ops_of(version)
    assert len(said) == 1
    assert ops.by_row is (version != "2.6.0")


@pytest.mark.filterwarnings("ignore:torch's own functions")
@pytest.mark.parametrize("version", OLDER)
def test_older_operators_give_the_same(operators: Any, version: str) -> None:
    results = [everything(ops_of(one)) for one in (TORCH_NPU, version)]
    for new, old in zip(*results, strict=True):
        assert torch.equal(new, old)


def everything(ops: NpuOps) -> list[torch.Tensor]:
    """Attention with its gradients, rotation, and two passes of a cache."""
    spans = Spans.of_lengths([3, 1, 7], causal=True)
    q, k, v = (made(11, heads, 64, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    outputs, tape = ops.autograd.run_stage(lambda _, *x: ops.attention(*x, spans), [q, k, v], ())
    gradients = ops.autograd.backward(tape, [made(11, 4, 64, seed=5), None])
    return [*outputs, *gradients, ops.rope(q, made(11, 32, seed=6), made(11, 32, seed=7)), *cached(ops)]


def cached(ops: NpuOps) -> list[torch.Tensor]:
    cache, outs = NpuKVCache(ops), []
    store = cache.cache_create(layers=1, blocks=4, block_size=128, kv_heads=2, head_size=64, dtype="bfloat16")
    before = np.zeros(2, np.int64)
    for new in ([130, 3], [1, 5]):
        append = Append(np.array([[3, 0], [2, 1]], np.int32), before, np.array(new))
        plan, rows = cache.plan(store, append), sum(new)
        q, k, v = (made(rows, n, 64, seed=n + rows + i, dtype=torch.bfloat16) for i, n in enumerate((4, 2, 2)))
        cache.cache_append(store, 0, k, v, plan)
        outs.append(cache.attention_cached(q, store, 0, plan))
        before = append.held
    return outs


def test_without_any_operator_all_is_composed(operators: Any) -> None:
    """As with a torch_npu that has renamed them: slower, and right."""
    with pytest.warns(UserWarning, match="torch_npu has no npu_fusion_attention; rms_norm: "):
        bare = NpuOps(TorchAutograd(), CPU, SimpleNamespace())
    assert set(bare.operators.lacking) == set(USED)
    for fused, composed in zip(everything(ops_of(TORCH_NPU)), everything(bare), strict=True):
        close = 2e-2 if fused.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(fused, composed, rtol=close, atol=close)
    x, scale = made(5, 12, seed=1), made(12, seed=2)
    full = ops_of(TORCH_NPU)
    torch.testing.assert_close(bare.rms_norm(x, scale, eps=1e-6), full.rms_norm(x, scale, eps=1e-6))
    torch.testing.assert_close(bare.swiglu(x, x), full.swiglu(x, x))


def test_the_arguments_that_are_asked_for_are_those_that_are_named(operators: Any) -> None:
    """`USED` follows the code: an argument that a call names and the table lacks would fail on an older version."""
    called: dict[str, set[str]] = {}
    space = registered(TORCH_NPU)

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **named: Any) -> Any:
                called.setdefault(name, set()).update(named)
                return getattr(space, name)(*given, **named)

            return call

    ops = ops_of(TORCH_NPU)
    ops.npu = Watched()
    everything(ops)
    x, scale = made(5, 12, seed=1), made(12, seed=2)
    ops.autograd.run_stage(lambda _, x, s: ops.rms_norm(x, s, eps=1e-6) + ops.swiglu(x, x), [x, scale], ())
    table = {operator: set(named) for operators in USED.values() for operator, named in operators.items()}
    for operator, named in called.items():
        assert named - {"softmax_layout"} == table[operator], operator
    assert NpuOperators(space).arguments("npu_of_tomorrow") is None
