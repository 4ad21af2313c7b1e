"""One server for each backend, and what its model answers without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_run
from live import Live
from said import Offline, offline, write_adapter

import duetvl
from duetvl.core.backend import Backend


@pytest.fixture(scope="session")
def tiny_model(be: Backend, tmp_path_factory: pytest.TempPathFactory) -> tuple[duetvl.Model, dict[str, Any]]:
    """A model, and an adapter of it."""
    directory = tiny_run.write_model(tmp_path_factory.mktemp("serving") / "tiny", std=0.2)
    model = duetvl.load_model(directory, backend=be)
    write_adapter(duetvl.load_model(directory, backend=be), directory.with_name("adapter"))
    return model, {"other": model.with_adapter(directory.with_name("adapter"))}


@pytest.fixture(scope="session")
def expected(tiny_model: Any) -> Offline:
    """What the model answers before a server's thread has it."""
    return offline(*tiny_model)


@pytest.fixture(scope="session")
def live(tiny_model: Any, expected: Offline) -> Iterator[Live]:
    """A server of both, whose clients are alice and bob."""
    server = Live(*tiny_model)
    yield server
    server.stop()
