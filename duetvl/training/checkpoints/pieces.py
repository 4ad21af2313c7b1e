"""What a rank has of a run's tensors, which boxes of them it writes into a checkpoint, and what it reads back.

Every stored number is written by one rank. Of a trained parameter that is the rank that updates it; the ranks that hold
a frozen one together divide it by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.boxes import Box, LocalPart, Shape
from duetvl.core.optimizer import AdamWState
from duetvl.core.params import Parameter
from duetvl.parallel.division import Division, owned_rows
from duetvl.storage.tensor_files import TensorSpec

Tensor = Any


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of this process, and which part it is of which whole tensor of the run.

    The part may be some rows of the tensor alone, from `first` on.
    """

    kind: str
    path: str
    part: LocalPart
    tensor: Tensor
    first: int = 0

    def boxes(self) -> Iterator[tuple[Box, tuple[slice, ...]]]:
        """Each box of the part, and where its numbers are in the tensor."""
        slices, at = self.part.slices, 0
        for box in slices.boxes:
            offset = [0] * len(box.shape)
            if offset:
                offset[slices.axis] = at
                offset[0] += self.first
                at += box.shape[slices.axis]
            yield box, Box(tuple(offset), box.shape).slices


@dataclass(frozen=True)
class HostPiece:
    """A box as it goes into a file: what it is called there, and a function that gives its bits once, in its turn.

    shape: of the whole tensor.
    """

    kind: str
    path: str
    shape: Shape
    box: Box
    dtype: str
    fetch: Callable[[], np.ndarray]

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape in its file."""
        return TensorSpec(self.dtype, self.box.shape)


def written_pieces(
    parameters: Iterable[Parameter],
    owned: Mapping[str, Parameter],
    state: AdamWState | None,
    division: Division,
) -> Iterator[LocalTensor]:
    """What this rank writes: the rows that it updates with all that AdamW remembers of them, and its share of what is
    frozen.

    parameters: those that are stored and that this rank has, each as it holds it. owned: by path, the rows of trained
    ones that it updates.
    """
    for parameter in parameters:
        if rows := owned.get(parameter.path):
            yield LocalTensor("weights", rows.path, rows.place, rows.tensor)
        elif not parameter.trainable:
            yield from _frozen_share(parameter, division)
    yield from _remembered(owned, state)


def read_pieces(
    parameters: Iterable[Parameter], owned: Mapping[str, Parameter], state: AdamWState | None
) -> Iterator[LocalTensor]:
    """What this rank reads: all that it holds, and the rows that it updates where they are tensors of their own."""
    for parameter in parameters:
        yield LocalTensor("weights", parameter.path, parameter.place, parameter.tensor)
        rows = owned.get(parameter.path)
        if rows is not None and rows is not parameter:
            yield LocalTensor("weights", rows.path, rows.place, rows.tensor)
    yield from _remembered(owned, state)


def _remembered(owned: Mapping[str, Parameter], state: AdamWState | None) -> Iterator[LocalTensor]:
    for kind, tensors in state.slots().items() if state else ():
        for path, tensor in tensors.items():
            yield LocalTensor(kind, path, owned[path].place, tensor)


def _frozen_share(parameter: Parameter, division: Division) -> Iterator[LocalTensor]:
    """The rows of a frozen parameter that this rank writes."""
    place = parameter.place
    sharing = division.sharing(parameter.path, place.whole)
    team = division.team(sharing.axes)
    if len(team) == 1:
        yield LocalTensor("weights", parameter.path, place, parameter.tensor)
        return
    mesh = division.mesh
    by_place = [_held(division.of_rank(rank), parameter) for rank in mesh.ranks_along("tp", rank=division.rank)]
    held = {rank: by_place[mesh.coordinates(rank)["tp"]] for rank in team}
    for rows in _share(held, division.rank, parameter.path):
        first = rows.start - held[division.rank].start
        yield LocalTensor("weights", parameter.path, place.rows(first, first + len(rows)), parameter.tensor, first)


def _held(division: Division, parameter: Parameter) -> range:
    """The rows of what it shares that the division's rank has."""
    whole = parameter.place.whole
    first, part = division.sharing(parameter.path, whole).first, division.part(parameter.path, whole)
    return range(first, first + part.shape[0])


def _share(held: Mapping[int, range], rank: int, path: str) -> Iterator[range]:
    """Of rows that ranks hold, in ranges that may overlap, those that one of them writes: each row has one writer."""
    cuts = sorted({end for rows in held.values() for end in (rows.start, rows.stop)})
    for start, stop in pairwise(cuts):
        holders = [one for one, rows in held.items() if rows.start <= start and stop <= rows.stop]
        if rank in holders:
            own = owned_rows(stop - start, len(holders), path)[holders.index(rank)]
            if len(own):
                yield range(start + own.start, start + own.stop)


# -- to the host ------------------------------------------------------------------------------------------------------


def on_host(pieces: Iterable[LocalTensor], backend: Backend, *, copy: bool = False) -> Iterator[HostPiece]:
    """The boxes of pieces as files take them: copied to host memory now, or each when its turn comes."""
    for piece in pieces:
        dtype = backend.ops.dtype_of(piece.tensor)
        for box, where in piece.boxes():
            fetch: Callable[[], np.ndarray] = partial(_bits, backend, piece.tensor, where)
            if copy:
                fetch = _Held(np.array(fetch(), copy=True)).take  # on a CPU the bits are the tensor's own memory
            yield HostPiece(piece.kind, piece.path, piece.part.whole, box, dtype, fetch)


def _bits(backend: Backend, tensor: Tensor, where: tuple[slice, ...]) -> np.ndarray:
    shape = tuple(one.stop - one.start for one in where)
    chosen = tensor if shape == tuple(tensor.shape) else tensor[where]
    return backend.checkpoint_io.save(chosen)[0].reshape(shape)


class _Held:
    """An array that is handed over, and so freed by its reader."""

    def __init__(self, array: np.ndarray):
        self.array: np.ndarray | None = array

    def take(self) -> np.ndarray:
        array, self.array = self.array, None
        assert array is not None, "a snapshot is written once"
        return array
