"""What all ranks of a run must have alike: compared before the first step, and refused with one message."""

from __future__ import annotations

import json
import secrets
import socket
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import duetvl
from duetvl.convert.opening import open_merged
from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError, shown
from duetvl.core.ranks import Ranks
from duetvl.data.sources.fingerprint import Fingerprint, check_same_data
from duetvl.storage.files import write_text
from duetvl.training.feed import DataSets
from duetvl.training.memory import division_of
from duetvl.training.recipe.data_section import DataSection
from duetvl.training.recipe.sections import Recipe
from duetvl.version import __version__

TOKEN: Final = ".ranks"
PATIENCE: Final = 5.0  # seconds until a file that one node has written must be seen by the others


def check_same(ranks: Ranks, what: str, values: Mapping[str, Any], hint: str) -> None:
    """Raise ConfigError, on all ranks, where one has other `values` than rank 0; they are JSON.

    `what` they are of, and what to do about it, complete the message.
    """
    if len(set(ranks.each(_digest(values)))) == 1:
        return
    found = ranks.each((socket.gethostname(), dict(values)))
    ranks.first(lambda: _refuse(found, what, hint))


def _refuse(by_rank: list[tuple[str, dict[str, Any]]], what: str, hint: str) -> None:
    host, expected = by_rank[0]
    other = {rank: found for rank, (_, found) in enumerate(by_rank) if found != expected}
    rank, found = next(iter(other.items()))
    keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    differences = [f"{key} {_short(found, key)}, not {_short(expected, key)}" for key in keys[:3]]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    raise ConfigError(
        f"{places(by_rank, other)} other {what} than rank 0 ({host}): {', '.join(differences)}{more} (of rank {rank}); "
        f"{hint}"
    )


def _short(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "missing"


def places(by_rank: list[tuple[str, Any]], which: Any) -> str:
    """Some ranks and where they run, as the subject of a sentence; `by_rank` has each rank's host first."""
    names = [f"{rank} ({by_rank[rank][0]})" for rank in which]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"ranks {listed} have" if len(names) > 1 else f"rank {listed} has"


def _digest(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True, default=str).encode())


def check_program(ranks: Ranks, recipe: Recipe, backend: Backend) -> None:
    """Every rank runs the same program by the same recipe."""
    program = {
        "duetvl": __version__, "its code": f"{_code():08x}" if ranks.count > 1 else "", "backend": backend.name,
        "framework": backend.capabilities.framework, "device": backend.device.name.partition(":")[0],
    }  # fmt: skip
    check_same(ranks, "software", program, "install the same on every node")
    sections = recipe.model_dump(mode="json")
    flat = {
        f"{name}.{key}": value
        for name, fields in sections.items()
        for key, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    }
    check_same(ranks, "values in its recipe", flat, "start every node with one recipe and the same overrides")


def _code() -> int:
    """A checksum of this program's files: a version's number does not tell two states of a checkout apart."""
    total, root = 0, Path(duetvl.__file__).parent
    for file in sorted(root.rglob("*.py")):
        total = zlib.crc32(file.read_bytes(), zlib.crc32(str(file.relative_to(root)).encode(), total))
    return total


def same_data(ranks: Ranks, data: DataSection) -> DataSets:
    """The data sets of a recipe, which are the same files for every rank. Raises DataError on all."""
    sets, own = ranks.together(lambda: _opened(data))
    found, hosts = zip(*ranks.each((own, socket.gethostname())), strict=True)
    ranks.first(lambda: check_same_data(found, hosts))
    return sets


def _opened(data: DataSection) -> tuple[DataSets, Fingerprint]:
    sets = DataSets(data)
    return sets, sets.fingerprint()


def check_model(ranks: Ranks, recipe: Recipe) -> None:
    """Every rank reads the same model, and it can be divided as the recipe says."""
    if ranks.count == 1:  # loading it finds the same
        return
    model = ranks.together(lambda: _model(recipe))
    check_same(ranks, "model files", model, "give every node the same model directory")


def _model(recipe: Recipe) -> dict[str, Any]:
    source = open_merged(recipe.model.path, base=recipe.model.base)
    division_of(recipe, source.config)
    return {"config.json": source.config.to_dict(), "weights": source.identity()["fingerprint"]}


def check_one_disk(ranks: Ranks, run_dir: Path, patience: float = PATIENCE) -> None:
    """Every rank sees, within `patience` seconds, what rank 0 writes into the run directory. ConfigError on all."""
    if ranks.count == 1:
        return
    file = run_dir / TOKEN
    token = ranks.first(lambda: _left(file))
    found = ranks.each((socket.gethostname(), _sees(file, token, patience)))
    ranks.first(lambda: _one_disk(file, found))


def _left(file: Path) -> str:
    token = secrets.token_hex(16)
    write_text(file, token)
    return token


def _sees(file: Path, token: str, patience: float) -> bool:
    """A network file system may show a new file a little later."""
    deadline = time.monotonic() + patience
    while True:
        try:
            if file.read_text() == token:
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)


def _one_disk(file: Path, by_rank: list[tuple[str, bool]]) -> None:
    file.unlink(missing_ok=True)
    blind = [rank for rank, (_, sees) in enumerate(by_rank) if not sees]
    if blind:
        raise ConfigError(
            f"train.output_dir {file.parent}: {places(by_rank, blind)} another directory of that name than rank 0 "
            f"({by_rank[0][0]}); give one on a file system that all nodes share"
        )
