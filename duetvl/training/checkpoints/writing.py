"""Writing a checkpoint, whole or not at all. The format is checkpoint_format.py's.

Rank 0 makes a hidden directory. Every rank writes its files there and forces them to disk; those beside rank 0 then
leave a record of what they have written, or of why they could not. When rank 0 has all records it writes the manifest,
gives the directory its name, and only then lets `latest` name it. None of it calls a collective, so it may happen in
threads. A kill at any instant leaves the checkpoint before it loadable.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.boxes import Shape
from duetvl.core.composed.collectives import time_limit
from duetvl.core.errors import CheckpointError
from duetvl.storage.checkpoint_format import (
    KINDS,
    MANIFEST,
    Manifest,
    Meta,
    StoredBox,
    StoredTensor,
    StoredTensors,
    box_name,
    file_name,
    stored_from_json,
    stored_to_json,
)
from duetvl.storage.files import free_space, remove_directory, remove_temporaries, sync_directory, write_text
from duetvl.storage.finding import STEP, checkpoints_dir, noted_name, step_name
from duetvl.storage.tensor_files import FileRecord, write_tensor_file
from duetvl.training.checkpoints.pieces import HostPiece

_MANIFEST: Final = 1 << 20  # bytes of the manifest and of what is logged meanwhile, at most about
_PATIENCE: Final = 0.02  # seconds between two looks for records
_RECORDS: Final = "written-*.json"
_AGAIN: Final = 0.5  # seconds until a record that could not be written is tried again


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint, before it is written: its boxes and what its optimizer has counted.

    wanted: by kind and path, the shapes of all tensors that the ranks write together.
    """

    step: int
    meta: Meta
    optimizer_steps: Mapping[str, int]
    pieces: tuple[HostPiece, ...]
    written_by: Mapping[str, str]
    wanted: Mapping[str, Mapping[str, Shape]]

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return sum(piece.spec.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Written:
    """What one rank has written: enough, from all of them, to make the manifest.

    tensors: each as far as it is in the boxes of this rank.
    """

    files: tuple[FileRecord, ...]
    tensors: StoredTensors
    optimizer_steps: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which `from_json` makes the same."""
        return {**stored_to_json(self.files, self.tensors), "optimizer_steps": dict(self.optimizer_steps)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Written:
        """What `to_json` wrote."""
        return cls(*stored_from_json(values), values["optimizer_steps"])


# -- rank 0 -----------------------------------------------------------------------------------------------------------


def begin_save(run_dir: str | Path, step: int, needed: int, keep_last: int | None = None) -> Path:
    """Make the hidden directory that all ranks write to, and room for `needed` bytes. Raises CheckpointError.

    Where the disk has no room, checkpoints that are removed after this one anyway go first, but for the latest.
    """
    folder = checkpoints_dir(run_dir)
    staging = folder / f".{step_name(step)}.saving"
    with _whole_or_not_at_all(staging, step):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        _make_room(folder, needed, keep_last)
        staging.mkdir()
    return staging


def write_first(
    staging: Path,
    taken: Snapshot,
    *,
    ranks: int = 1,
    keep_last: int | None = None,
    look: Callable[[], None] = lambda: None,
) -> Path:
    """Write rank 0's share, wait for the records of the others, and commit: the checkpoint's directory.

    It is the latest from then on, and all but the `keep_last` newest, and the best, are removed.

    CheckpointError, and nothing is left of it, where a rank could not write, or one is missing and nothing has been
    written for DUETVL_PEER_TIMEOUT seconds. `look` is called while this waits, and may end it with an error of its own.
    """
    with _whole_or_not_at_all(staging, taken.step):
        written = [write_share(staging, taken, 0, ranks), *_others(staging, ranks, look)]
        return commit(staging, make_manifest(taken, written), keep_last)


@contextmanager
def _whole_or_not_at_all(staging: Path, step: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError | MemoryError):
            raise CheckpointError(
                f"{staging.parent}: the checkpoint of step {step} could not be written: {_cause(error)}; "
                f"earlier ones are untouched"
            ) from error
        raise


def _cause(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "there is no memory for it"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _others(staging: Path, ranks: int, look: Callable[[], None]) -> list[Written]:
    """The records of all ranks but the first, in order; they are waited for as long as anything is being written."""
    limit, seen, deadline = time_limit("DUETVL_PEER_TIMEOUT"), None, 0.0
    found: dict[int, Written] = {}
    while missing := [rank for rank in range(1, ranks) if rank not in found]:
        look()
        found |= {rank: _read_record(_record(staging, rank)) for rank in missing if _record(staging, rank).exists()}
        sizes = _sizes(staging)
        if sizes != seen:
            seen, deadline = sizes, time.monotonic() + limit
        elif time.monotonic() > deadline:
            raise OSError(f"nothing came from rank {missing[0]} for {limit:g} s; its log may say why")
        else:
            time.sleep(_PATIENCE)
    return [found[rank] for rank in range(1, ranks)]


def _sizes(staging: Path) -> dict[str, int]:
    """The files so far, which change as long as anything is being written."""
    sizes = {}
    for name in os.listdir(staging):
        with suppress(FileNotFoundError):  # renamed meanwhile
            sizes[name] = (staging / name).stat().st_size
    return sizes


def _read_record(path: Path) -> Written:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "error" in content:
        raise OSError(content["error"])
    return Written.from_json(content)


def make_manifest(taken: Snapshot, written: Sequence[Written]) -> Manifest:
    """Join what all ranks have written; ValueError unless their boxes make up every tensor that is wanted."""
    tensors: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in KINDS}
    for part in written:
        for kind, stored in part.tensors.items():
            for path, one in stored.items():
                tensors[kind][path] = _joined(path, tensors[kind].get(path), one)
    broken = [
        f"{kind} of {path}"
        for kind in KINDS
        for path in tensors[kind].keys() | taken.wanted.get(kind, {}).keys()
        if not _is_whole(tensors[kind].get(path), taken.wanted.get(kind, {}).get(path))
    ]
    if broken:
        raise ValueError(f"the pieces written do not make up {sorted(broken)[:3]}")
    return Manifest(
        step=taken.step,
        meta=taken.meta,
        optimizer_steps={path: count for part in written for path, count in part.optimizer_steps.items()},
        files=tuple(record for part in written for record in part.files),
        tensors=tensors,
        written_by=dict(taken.written_by),
    )


def _is_whole(found: StoredTensor | None, wanted: Shape | None) -> bool:
    """Whether a tensor is as it is wanted, and all of it is there."""
    return found is not None and found.shape == wanted and found.complete()


def _joined(path: str, before: StoredTensor | None, more: StoredTensor) -> StoredTensor:
    if before is None:
        return more
    if (before.dtype, before.shape) != (more.dtype, more.shape):
        raise ValueError(f"ranks disagree on {path}: {before.dtype} {before.shape}, {more.dtype} {more.shape}")
    return replace(before, boxes=before.boxes + more.boxes)


def commit(staging: Path, manifest: Manifest, keep_last: int | None = None) -> Path:
    """Give a finished directory its name, make it the latest, and rotate."""
    for record in staging.glob(_RECORDS):
        record.unlink()
    write_text(staging / MANIFEST, manifest.to_text())
    folder = staging.parent
    final = folder / step_name(manifest.step)
    replaced = folder / f".{final.name}.replaced"
    if final.exists():  # a run that went back to an earlier step comes by again
        os.rename(final, replaced)
    os.rename(staging, final)
    sync_directory(folder)
    write_text(folder / "latest", final.name + "\n")
    if replaced.exists():
        remove_directory(replaced)
    _rotate(folder, final, keep_last)
    return final


# -- every rank -------------------------------------------------------------------------------------------------------


def write_share(staging: Path, taken: Snapshot, rank: int = 0, ranks: int = 1) -> Written:
    """Write this rank's boxes, one file of each kind, and wait until they are on disk."""
    files: list[FileRecord] = []
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for kind in KINDS:
        chosen = {box_name(piece.path, piece.box): piece for piece in taken.pieces if piece.kind == kind}
        if not chosen:
            continue
        name = file_name(kind, rank, ranks)
        specs = {key: piece.spec for key, piece in chosen.items()}
        files.append(write_tensor_file(staging / name, specs, _fetcher(chosen), {"format": "pt"}))
        stored = tensors[kind] = {}
        for piece in chosen.values():
            one = StoredTensor(piece.dtype, piece.shape, (StoredBox(name, piece.box),))
            stored[piece.path] = _joined(piece.path, stored.get(piece.path), one)
    return Written(tuple(files), tensors, taken.optimizer_steps)


def _fetcher(pieces: Mapping[str, HostPiece]) -> Callable[[str], np.ndarray]:
    return lambda key: pieces[key].fetch()


def write_other(staging: Path, taken: Snapshot, rank: int, ranks: int) -> None:
    """Write the share of a rank beside the first, and leave a record of it, or of why that failed.

    Rank 0 raises what that means for the checkpoint: a full disk or a lack of memory is no error here.
    """
    try:
        _write_record(staging, rank, write_share(staging, taken, rank, ranks).to_json())
    except (OSError, MemoryError) as error:
        _record_failure(staging, rank, ranks, error)
    except BaseException as error:
        with suppress(OSError):
            _write_record(staging, rank, _failure(rank, error))
        raise


def _record_failure(staging: Path, rank: int, ranks: int, cause: OSError | MemoryError) -> None:
    """Make room for the record of a failure, and write it; on a full disk until DUETVL_PEER_TIMEOUT is over."""
    for kind in KINDS:
        with suppress(OSError):
            (staging / file_name(kind, rank, ranks)).unlink(missing_ok=True)
    deadline = time.monotonic() + time_limit("DUETVL_PEER_TIMEOUT")
    while staging.is_dir() and time.monotonic() < deadline:
        with suppress(OSError):
            _write_record(staging, rank, _failure(rank, cause))
            return
        time.sleep(_AGAIN)


def _failure(rank: int, error: BaseException) -> dict[str, str]:
    return {"error": f"rank {rank} ({socket.gethostname()}): {_cause(error)}"}


def _record(staging: Path, rank: int) -> Path:
    return staging / f"written-{rank:05}.json"


def _write_record(staging: Path, rank: int, content: Mapping[str, Any]) -> None:
    write_text(_record(staging, rank), json.dumps(content))


# -- room -------------------------------------------------------------------------------------------------------------


def remove_leftovers(run_dir: str | Path) -> None:
    """Tidy up after a run that was killed while it saved, whatever its ranks; no other run may be saving here."""
    folder = checkpoints_dir(run_dir)
    remove_temporaries(folder)
    for old in folder.glob(".step-*.replaced"):
        name = old.name[1 : -len(".replaced")]
        if not (folder / name).exists():  # killed between its two renames
            os.rename(old, folder / name)
    for pattern in (".step-*.saving", ".step-*.replaced", ".step-*.deleting"):
        for leftover in folder.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)  # the next time, where somebody still reads it


