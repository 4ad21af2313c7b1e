"""Saving and resuming a run. The format is checkpoint_format.py's.

A checkpoint is written to a hidden directory, forced to disk, renamed, and only then named by `latest`; a kill at any
instant leaves the one before it loadable. Loading trusts nothing: checksums first, and no tensor is touched before all
names and shapes are known to fit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.storage.checkpoint_format import (
    KINDS,
    MANIFEST,
    Manifest,
    Meta,
    StoredBox,
    StoredTensor,
    box_name,
    file_name,
)
from duetvl.storage.files import free_space, remove_directory, remove_temporaries, sync_directory, write_text
from duetvl.storage.finding import STEP, CheckpointRef, checkpoints_dir, latest_name, step_name
from duetvl.storage.tensor_files import FileRecord, TensorSpec, write_tensor_file
from duetvl.storage.weights_dir import count_and_name
from duetvl.version import __version__

Tensor = Any

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_MANIFEST: Final = 1 << 20  # bytes of the manifest and of what is logged meanwhile, at most about


@dataclass(frozen=True)
class Piece:
    """A tensor of this process, and which box it is of which whole tensor of the run."""

    kind: str
    path: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @classmethod
    def whole(cls, kind: str, path: str, tensor: Tensor) -> Piece:
        """A tensor that this process holds entirely."""
        shape = tuple(tensor.shape)
        return cls(kind, path, shape, Box.whole(shape), tensor)


# -- saving -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostPiece:
    """A piece as it goes into a file: what it is called there, and a function that gives its bits once, in its turn."""

    kind: str
    path: str
    shape: tuple[int, ...]
    box: Box
    dtype: str
    fetch: Callable[[], np.ndarray]

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape in its file."""
        return TensorSpec(self.dtype, self.box.shape)


@dataclass(frozen=True)
class Snapshot:
    """A whole checkpoint before it is written."""

    step: int
    meta: Meta
    optimizer_steps: Mapping[str, int]
    pieces: tuple[HostPiece, ...]
    written_by: Mapping[str, str]


def take_snapshot(
    *,
    step: int,
    parameters: Iterable[Parameter],
    optimizer_state: AdamWState | None,
    meta: Meta,
    backend: Backend,
    copy: bool = False,
) -> Snapshot:
    """What a checkpoint of this moment has. `parameters` are those that are stored, frozen ones as well if given.

    With `copy` every tensor is copied to host memory now; writing then needs no framework and may happen in a thread
    while training goes on, and gives each copy's memory back once it is written. Without it a tensor is fetched
    when its turn comes, and must not change before.
    """
    pieces = whole_pieces(parameters, optimizer_state)
    return Snapshot(
        step=step,
        meta=meta,
        optimizer_steps=dict(optimizer_state.step) if optimizer_state else {},
        pieces=tuple(on_host(pieces, backend, copy=copy)),
        written_by=writer_names(backend),
    )


def write_snapshot(run_dir: str | Path, taken: Snapshot, keep_last: int | None = None) -> Path:
    """Write `run_dir/checkpoints/step-NNNNNNN`, make it the latest, remove all but the `keep_last` newest.

    Where the disk has no room for it, those that would be removed then go first, but for the latest one. On an error (a
    full disk) CheckpointError is raised, nothing of it is left, and the other checkpoints are as before.
    """
    folder = checkpoints_dir(run_dir)
    staging = folder / f".{step_name(taken.step)}.saving"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        _make_room(folder, sum(piece.spec.nbytes for piece in taken.pieces), keep_last)
        staging.mkdir()
        written = write_pieces(staging, taken.pieces)
        manifest = make_manifest(taken.step, taken.meta, taken.optimizer_steps, [written], taken.written_by)
        return commit(staging, manifest, keep_last)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{folder}: the checkpoint of step {taken.step} could not be written: {error.strerror or error}; "
                f"earlier ones are untouched"
            ) from error
        raise


def whole_pieces(parameters: Iterable[Parameter], optimizer_state: AdamWState | None) -> list[Piece]:
    """All tensors of a run that one process holds."""
    pieces = [Piece.whole("weights", p.path, p.tensor) for p in parameters]
    for kind, tensors in optimizer_state.slots().items() if optimizer_state else ():
        pieces += [Piece.whole(kind, path, tensor) for path, tensor in tensors.items()]
    return pieces


