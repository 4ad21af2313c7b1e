"""Ranks that share the work of data, without a framework: threads of this process, or processes beside each other."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from duetvl.core.mesh import Mesh
from duetvl.data.loading.peers import Peers

T = TypeVar("T")


def together(mesh: Mesh, fn: Callable[[Peers], T]) -> list[T]:
    """What `fn` gives on each rank of the mesh, the ranks being threads."""
    barrier, said = threading.Barrier(mesh.size), dict[int, Any]()

    def run(rank: int) -> T:
        def gather(value: Any) -> list[Any]:
            said[rank] = value
            barrier.wait(30)
            return [said[other] for other in range(mesh.size)]

        peers = Peers.meet(mesh, rank, "127.0.0.1", gather)
        try:
            return fn(peers)
        finally:
            peers.close()

    with ThreadPoolExecutor(mesh.size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(mesh.size)]]


def gather_by_files(place: Path, rank: int, size: int, value: Any) -> list[Any]:
    """Every process's value, by way of files in a directory that is used once."""
    part = place / f"{rank}.part"
    part.write_bytes(pickle.dumps(value))
    part.rename(place / str(rank))
    deadline = time.monotonic() + 60
    while not all((place / str(other)).exists() for other in range(size)):
        assert time.monotonic() < deadline, "a process has not come"
        time.sleep(0.01)
    return [pickle.loads((place / str(other)).read_bytes()) for other in range(size)]
