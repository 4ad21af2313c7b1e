"""What is installed here, and what of it works. Each backend and device is tried in a process of its own."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    ("duetvl", "duetvl"),
    ("numpy", "numpy"),
    ("torch", "torch"),
    ("torch_npu", "torch-npu"),
    ("mindspore", "mindspore"),
    ("transformers", "transformers"),
    ("tokenizers", "tokenizers"),
    ("safetensors", "safetensors"),
    ("pillow", "pillow"),
    ("av", "av"),
    ("pydantic", "pydantic"),
    ("matplotlib", "matplotlib"),
    ("tensorboardX", "tensorboardX"),
)
TIMEOUT_S = 120
_MARK = "duetvl-probe "
_ADVICE = {
    ("torch_npu", "cpu"): "pip install 'duetvl[torch]'",
    ("torch_npu", "cuda"): "needs an NVIDIA GPU with its driver, and a PyTorch built for CUDA (pytorch.org)",
    ("torch_npu", "npu"): "needs an Ascend NPU with its driver and CANN, and pip install 'duetvl[npu]'",
    ("mindspore", "cpu"): "pip install 'duetvl[mindspore]' (it pins numpy<2)",
    ("mindspore", "ascend"): "needs an Ascend NPU with its driver and CANN, and MindSpore's wheel for Ascend",
}


@dataclass(frozen=True)
class Finding:
    """What came of trying one backend on one device."""

    backend: str
    device: str
    works: bool
    detail: str


def report() -> Iterator[tuple[str, bool]]:
    """Lines to show, and for each whether it is about a backend that works."""
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})", False
    for name, package in PACKAGES:
        yield f"  {name:14}{installed(package)}", False
    yield "backends (each tried in a process of its own: a matrix product and its gradient)", False
    from duetvl.core.backend import known_devices

    places = [(backend, device) for backend in _backends() for device in known_devices(backend) or ("auto",)]
    with ThreadPoolExecutor(2) as pool:
        for finding in pool.map(lambda place: examine(*place), places):
            yield _line(finding), finding.works


def examine(backend: str, device: str) -> Finding:
    """Try a backend on a device, in a new process: a crash, a hang or noise there does no harm here."""
    code = f"from duetvl.doctor import probe; probe({backend!r}, {device!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Finding(backend, device, False, f"no answer within {TIMEOUT_S} s")
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return Finding(**json.loads(line.removeprefix(_MARK)))
    return Finding(backend, device, False, cause_of_death(done))


def probe(backend: str, device: str) -> None:
    """Try a backend on a device in this process, and write a Finding to standard output."""
    from duetvl.core.errors import DuetvlError, first_line

    try:
        found = Finding(backend, device, True, _try(backend, device))
    except DuetvlError as error:
        found = Finding(backend, device, False, first_line(error).removesuffix("; see `duetvl doctor`"))
    except Exception as error:  # whatever a half-installed framework raises
        found = Finding(backend, device, False, f"{type(error).__name__}: {first_line(error)}")
    sys.stdout.write(f"\n{_MARK}{json.dumps(asdict(found))}\n")
    sys.stdout.flush()


def _try(backend: str, device: str) -> str:
    import numpy as np

    from duetvl.core.backend import load_backend
    from duetvl.core.errors import BackendError

    chosen = load_backend(backend, device)
    ops = chosen.ops
    a, b = (np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32) for seed in (0, 1))
    total, (gradient, _) = chosen.autograd.value_and_grad(
        lambda x, y: ops.sum(ops.matmul(x, y)), [ops.from_numpy(a), ops.from_numpy(b)]
    )
    right = np.allclose(chosen.to_numpy(total), (a @ b).sum(), rtol=1e-3, atol=1e-3)
    if not (right and np.allclose(chosen.to_numpy(gradient), np.tile(b.sum(1), (8, 1)), rtol=1e-3, atol=1e-3)):
        raise BackendError(f"{chosen.capabilities.framework} computes wrong numbers")
    memory = chosen.device.total_memory() / 2**30
    return f"{chosen.capabilities.framework}, {chosen.device.name}, {memory:.0f} GiB"


def cause_of_death(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended, in a line."""
    if done.returncode < 0:
        return f"the process died of {signal.Signals(-done.returncode).name}"
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return f"the process ended with status {done.returncode}: {''.join(last)}"


def _line(finding: Finding) -> str:
    place = f"  {finding.backend:12}{finding.device:8}"
    if finding.works:
        return f"{place}works    {finding.detail}"
    advice = None if "pip install" in finding.detail else _ADVICE.get((finding.backend, finding.device))
    return f"{place}-        {finding.detail}" + (f"\n{'':22}         -> {advice}" if advice else "")


def installed(package: str) -> str:
    """The version of a package, or that it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backends() -> list[str]:
    from duetvl.core.backend import known_backends

    return sorted(known_backends(), key=lambda name: (name not in ("torch_npu", "mindspore"), name != "torch_npu"))
