"""Tensors on their way from files to files: any box of a logical tensor on request, planned files filled in parallel.

Memory: each worker holds one chunk (CHUNK bytes, or one row) and the mapped pages that it came from; pages are given
back after every chunk. Nothing grows with the model.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event, Lock
from typing import Final, Protocol

import numpy as np

from duetvl.convert.layouts import TensorBox
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError
from duetvl.storage.tensor_files import NUMPY_DTYPES, WRITE_BYTES, TensorSpec, tensor_file_header
from duetvl.storage.weights_dir import count_and_name

CHUNK: Final = 1 << 24
_PATIENCE: Final = 0.1  # seconds

Progress = Callable[[int], None]


class TensorStore(Protocol):
    """An opened file of tensors: `TensorFile` (safetensors) and `TorchFile` (.pt) are such."""

    path: Path

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each."""

    def view(self, name: str) -> np.ndarray:
        """The tensor as an array over the file."""

    def release(self, name: str) -> None:
        """Give back the memory of its pages."""


class LogicalTensors(Protocol):
    """The tensors of a model by their Hugging Face names, wherever they are."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and whole shape of each."""

    def read(self, name: str, box: Box) -> np.ndarray:
        """The bits of a box; a view where it lies in one piece. From any thread."""

    def release(self, name: str) -> None:
        """Nothing of this tensor is wanted for now."""


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fragment:
    """A box of a logical tensor, and where it is: the rows from `row` on of a stored tensor seen in `shape`."""

    box: Box
    store: TensorStore
    key: str
    row: int
    shape: tuple[int, ...]

    def view(self, box: Box) -> np.ndarray:
        """A part of it, given in coordinates of the logical tensor."""
        inner = box.seen_from(self.box)
        stored = self.store.view(self.key).reshape(self.shape)
        if not self.shape:
            return stored
        return stored[self.row : self.row + self.box.shape[0]][inner.slices]


class FragmentedTensors:
    """Logical tensors that lie in boxes in mapped files. Of copies the first is read."""

    def __init__(self, what: str | Path, found: Iterable[tuple[str, tuple[int, ...], Fragment]]):
        """`found` has (name, whole shape, fragment). CheckpointError, starting with `what`, for incomplete tensors."""
        self.fragments: dict[str, dict[Box, Fragment]] = {}
        self.copies: list[tuple[str, Fragment]] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape, fragment in found:
            shapes[name] = shape
            if fragment.box in self.fragments.setdefault(name, {}):
                self.copies.append((name, fragment))
            else:
                self.fragments[name][fragment.box] = fragment
        self.specs: dict[str, TensorSpec] = {
            name: TensorSpec(_one_dtype(what, name, parts.values()), shapes[name])
            for name, parts in self.fragments.items()
        }
        incomplete = [
            name
            for name, parts in self.fragments.items()
            if sum(box.volume for box in parts) != math.prod(shapes[name])
        ]
        if incomplete:
            raise CheckpointError(f"{what}: {count_and_name('tensor(s) are only there in part', incomplete)}")

    def read(self, name: str, box: Box) -> np.ndarray:
        """See LogicalTensors."""
        same = self.fragments[name].get(box)
        if same is not None:
            return same.view(box)
        parts = [(part, shared) for part in self.fragments[name].values() if (shared := box.overlap(part.box))]
        if len(parts) == 1 and parts[0][1] == box:
            return parts[0][0].view(box)
        whole = np.empty(box.shape, NUMPY_DTYPES[self.specs[name].dtype])
        for part, shared in parts:
            whole[shared.seen_from(box).slices] = part.view(shared)
        return whole

    def release(self, name: str) -> None:
        """See LogicalTensors."""
        for part in self.fragments[name].values():
            part.store.release(part.key)


class FetchedTensors:
    """Logical tensors that are asked for one by one and whole, e.g. from a device. One thread only."""

    def __init__(self, specs: Mapping[str, TensorSpec], fetch: Callable[[str], np.ndarray]):
        """`fetch(name)` gives a tensor's bits in the announced shape."""
        self.specs = dict(specs)
        self._fetch, self._held = fetch, dict[str, np.ndarray]()

    def read(self, name: str, box: Box) -> np.ndarray:
        """See LogicalTensors."""
        if name not in self._held:
            array, spec = self._fetch(name), self.specs[name]
            if array.dtype != np.dtype(NUMPY_DTYPES[spec.dtype]) or tuple(array.shape) != spec.shape:
                raise ValueError(f"{name}: announced as {spec}, handed over as {array.dtype} {array.shape}")
            self._held[name] = array
        return self._held[name][box.slices]

    def release(self, name: str) -> None:
        """See LogicalTensors."""
        self._held.pop(name, None)


