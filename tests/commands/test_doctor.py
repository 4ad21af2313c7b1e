"""`duetvl doctor --full`: all of it on a CPU, and what it says of kernels that are wrong, crash or hang."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, need

from duetvl.cli import main
from duetvl.core.backend import load_backend
from duetvl.core.errors import BackendError
from duetvl.doctor import processes
from duetvl.doctor.check import Check, compared
from duetvl.doctor.operations import check_operations
from duetvl.doctor.processes import examine_in_process
from duetvl.doctor.tiny import compare_tiny


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_a_cpu_passes_everything(
    backend: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With one framework alone too: the processes load no other. Operations of torch are looked at below."""
    need(backend)
    if backend == "torch_npu" and find_spec("mindspore") is not None and not full:
        pytest.skip("with --full")
    (other,) = set(FRAMEWORKS.values()) - {FRAMEWORKS[backend]}
    (tmp_path / f"{other}.py").write_text("raise ImportError('not for this backend')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    file, said = tmp_path / "report.json", []
    monkeypatch.setattr("duetvl.cli._say", lambda line, *_: said.append(line))
    words = ["doctor", "--full", "--device", "cpu", "--backend", backend, "-o", str(file)]
    assert main(words) == 0, (said, capfd.readouterr().err)
    report = json.loads(file.read_text())
    checks = [Check.from_json(entry) for entry in report["checks"]]
    assert report["passed"]
    assert {check.part for check in checks} == {"operations", "speed", "training", "generation"}
    attention = next(check for check in checks if check.name == "attention, causal, 64 bfloat16")
    assert (attention.detail, attention.passed) == ("kernels_cpu", True)
    assert 0 < attention.difference < attention.allowed
    assert said[-1] == f"all {len(checks)} checks passed on {backend} cpu"
    assert [check.line() for check in checks] == said[1:-2]
    assert report["device"]["memory"] > 2**28
    assert report["packages"]["numpy"] == np.__version__


def test_a_wrong_kernel_is_named() -> None:
    need("torch_npu")
    backend = load_backend("torch", "cpu")
    right = backend.ops.swiglu
    backend.ops.swiglu = lambda gate, up: right(gate, up) * 1.1

    def fused(*_: Any) -> Any:
        raise RuntimeError("no such operator\nat line 1")

    backend.ops._fused = fused
    failed = {check.name: check for check in check_operations(backend) if not check.passed}
    assert {name.rpartition(" ")[0].partition(",")[0] for name in failed} == {"swiglu", "attention"}
    assert failed["attention, causal, 64 float16"].detail == "RuntimeError: no such operator"
    assert failed["swiglu float32"].difference == pytest.approx(0.1, rel=1e-3)


def test_tiny_runs_that_differ() -> None:
    run = {
        "family": "qwen2_vl", "dtype": "float32", "training": [[7.0, 1.0]],
        "answers": [[[5, -1.0, 0.5], [6, -2.0, 3.0]]],
    }  # fmt: skip
    assert all(check.passed for check in compare_tiny(run, run))
    worse = {**run, "training": [[7.01, 1.0]], "answers": [[[5, -1.0, 0.5], [9, -2.0, 3.0]]]}
    training, generation = compare_tiny(worse, run)
    assert not training.passed and training.difference == pytest.approx(0.01 / 7)
    assert not generation.passed and generation.difference == 3.0
    near = {**run, "answers": [[[5, -1.0, 0.5], [6, -2.0, 1e-4]]]}
    assert list(compare_tiny(worse, near))[1].passed


def test_not_a_number_never_passes_and_survives_json() -> None:
    check = compared("operations", "rope", [(np.array([1.0, np.nan]), np.ones(2))], 1.0)
    assert not check.passed
    assert Check.from_json(json.loads(json.dumps(check.to_json()))) == check


def told(code: str, monkeypatch: pytest.MonkeyPatch, parts: list[str]) -> Iterator[tuple[str, Any]]:
    """What is made of a process that runs `code` in the worker's place; `parts` are those that are left."""
    start = processes.subprocess.Popen
    head = "import json, os, sys, time\nparts = json.loads(sys.argv[1])['parts']\n"
    head += f"def tell(*words): print({processes.MARK!r} + json.dumps(words), flush=True)\ntell('device', {{}})\n"
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda words, **how: start([sys.executable, "-c", head + code, words[-1]], **how)
    )
    return examine_in_process("torch_npu", "cpu", parts)


def test_a_crash_and_a_hang_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "if parts[0] == 'a': os.kill(os.getpid(), 11)\ntell('done', parts[0])"
    rows = [value for kind, value in told(crash, monkeypatch, ["a", "b"]) if kind == "row"]
    assert [(row.part, row.passed, row.detail) for row in rows] == [("a", False, "the process died of SIGSEGV")]
    monkeypatch.undo()
    monkeypatch.setattr(processes, "LIMIT_S", 0.5)
    rows = [value for kind, value in told("time.sleep(60)", monkeypatch, ["a"]) if kind == "row"]
    assert [row.detail for row in rows] == ["no answer within 0.5 s"]
    monkeypatch.undo()
    with pytest.raises(BackendError, match="torch_npu on cpu: no card"):
        list(told("tell('refused', 'no card')", monkeypatch, ["a"]))


def test_one_line_without_a_card_or_for_words_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    need("torch_npu")
    assert main(["doctor", "--full", "--backend", "torch", "--device", "npu"]) == 2
    error = capsys.readouterr().err
    assert "torch_npu on npu: device 'npu' is not available" in error and error.count("\n") == 1
    assert main(["doctor", "--device", "cpu"]) == 2
    assert "add --full" in capsys.readouterr().err
    assert main(["doctor", "--full", "-o", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
