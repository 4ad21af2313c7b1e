"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Tensors are tiny here: a second thread only waits, and on a busy machine it makes a test five times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of processes are started: without compiled files each would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import numpy as np
import oracle
import pytest
from frameworks import FRAMEWORKS, need
from hypothesis import settings

from duetvl.core.backend import Backend, load_backend
from duetvl.core.batch import Sample
from duetvl.core.errors import BackendError

# A shell starts a background job with Ctrl-C ignored, which its children inherit; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run; `--hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ours."""
    parser.addoption("--full", action="store_true", help="what takes minutes as well: 50 kills instead of 5")


def skip_for_want_of_a_framework(error: BackendError) -> None:
    """Skip where a test asked for a backend whose framework is not installed, by whatever way."""
    for name, framework in FRAMEWORKS.items():
        if find_spec(framework) is None and str(error).startswith(f"backend {name} needs "):
            pytest.skip(f"{framework} is not installed")
    if str(error).startswith("recomputation needs mindspore 2.10"):
        pytest.skip("mindspore 2.9 does not recompute")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """See `skip_for_want_of_a_framework`."""
    try:
        return (yield)
    except BackendError as error:
        skip_for_want_of_a_framework(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """See `skip_for_want_of_a_framework`."""
    try:
        return (yield)
    except BackendError as error:
        skip_for_want_of_a_framework(error)
        raise


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` was given."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session", params=list(FRAMEWORKS))
def be(request: pytest.FixtureRequest) -> Backend:
    """Each backend that is installed, on the CPU, or on the device of DUETVL_TEST_DEVICE."""
    need(request.param)
    return load_backend(request.param, device=os.environ.get("DUETVL_TEST_DEVICE", "cpu"))


class TinyModels:
    """The models of `oracle.MODELS` by name: made and saved by transformers once, then read by the tests that ask.

    What `ours` answers is shared between tests: leave its weights and flags as they are, or load one of your own.
    """

    def __init__(self, root: Path):
        self.root = root
        self.ours = cache(self._ours)
        self.theirs = cache(lambda name: oracle.load(self.directory(name)))
        self._logits: dict[tuple[str, str], np.ndarray] = {}

    def directory(self, name: str) -> Path:
        """A model directory that transformers wrote."""
        path = self.root / name
        if not path.exists():
            oracle.make(name).save_pretrained(path)
        return path

    def logits(self, name: str, kind: str) -> np.ndarray:
        """Transformers' logits (T, vocabulary) of a sample of `oracle.SAMPLES`."""
        if (name, kind) not in self._logits:
            self._logits[name, kind] = oracle.logits(self.theirs(name), oracle.SAMPLES[kind])
        return self._logits[name, kind]

    def _ours(self, name: str, backend: Backend, dtype: str = "float32") -> Any:
        import duetvl

        return duetvl.load_model(self.directory(name), backend=backend, dtype=dtype)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Tiny random models of both families."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def samples() -> dict[str, Sample]:
    """Text, one image, three images of odd sizes, a video, an image and a video."""
    return oracle.SAMPLES
