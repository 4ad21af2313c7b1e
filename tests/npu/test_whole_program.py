"""The program through NpuOps, NpuKVCache and NpuOptimizer on CPU tensors: as on a card, but for the kernels' numbers.

Only the kernels are references; schemas, and all that calls them, are what runs on a card.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from distributed.world import _free_port
from tiny_run import FAMILIES

from duetvl.core.backend import load_backend

from . import on_cpu
from .references import CALLS
from .schemas import SCHEMAS
from .two_ranks import LAYOUTS
from .whole_runs import Here, assert_alike, assert_same_tokens

TWO_RANKS = Path(__file__).with_name("two_ranks.py")
INFERENCE = {"npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache"}
TRAINING = set(SCHEMAS) - INFERENCE
FORWARD = {name for name in TRAINING if "_grad" not in name and "backward" not in name}
RUNS = [
    ("sft", "qwen2_5_vl", "float32"),
    ("sft", "qwen2_vl", "bfloat16"),
    ("lora", "qwen2_5_vl", "bfloat16"),
    ("lora", "qwen2_vl", "float32"),
    ("dpo", "qwen2_5_vl", "float32"),
    ("dpo", "qwen2_vl", "float16"),
]


@pytest.fixture(scope="module")
def here(operators: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """Small models and data, and a backend `npu_on_cpu` on the path."""
    with pytest.MonkeyPatch.context() as patch:
        site = on_cpu.entry_point(tmp_path_factory.mktemp("site"), {"npu_on_cpu": "torch_backend"})
        patch.syspath_prepend(str(site))
        yield Here.written(tmp_path_factory.mktemp("npu"))


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Where kernels are given up a warning says so, and these tests would compare one path with itself."""
    CALLS.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the fast attention|torch's own functions instead")
        yield


@pytest.mark.parametrize(("kind", "family", "dtype"), RUNS)
def test_training_is_that_of_the_cpu(here: Here, tmp_path: Path, kind: str, family: str, dtype: str) -> None:
    backend = load_backend("npu_on_cpu")
    with on_cpu.optimizer_of_torch_npu():
        curve = here.curve(backend, kind, family, dtype, tmp_path / "npu")
    assert set(CALLS) == TRAINING
    assert_alike(curve, here.curve(load_backend("torch_npu", "cpu"), kind, family, dtype, tmp_path / "cpu"), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_cpu(here: Here, tmp_path: Path, family: str) -> None:
    answers = here.answers("npu_on_cpu", family, tmp_path / "npu.jsonl")
    assert set(CALLS) == FORWARD | INFERENCE
    assert_same_tokens(answers, here.answers("torch_npu", family, tmp_path / "cpu.jsonl"))


def test_an_evaluation_is_that_of_the_cpu(here: Here, tmp_path: Path) -> None:
    answers = here.evaluated("npu_on_cpu", "qwen2_5_vl", tmp_path / "npu")
    assert set(CALLS) == FORWARD | INFERENCE
    expected = here.evaluated("torch_npu", "qwen2_5_vl", tmp_path / "cpu")
    assert len(answers) == len(set(zip(range(8), expected, strict=True))) == 8
    assert sum(one != other for one, other in zip(answers, expected, strict=True)) <= 1  # float16: a tie may fall


def test_two_ranks_are_one_process(here: Here, tmp_path: Path) -> None:
    """gloo in the place of hccl; one start for all layouts."""
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node=2", f"--master-port={_free_port()}", TWO_RANKS, here.directory, tmp_path]
    command += ["float32", "torch_npu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    curves = np.load(tmp_path / "curves.npz")
    assert set(curves) == set(LAYOUTS)
    backend = load_backend("torch_npu", "cpu")
    for name, (kind, family, _) in LAYOUTS.items():
        assert_alike(
            curves[name], here.curve(backend, kind, family, "float32", tmp_path / f"{kind} {family}"), "float32"
        )
