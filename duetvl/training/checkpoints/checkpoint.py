"""A run's checkpoint: taken at a moment, and loaded again by any layout on any backend.

Loading trusts nothing: checksums first (finding.py), and no tensor is touched before all names and shapes are known to
fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.boxes import Shape
from duetvl.core.errors import CheckpointError
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.parallel.division import Division
from duetvl.parallel.inventory import Inventory, own_entries
from duetvl.storage.checkpoint_format import Manifest, Meta, StoredCheckpoint
from duetvl.storage.files import write_text
from duetvl.storage.finding import CheckpointRef, checkpoints_dir
from duetvl.storage.weights_dir import count_and_name
from duetvl.training.checkpoints.pieces import LocalTensor, on_host, read_pieces, written_pieces
from duetvl.training.checkpoints.writing import Snapshot
from duetvl.version import __version__

Tensor = Any

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


def take_snapshot(
    *,
    step: int,
    parameters: Iterable[Parameter],
    optimizer_state: AdamWState | None,
    meta: Meta,
    backend: Backend,
    owned: Mapping[str, Parameter] | None = None,
    division: Division | None = None,
    everything: Inventory | None = None,
    copy: bool = False,
) -> Snapshot:
    """What this rank writes of a checkpoint of this moment.

    parameters: those that are stored, as this rank holds them; frozen ones as well, if given. owned: the rows of
    trained ones that it updates, of which `optimizer_state` is; by default all of them. everything: what all ranks
    store together; by default the parameters. With `copy` every tensor is copied to host memory now; writing then needs
    no framework and may happen in a thread while training goes on, and gives each copy's memory back once it is
    written. Without it a tensor is fetched when its turn comes, and must not change before.
    """
    parameters = tuple(parameters)
    owned = trained(parameters) if owned is None else owned
    pieces = written_pieces(parameters, owned, optimizer_state, division or Division())
    everything = own_entries(parameters, backend) if everything is None else everything
    return Snapshot(
        step=step,
        meta=meta,
        wanted=_stored_shapes(everything, optimizer=optimizer_state is not None),
        optimizer_steps=dict(optimizer_state.step) if optimizer_state else {},
        pieces=tuple(on_host(pieces, backend, copy=copy)),
        written_by=writer_names(backend),
    )


def _stored_shapes(everything: Inventory, *, optimizer: bool) -> dict[str, dict[str, Shape]]:
    """By kind and path, what a checkpoint of these parameters has."""
    weights = {path: entry.shape for path, entry in everything.items()}
    if not optimizer:
        return {"weights": weights}
    updated = {path: entry for path, entry in everything.items() if entry.trainable}
    moments = {path: entry.shape for path, entry in updated.items()}
    masters = {path: entry.shape for path, entry in updated.items() if entry.dtype != "float32"}
    return {"weights": weights, **dict.fromkeys(_MOMENTS, moments), "master": masters}


def trained(parameters: Iterable[Parameter]) -> dict[str, Parameter]:
    """By path, the parameters that are trained: what a rank updates that shares them with nobody."""
    return {parameter.path: parameter for parameter in parameters if parameter.trainable}


def writer_names(backend: Backend) -> dict[str, str]:
    """Who writes a checkpoint, for its manifest."""
    framework = backend.capabilities.framework
    return {"duetvl": __version__, "backend": backend.name, "framework": framework}


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
    owned: Mapping[str, Parameter] | None = None,
    everything: Inventory | None = None,
) -> Meta:
    """Write a checkpoint's numbers into this rank's tensors, one at a time; bit for bit where dtypes are the same.

    parameters, owned and everything are as in `take_snapshot`, whatever ranks have written. `optimizer_state` is a
    fresh one of the owned rows, or None to load weights alone. Where a parameter's dtype is not the stored one, it
    comes from the float32 master if there is one, and a master that was not stored comes from the weights.
    CheckpointError, with nothing written, for the checkpoint of another model.
    """
    parameters = tuple(parameters)
    everything = own_entries(parameters, backend) if everything is None else everything
    _check_same_model(ref, everything, moments=optimizer_state is not None)
    owned = trained(parameters) if owned is None else owned
    load_pieces(ref, read_pieces(parameters, owned, optimizer_state), backend)
    if optimizer_state:
        optimizer_state.step.update({path: ref.manifest.optimizer_steps[path] for path in optimizer_state.step})
    return ref.meta


def load_pieces(ref: CheckpointRef, pieces: Iterable[LocalTensor], backend: Backend) -> None:
    """Fill this process's tensors, whatever boxes they are of whatever the writers had."""
    stored = ref.stored
    for piece in pieces:
        wanted = backend.ops.dtype_of(piece.tensor)
        kind = _source(ref.manifest, piece, wanted)
        raw, dtype = _joined(stored, kind, piece)
        backend.ops.assign(piece.tensor, backend.checkpoint_io.load(raw, dtype, wanted))
        del raw
        stored.release(kind, piece.path)


def _joined(stored: StoredCheckpoint, kind: str, piece: LocalTensor) -> tuple[np.ndarray, str]:
    """The bits of a part, whose boxes are joined in host memory where there are several, and their dtype."""
    slices = piece.part.slices
    read = [stored.read(kind, piece.path, box) for box in slices.boxes]
    raw, dtype = read[0]
    return (np.concatenate([bits for bits, _ in read], slices.axis) if len(read) > 1 else raw), dtype


def _check_same_model(ref: CheckpointRef, everything: Inventory, *, moments: bool) -> None:
    """Names and shapes of what is stored, and of what is trained, by all ranks. A master may be absent on either side:
    it depends on the dtype alone."""
    wanted = _stored_shapes(everything, optimizer=moments)
    _check_same(ref, "weights", wanted["weights"], "another model")
    if updated := wanted.get("exp_avg"):
        _check_same(ref, "exp_avg", updated, "a run that trained other parameters")


def _check_same(ref: CheckpointRef, kind: str, wanted: Mapping[str, Shape], what: str) -> None:
    stored = ref.manifest.tensors.get(kind, {})
    wrong = [path for path in wanted if path in stored and stored[path].shape != wanted[path]]
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


def _source(manifest: Manifest, piece: LocalTensor, wanted: str) -> str:
    """The kind that a piece is read from; see load_checkpoint."""
    masters, weights = manifest.tensors["master"], manifest.tensors["weights"]
    if piece.kind in _MOMENTS:
        return piece.kind
    if piece.kind == "weights" and weights[piece.path].dtype == wanted:
        return "weights"
    return "master" if piece.path in masters else "weights"
