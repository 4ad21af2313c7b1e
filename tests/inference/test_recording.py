"""Decoding that is recorded and repeated, on a CPU: the operators of a pass, as torch dispatched them, run again.

Only the graph itself is a stand-in. No Python of the model runs in a repetition, so whatever does not reach the tensors
of the recording gives the tokens of an earlier pass. Not run on hardware: there benchmarks/gpu.py measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_run

pytest.importorskip("torch")

import torch
from conformance.flash_references import flash_attention_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duetvl.backends.torch_npu.autograd import TorchAutograd
from duetvl.backends.torch_npu.kernels_cuda import CudaKVCache, CudaOps
from duetvl.core.backend import Backend, load_backend
from duetvl.core.batch import Sample
from duetvl.core.kv_cache import AT_ONCE
from duetvl.inference.engine import Engine
from duetvl.inference.padding import DecodePadding
from duetvl.inference.request import Request
from duetvl.models.qwen_vl.loading import load_model

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


class Tape(TorchDispatchMode):
    """Keeps every operator with its tensors; `replay` runs them again and puts the results into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for operator, args, kwargs, results in self.calls:
            for again, result in zip(tree_leaves(operator(*args, **kwargs)), results, strict=True):
                if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():  # no view, not in place
                    result.copy_(again)


class Tapes:
    """What `Graphs` is on a card; `broken`: a repetition does not follow what is put into the tensors."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded = self.recorded + 1
        with torch.no_grad(), Tape() as tape:
            out = run()

        def replay() -> Any:
            self.replayed = self.replayed + 1
            if not self.broken:
                with torch.no_grad():
                    tape.replay()
            return out

        return replay


@pytest.fixture(scope="module")
def cuda() -> Iterator[Backend]:
    """What runs on a card with flash attention, on a CPU."""
    backend = load_backend("torch_npu", "cpu")
    ops = CudaOps(TorchAutograd(), torch.device("cpu"))
    ops.capability = (9, 0)
    capabilities = replace(backend.capabilities, steady_rows=False)
    with flash_attention_on_cpu():
        yield replace(backend, ops=ops, kv_cache=CudaKVCache(ops), capabilities=capabilities)


@pytest.fixture(scope="module")
def model(cuda: Backend, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tiny_run.write_model(tmp_path_factory.mktemp("recording") / "model", std=0.2, **SIZES)
    return load_model(directory, backend=cuda, dtype="float16")


def tokens(model: Any, tapes: Tapes, *, record: bool) -> dict[str, list[int]]:
    """Of eleven prompts that come and go, five at once: so passes of several sizes, of long and short sequences."""
    draw = np.random.default_rng(3)
    model.backend.kv_cache.recording = lambda: tapes
    engine = Engine(model, cache_tokens=5120, max_sequences=5, record=record)
    answers: dict[str, list[int]] = {}
    for number in range(11):
        prompt = Sample(draw.integers(5, 60, 4 + 29 * (number % 4)))
        request = Request(prompt, max_new_tokens=6 + 5 * (number % 3), stop_ids=frozenset())
        answers[engine.submit(request)] = []
    while engine.busy:
        for delta in engine.step():
            assert delta.completion is None or delta.completion.error is None, delta.completion
            answers[delta.id].extend(delta.token_ids)
    return answers


def test_repeated_passes_give_the_same_tokens(model: Any) -> None:
    unused, tapes = Tapes(), Tapes()
    expected = tokens(model, unused, record=False)
    assert unused.recorded == 0 and len({tuple(answer) for answer in expected.values()}) > 8
    assert tokens(model, tapes, record=True) == expected
    assert tapes.recorded >= 2 and tapes.replayed > 10


def test_a_recording_that_does_not_follow_is_given_up(model: Any) -> None:
    tapes = Tapes(broken=True)
    with pytest.warns(UserWarning, match="passes are not recorded, as tried here: a repetition gives other numbers"):
        answers = tokens(model, tapes, record=True)
    assert tapes.replayed == 1
    assert answers == tokens(model, Tapes(), record=False)


def test_what_cannot_be_recorded_is_run(model: Any, cuda: Backend) -> None:
    def refusing(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when capturing\nmore")

    with pytest.warns(UserWarning, match="not recorded, as tried here: operation not permitted when capturing"):
        assert tokens(model, refusing, record=True) == tokens(model, Tapes(), record=False)
    assert load_backend("torch_npu", "cpu").kv_cache.recorder(None) is AT_ONCE


def test_passes_are_padded_to_sizes_that_are_recorded() -> None:
    padding = DecodePadding((1, 2, 4, 8, 16))
    assert [padding.pads(count, count) for count in (1, 3, 4, 5, 16, 17)] == [0, 1, 0, 3, 0, 0]
    assert padding.pads(20, 3) == 0
    assert padding.most == 7