def _one_dtype(what: str | Path, name: str, parts: Iterable[Fragment]) -> str:
    dtypes = {part.store.specs[part.key].dtype for part in parts}
    if len(dtypes) > 1:
        raise CheckpointError(f"{what}: the parts of {name} have different dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def row_chunks(spec: TensorSpec, box: Box) -> Iterator[Box]:
    """The box in runs of rows of at most CHUNK bytes, or of one row."""
    if not box.shape:
        yield box
        return
    row = max(math.prod(box.shape[1:]) * np.dtype(NUMPY_DTYPES[spec.dtype]).itemsize, 1)
    step = max(CHUNK // row, 1)
    for start in range(0, box.shape[0], step):
        rows = min(step, box.shape[0] - start)
        yield Box((box.offset[0] + start, *box.offset[1:]), (rows, *box.shape[1:]))


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFile:
    """A file whose every byte but the tensors' is known: so any thread may write any tensor at its place.

    starts: where each tensor's bytes go. fixed: (position, bytes) of what is known at once. finish: the same of what
    depends on the crc32 of the tensors, which are only taken where it is `summed`.
    """

    size: int
    starts: Mapping[str, int]
    fixed: tuple[tuple[int, bytes], ...]
    finish: Callable[[Mapping[str, int]], list[tuple[int, bytes]]] = lambda _: []
    summed: bool = False


@dataclass(frozen=True)
class Output:
    """A file to be written: its tensors as pieces of logical ones, one under the other."""

    path: Path
    file: PlannedFile
    tensors: Mapping[str, tuple[TensorBox, ...]]


def plan_tensor_file(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> PlannedFile:
    """A safetensors file."""
    head, starts = tensor_file_header(specs, metadata)
    size = len(head) + sum(spec.nbytes for spec in specs.values())
    return PlannedFile(size, {name: len(head) + start for name, start in starts.items()}, ((0, head),))


def write_files(
    folder: Path, outputs: Sequence[Output], source: LogicalTensors, *, workers: int, progress: Progress | None = None
) -> None:
    """Write all files below a directory. On an error or an interrupt no worker is left, and no promise made of files.

    Tensors that come from the same logical ones are written together, so that each is read from disk, or fetched,
    once. `progress` is called with bytes written, by one thread at a time.
    """
    with ExitStack() as stack:
        handles = {}
        for output in outputs:
            path = folder / output.path
            path.parent.mkdir(parents=True, exist_ok=True)
            handles[output.path] = stack.enter_context(open(path, "w+b", buffering=0))
            handles[output.path].truncate(output.file.size)
        writer = _Writer(source, {path: handle.fileno() for path, handle in handles.items()}, progress)
        writer.run(_together(outputs), workers)
        for output in outputs:
            sums = writer.crc32[output.path]
            for position, data in chain(output.file.fixed, output.file.finish(sums)):
                _write_at(handles[output.path].fileno(), memoryview(data), position)


_Job = list[tuple[Output, str]]


def _together(outputs: Sequence[Output]) -> list[_Job]:
    jobs: dict[frozenset[str], _Job] = {}
    for output in outputs:
        for key, pieces in output.tensors.items():
            jobs.setdefault(frozenset(piece.name for piece in pieces), []).append((output, key))
    return list(jobs.values())


class _StoppedError(Exception):
    """Another worker failed, or the user interrupted."""


class _Writer:
    """Workers that copy tensors."""

    def __init__(self, source: LogicalTensors, descriptors: Mapping[Path, int], progress: Progress | None):
        self.source, self.descriptors, self.progress = source, descriptors, progress
        self.crc32: dict[Path, dict[str, int]] = {path: {} for path in descriptors}
        self.stop, self.lock = Event(), Lock()
        self.mapped = isinstance(source, FragmentedTensors)

    def run(self, jobs: Iterable[_Job], workers: int) -> None:
        if workers == 1:  # in this thread, as what is fetched from a device may have to be
            for job in jobs:
                self._copy(job)
            return
        with ThreadPoolExecutor(workers) as pool:
            try:
                futures: list[Future[None]] = [pool.submit(self._copy, job) for job in jobs]
                done, waiting = wait(futures, _PATIENCE, FIRST_EXCEPTION)
                # A signal that another thread was given is seen here only between two waits.
                while waiting and not any(future.exception() for future in done):
                    done, waiting = wait(futures, _PATIENCE, FIRST_EXCEPTION)
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        failed = [error for future in done if (error := future.exception())]
        for error in sorted(failed, key=lambda error: isinstance(error, _StoppedError)):
            raise error

    def _copy(self, job: _Job) -> None:
        for output, key in job:
            self._copy_tensor(output, key)
        self._release(piece for output, key in job for piece in output.tensors[key])

    def _copy_tensor(self, output: Output, key: str) -> None:
        position, crc32, read = output.file.starts[key], 0, 0
        pieces = output.tensors[key]
        for piece in pieces:
            for box in row_chunks(self.source.specs[piece.name], piece.box):
                if self.stop.is_set():
                    raise _StoppedError
                data = raw_bytes(self.source.read(piece.name, box))
                _write_at(self.descriptors[output.path], data, position)
                crc32 = zlib.crc32(data, crc32) if output.file.summed else 0
                position, read = position + len(data), read + len(data)
                if self.progress is not None:
                    with self.lock:
                        self.progress(len(data))
                if read >= CHUNK and self.mapped:  # pages can be had again, what was fetched cannot
                    self._release(pieces)
                    read = 0
        self.crc32[output.path][key] = crc32

    def _release(self, pieces: Iterable[TensorBox]) -> None:
        for name in {piece.name for piece in pieces}:
            self.source.release(name)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The numbers of an array as bytes, copied only where they do not lie in one piece."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data[:WRITE_BYTES], position)
        data, position = data[written:], position + written
