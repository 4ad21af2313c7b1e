"""What one process of the full examination does: parts of it on one device, each line of the outcome at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duetvl.core.backend import Backend, load_backend
from duetvl.core.composed import ComposedKVCache
from duetvl.core.errors import DuetvlError, first_line
from duetvl.core.ranks import Ranks
from duetvl.doctor.between import check_between
from duetvl.doctor.check import Check
from duetvl.doctor.operations import check_operations, composed_of
from duetvl.doctor.speed import measure_speed
from duetvl.doctor.tiny import run_tiny

MARK = "duetvl-doctor "


def work(backend: str, device: str, parts: Sequence[str], composed: bool, dtypes: Sequence[str]) -> None:
    """Run the parts in order. Each ends with a line of its name, and an error in one is not the end of the others."""
    try:
        loaded = load_backend(backend, device)
        _tell("device", _description(loaded))
    except DuetvlError as error:
        _tell("refused", str(error).removesuffix("; see `duetvl doctor`"))
        return
    except Exception as error:  # whatever a half-installed framework raises
        _tell("refused", f"{type(error).__name__}: {first_line(error)}")
        return
    if composed:
        ops = composed_of(loaded)
        loaded = replace(loaded, ops=ops, kv_cache=ComposedKVCache(ops))
    for part in parts:
        try:
            for entry in _entries(loaded, part, dtypes):
                _tell("row" if isinstance(entry, Check) else "run", _plain(entry))
        except Exception as error:  # whatever a kernel raises
            failed = Check(part, "as a whole", False, detail=f"{type(error).__name__}: {first_line(error)}")
            _tell("row", failed.to_json())
        _tell("done", part)


def take_part(backend: str, device: str, target: Path) -> int:
    """As one of the ranks: check the collectives between them; rank 0 writes what all of them found."""
    loaded = load_backend(backend, device)
    loaded.collectives.start()
    rows = list(check_between(loaded))
    mine = [row.to_json() for row in rows]
    of_all = loaded.collectives.gather_objects([entry for entry, row in zip(mine, rows, strict=True) if not row.passed])
    if Ranks(loaded.collectives).index == 0:
        others = [
            {**entry, "name": f"{entry['name']}, rank {n}"} for n, bad in enumerate(of_all[1:], 1) for entry in bad
        ]
        target.write_text(json.dumps(mine + others), encoding="utf-8")
    loaded.collectives.barrier()
    loaded.collectives.stop()
    return 0


def _entries(backend: Backend, part: str, dtypes: Sequence[str]) -> Iterator[Any]:
    if part == "operations":
        yield from check_operations(backend)
    elif part == "tiny":
        yield from run_tiny(backend, dtypes or ("float32", half_of(backend)))
    else:
        yield from measure_speed(backend)


def _description(backend: Backend) -> dict[str, Any]:
    device = backend.device
    return {
        "framework": backend.capabilities.framework, "name": device.name, "product": device.product,
        "memory": device.total_memory(), "count": device.count(), "cpus": os.cpu_count(),
        "half": half_of(backend),
    }  # fmt: skip


def half_of(backend: Backend) -> str:
    """The half type that models are run in on this device."""
    return "bfloat16" if backend.device.supports("bfloat16") else "float16"


def _plain(entry: Any) -> Any:
    return entry.to_json() if isinstance(entry, Check) else entry


def _tell(kind: str, value: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps([kind, value])}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    work(**json.loads(sys.argv[1]))
