"""The program on MindSpore as Ascend has it: AscendOps with references as kernels, and the functions it inherits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("DUETVL_REAL_TORCH_NPU"):
    pytest.skip("the environment of torch_npu has no MindSpore", allow_module_level=True)
pytest.importorskip("mindspore")
pytest.importorskip("torch")

from distributed.world import _environment, _free_port

from duetvl.core.backend import load_backend

from . import on_cpu
from .mindspore_references import CALLS, STAND_INS, stand_in
from .two_ranks import LAYOUTS
from .whole_runs import Here, assert_alike, assert_same_tokens

TWO_RANKS = Path(__file__).with_name("two_ranks.py")
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


def test_an_evaluation_by_fused_kernels(here: Here, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("with --full")
    answers = here.evaluated("ascend_on_cpu", "qwen2_5_vl", tmp_path / "fused")
    expected = here.evaluated("torch_npu", "qwen2_5_vl", tmp_path / "cpu")
    assert len(answers) == len(expected) == 8
    assert sum(one != other for one, other in zip(answers, expected, strict=True)) <= 1  # float16: a tie may fall


def test_two_ranks_are_one_process(here: Here, tmp_path: Path, full: bool) -> None:
    """Our transport in the place of hccl; one start for all layouts."""
    if not full:
        pytest.skip("with --full")
    launcher = [Path(sys.executable).with_name("msrun"), "--worker_num=2", "--local_worker_num=2", "--join=True"]
    launcher += [f"--master_port={_free_port()}", f"--log_dir={tmp_path / 'log'}"]
    command = [*launcher, TWO_RANKS, here.directory, tmp_path, "float16", "mindspore"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=_environment(), cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    curves = np.load(tmp_path / "curves.npz")
    assert set(curves) == set(LAYOUTS)
    backend = load_backend("torch_npu", "cpu")
    for name, (kind, family, _) in LAYOUTS.items():
        expected = here.curve(backend, kind, family, "float16", tmp_path / f"{kind} {family}")
        assert_alike(curves[name], expected, "float16")
