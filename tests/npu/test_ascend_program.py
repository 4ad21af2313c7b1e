"""The program on MindSpore as Ascend has it: AscendOps with references as kernels, and the functions it inherits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("DUETVL_REAL_TORCH_NPU"):
    pytest.skip("the environment of torch_npu has no MindSpore", allow_module_level=True)
pytest.importorskip("mindspore")
pytest.importorskip("torch")

from duetvl.core.backend import load_backend

from . import on_cpu
from .mindspore_references import CALLS, STAND_INS, stand_in
from .whole_runs import Here, assert_alike, assert_same_tokens

OPERATORS = {operator for operator, _ in STAND_INS.values()} | {"npu_rms_norm"}
SMALL = "train.global_batch=2"  # MindSpore takes three times as long
RUNS = [("sft", "qwen2_vl"), ("dpo of adapters", "qwen2_5_vl")]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """Small models and data, references in the kernels' places, and the backend `ascend_on_cpu` on the path."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        site = on_cpu.entry_point(tmp_path_factory.mktemp("site"), {"ascend_on_cpu": "mindspore_backend"})
        patch.syspath_prepend(str(site))
        yield Here.written(tmp_path_factory.mktemp("ascend"))


@pytest.mark.parametrize(("kind", "family"), RUNS)
def test_training_on_the_functions_that_ascend_inherits(here: Here, tmp_path: Path, kind: str, family: str) -> None:
    curve = here.curve(on_cpu.mindspore_inherited(), kind, family, "float32", tmp_path / "inherited", SMALL)
    expected = here.curve(load_backend("torch_npu", "cpu"), kind, family, "float32", tmp_path / "cpu", SMALL)
    assert_alike(curve, expected, "float32")


@pytest.mark.parametrize(("kind", "family"), RUNS)
def test_training_by_fused_kernels(here: Here, tmp_path: Path, kind: str, family: str) -> None:
    CALLS.clear()
    curve = here.curve(on_cpu.mindspore_backend(), kind, family, "float16", tmp_path / "fused", SMALL)
    assert set(CALLS) == OPERATORS
    expected = here.curve(load_backend("torch_npu", "cpu"), kind, family, "float16", tmp_path / "cpu", SMALL)
    assert_alike(curve, expected, "float16")


def test_answers_by_fused_kernels(here: Here, tmp_path: Path) -> None:
    CALLS.clear()
    answers = here.answers("ascend_on_cpu", "qwen2_5_vl", tmp_path / "fused.jsonl")
    assert {"reshape_and_cache", "PagedAttention", "npu_fusion_attention"} < set(CALLS)
    assert_same_tokens(answers, here.answers("torch_npu", "qwen2_5_vl", tmp_path / "cpu.jsonl"))
