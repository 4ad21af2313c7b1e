"""What starting costs: no framework is imported before one is asked for.

Times are printed (`pytest -s`), not asserted: on 2 shared cores `import duetvl` takes 4 to 8 ms and `duetvl --help`
60 to 100 ms, 30 to 70 of which are python's own.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "torch_npu", "mindspore", "transformers", "tokenizers", "safetensors")
SECONDARY = ("numpy", "pydantic", "yaml", "PIL", "matplotlib", "tensorboardX", "tqdm")
REPORT = """
import json, sys, time
begun = time.perf_counter()
import duetvl
seconds = time.perf_counter() - begun
{then}
sys.stderr.write(json.dumps([seconds, sorted(sys.modules)]))
"""


def start(then: str = "") -> tuple[float, set[str]]:
    """Seconds of `import duetvl` in a new process, and the top-level modules there after `then`."""
    code = REPORT.format(then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stderr.splitlines()[-1])  # frameworks may warn before it
    return seconds, {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("then", ["", "duetvl.__version__, dir(duetvl), repr(duetvl)", "import duetvl.core.errors"])
def test_the_import_loads_no_framework(then):
    seconds, modules = start(then)
    print(f"import duetvl: {1000 * seconds:.1f} ms")  # noqa: T201
    assert not modules & {*FRAMEWORKS, *SECONDARY}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_loads_no_framework(option):
    then = f"from duetvl.cli import main\ntry: main([{option!r}])\nexcept SystemExit as end: assert end.code == 0"
    _, modules = start(then)
    assert not modules & {*FRAMEWORKS, *SECONDARY}


def test_names_of_the_api_load_no_backend():
    """A processor is numpy and tokenizers; the framework comes with `load_backend`."""
    _, modules = start("duetvl.load_model, duetvl.load_processor, duetvl.Sample, duetvl.train")
    assert "numpy" in modules
    assert not modules & {"torch", "torch_npu", "mindspore", "transformers", "matplotlib", "tensorboardX"}


@pytest.mark.parametrize(("backend", "others"), [("torch_npu", {"mindspore"}), ("mindspore", {"torch", "torch_npu"})])
def test_a_backend_loads_its_own_framework_alone(backend, others):
    pytest.importorskip({"torch_npu": "torch"}.get(backend, backend))
    _, modules = start(f"duetvl.load_backend({backend!r}, device='cpu')")
    assert not modules & others


def test_a_backward_pass_of_torch_imports_no_symbols():
    """sympy comes with torch's symbolic shapes, which no step of ours needs; it takes as long as half of torch."""
    pytest.importorskip("torch")
    code = """
import numpy as np, duetvl
backend = duetvl.load_backend("torch_npu", device="cpu")
x = backend.ops.from_numpy(np.ones((2, 3), np.float32))
_, tape = backend.autograd.run_stage(lambda leaves, x: x * x, [x], [])
assert (backend.autograd.backward(tape, [x])[0] == 2.0).all()
"""
    _, modules = start(code)
    assert "torch" in modules and "sympy" not in modules