def on_host(pieces: Iterable[Piece], backend: Backend, *, copy: bool = False) -> Iterator[HostPiece]:
    """The pieces as files take them: copied to host memory now, or each when its turn comes."""
    for piece in pieces:
        fetch: Callable[[], np.ndarray] = partial(_bits, backend, piece)
        if copy:
            fetch = _Held(np.array(fetch(), copy=True)).take  # on a CPU the bits are the tensor's own memory
        yield HostPiece(piece.kind, piece.path, piece.shape, piece.box, backend.ops.dtype_of(piece.tensor), fetch)


def _bits(backend: Backend, piece: Piece) -> np.ndarray:
    return backend.checkpoint_io.save(piece.tensor)[0].reshape(piece.box.shape)


class _Held:
    """An array that is handed over, and so freed by its reader."""

    def __init__(self, array: np.ndarray):
        self.array: np.ndarray | None = array

    def take(self) -> np.ndarray:
        array, self.array = self.array, None
        assert array is not None, "a snapshot is written once"
        return array


def writer_names(backend: Backend) -> dict[str, str]:
    """Who writes a checkpoint, for its manifest."""
    framework = backend.capabilities.framework
    return {"duetvl": __version__, "backend": backend.name, "framework": framework}


@dataclass(frozen=True)
class WrittenPieces:
    """What one process has written: enough, from all of them, to make the manifest."""

    files: tuple[FileRecord, ...]
    boxes: tuple[tuple[str, str, StoredTensor], ...]  # kind, path, and the tensor as far as it is in this box


def write_pieces(staging: Path, pieces: Sequence[HostPiece], *, rank: int = 0, ranks: int = 1) -> WrittenPieces:
    """Write this process's pieces, one file of each kind, and wait until they are on disk.

    A piece that several processes hold must be handed in by one of them only.
    """
    files: list[FileRecord] = []
    boxes: list[tuple[str, str, StoredTensor]] = []
    for kind in KINDS:
        chosen = {box_name(p.path, p.box): p for p in pieces if p.kind == kind}
        if not chosen:
            continue
        name = file_name(kind, rank, ranks)
        specs = {key: p.spec for key, p in chosen.items()}
        files.append(write_tensor_file(staging / name, specs, _fetcher(chosen), {"format": "pt"}))
        boxes += [(kind, p.path, StoredTensor(p.dtype, p.shape, (StoredBox(name, p.box),))) for p in chosen.values()]
    return WrittenPieces(tuple(files), tuple(boxes))


def _fetcher(pieces: Mapping[str, HostPiece]) -> Callable[[str], np.ndarray]:
    return lambda key: pieces[key].fetch()


def make_manifest(
    step: int,
    meta: Meta,
    optimizer_steps: Mapping[str, int],
    written: Sequence[WrittenPieces],
    written_by: Mapping[str, str],
) -> Manifest:
    """Join what all processes have written."""
    tensors: dict[str, dict[str, StoredTensor]] = {kind: {} for kind in KINDS}
    for kind, path, one in (entry for part in written for entry in part.boxes):
        before = tensors[kind].get(path)
        tensors[kind][path] = replace(one, boxes=before.boxes + one.boxes) if before else one
    broken = [path for kind in KINDS for path, stored in tensors[kind].items() if not stored.complete()]
    if broken:
        raise ValueError(f"the pieces written do not make up {broken[:3]}")
    return Manifest(
        step=step,
        meta=meta,
        optimizer_steps=dict(optimizer_steps),
        files=tuple(record for part in written for record in part.files),
        tensors=tensors,
        written_by=dict(written_by),
    )


def commit(staging: Path, manifest: Manifest, keep_last: int | None = None) -> Path:
    """Give a finished directory its name, make it the latest, and rotate. One process does this."""
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


def remove_leftovers(run_dir: str | Path) -> None:
    """Tidy up after a run that was killed while it saved; no other run may be saving here."""
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
    for old in others[: _too_many(others, keep_last)]:
        remove_directory(old)


def _too_many(others: Sequence[Path], keep_last: int | None) -> int:
    """How many of the others go once there is a new one."""
    return 0 if keep_last is None else max(len(others) + 1 - keep_last, 0)