def _rotate(folder: Path, newest: Path, keep_last: int | None) -> None:
    """By the time of writing, not by number: a run that went back to an earlier step keeps its new ones."""
    others = [path for path in folder.iterdir() if STEP.fullmatch(path.name) and path != newest]
    others.sort(key=_written_at)
    for old in _spent(others, others, keep_last):
        remove_directory(old)


def _spent(spare: Sequence[Path], others: Sequence[Path], keep_last: int | None) -> list[Path]:
    """Those of `spare`, oldest first, that go once there is a new one beside the others: never the best."""
    count = _too_many(others, keep_last)
    return [path for path in spare[:count] if path.name != noted_name(path.parent, "best")]


def note_best(run_dir: str | Path, step: int | None, keep_last: int | None) -> None:
    """Name the checkpoint of `step` as the best: it is not removed while it is. None: there is no best. OSError.

    The best so far is removed where it is older than the `keep_last` newest.
    """
    folder = checkpoints_dir(run_dir)
    before, name = noted_name(folder, "best"), None if step is None else step_name(step)
    if name == before:
        return
    if name is None:
        (folder / "best").unlink(missing_ok=True)
    else:
        write_text(folder / "best", name + "\n")
    saved = sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), key=_written_at)
    for old in saved[: _too_many(saved[1:], keep_last)]:
        if old.name == before != noted_name(folder, "latest"):  # which a run may have gone back to
            remove_directory(old)


def _too_many(others: Sequence[Path], keep_last: int | None) -> int:
    """How many of the others go once there is a new one."""
    return 0 if keep_last is None else max(len(others) + 1 - keep_last, 0)


def _make_room(folder: Path, needed: int, keep_last: int | None) -> None:
    """Where the disk is too full, remove what `_rotate` would remove after the next one, apart from the latest."""
    others = sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), key=_written_at)
    latest = folder / (noted_name(folder, "latest") or "")
    spare = [path for path in others if path != (latest if latest in others else others[-1])]
    for old in _spent(spare, others, keep_last):
        free = free_space(folder)
        if free is None or free > needed + _MANIFEST:
            return
        remove_directory(old)


def _written_at(path: Path) -> tuple[int, str]:
    manifest = path / MANIFEST
    return (manifest.stat().st_mtime_ns if manifest.exists() else 0, path.name)