def _make_room(folder: Path, needed: int, keep_last: int | None) -> None:
    """Where the disk is too full, remove what `_rotate` would remove after the next one, apart from the latest."""
    others = sorted((path for path in folder.iterdir() if STEP.fullmatch(path.name)), key=_written_at)
    latest = folder / (latest_name(folder) or "")
    spare = [path for path in others if path != (latest if latest in others else others[-1])]
    for old in spare[: _too_many(others, keep_last)]:
        free = free_space(folder)
        if free is None or free > needed + _MANIFEST:
            return
        remove_directory(old)


def _written_at(path: Path) -> tuple[int, str]:
    manifest = path / MANIFEST
    return (manifest.stat().st_mtime_ns if manifest.exists() else 0, path.name)


# -- loading ----------------------------------------------------------------------------------------------------------


def go_on_from(ref: CheckpointRef, run_dir: str | Path) -> None:
    """Make a checkpoint of the run its latest, before rows of later steps are removed from its metrics.

    Else a run that went back to an earlier step and was killed before it saved would go on in the branch that it left.
    """
    folder = checkpoints_dir(run_dir)
    if ref.path.parent.resolve() == folder.resolve():
        write_text(folder / "latest", ref.path.name + "\n")


def load_checkpoint(
    ref: CheckpointRef,
    *,
    parameters: Iterable[Parameter],
    optimizer_state: AdamWState | None,
    backend: Backend,
) -> Meta:
    """Write a checkpoint's numbers into the tensors of a run, one at a time; bit for bit where dtypes are the same.

    `optimizer_state` is a fresh one of the same trainable parameters, or None to load weights alone. Where a
    parameter's dtype is not the stored one, it comes from the float32 master if there is one, and a master that was
    not stored comes from the weights. CheckpointError, with nothing written, for the checkpoint of another model.
    """
    load_pieces(ref, whole_pieces(parameters, optimizer_state), backend)
    if optimizer_state:
        optimizer_state.step.update({path: ref.manifest.optimizer_steps[path] for path in optimizer_state.step})
    return ref.meta


def load_pieces(ref: CheckpointRef, pieces: Sequence[Piece], backend: Backend) -> None:
    """Fill this process's tensors, whatever boxes they are of whatever the writers had."""
    _check_same_model(ref, pieces)
    stored = ref.stored
    for piece in pieces:
        wanted = backend.ops.dtype_of(piece.tensor)
        kind = _source(ref.manifest, piece, wanted)
        raw, dtype = stored.read(kind, piece.path, piece.box)
        backend.ops.assign(piece.tensor, backend.checkpoint_io.load(raw, dtype, wanted))
        del raw
        stored.release(kind, piece.path)


def _check_same_model(ref: CheckpointRef, pieces: Sequence[Piece]) -> None:
    """A master may be absent on either side: it depends on the dtype alone."""
    for kind, what in (("weights", "another model"), ("exp_avg", "a run that trained other parameters")):
        wanted = {piece.path: piece.shape for piece in pieces if piece.kind == kind}
        if not wanted and kind == "exp_avg":
            continue
        stored = ref.manifest.tensors.get(kind, {})
        wrong = [p for p in wanted if p in stored and stored[p].shape != wanted[p]]
        shapes = [f"{path} {list(stored[path].shape)} instead of {list(wanted[path])}" for path in wrong]
        problems = [
            count_and_name("tensor(s) absent", [path for path in wanted if path not in stored]),
            count_and_name("unknown here", [path for path in stored if path not in wanted]),
            count_and_name("of another shape", shapes),
        ]
        if any(problems):
            raise CheckpointError(
                f"{ref.path}: is of {what}: {'; '.join(filter(None, problems))}. "
                f"Resume with the recipe that wrote it, or begin in a new run directory"
            )


def _source(manifest: Manifest, piece: Piece, wanted: str) -> str:
    """The kind that a piece is read from; see load_checkpoint."""
    masters, weights = manifest.tensors["master"], manifest.tensors["weights"]
    if piece.kind in _MOMENTS:
        return piece.kind
    if piece.kind == "weights" and weights[piece.path].dtype == wanted:
        return "weights"
    return "master" if piece.path in masters else "weights"
