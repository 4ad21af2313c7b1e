"""Safetensors files: mapped views of their tensors, and a writer that streams.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header, then the tensors end
to end. It is read here rather than with the safetensors library because that copies whole tensors, has no framework
"mindspore", and in numpy knows no bfloat16: here bfloat16 is uint16 bits under the dtype name "bfloat16".
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from duetvl.core.errors import CheckpointError
from duetvl.storage.files import json_value

NUMPY_DTYPES: Final = {
    "float64": "<f8",
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",  # its bits
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "|i1",
    "uint64": "<u8",
    "uint32": "<u4",
    "uint16": "<u2",
    "uint8": "|u1",
    "bool": "|b1",
}
_CODES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CODE_OF: Final = {name: code for code, name in _CODES.items()}
_MAX_HEADER: Final = 100_000_000  # the safetensors library's own limit
_CHUNK: Final = 1 << 24
# Bytes of one write. Of more at once Linux keeps each in as large pieces of memory as it can find, and where free
# memory lies in small ones the search takes longer than the write: 1.6 GB to ext4 on Linux 6.18 take 0.4 seconds of the
# processor in writes of 64 to 256 kB, and 0.8 to 2.0 in writes of 0.5 to 16 MB (load 13).
WRITE_BYTES: Final = 1 << 18
_AGAIN: Final = "copy or download it again"


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor: a dtype name of NUMPY_DTYPES, and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize


@dataclass(frozen=True)
class FileRecord:
    """A written file, as a manifest remembers it."""

    name: str
    size: int
    crc32: int


class Map:
    """A file that is mapped into memory, read-only: `data` is its bytes.

    A private writable map would count against memory, whatever of it is touched, and beyond memory and swap be refused.
    """

    def __init__(self, handle: BinaryIO):
        self.data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)

    def release(self, start: int, stop: int) -> None:
        """Give back the memory that pages of these bytes occupy; touching them again reads them again."""
        start -= start % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self.data.madvise(mmap.MADV_DONTNEED, start, stop - start)


class TensorFile:
    """A safetensors file that is mapped into memory; nothing is read before it is used.

    Opening checks the header against the file: CheckpointError names the file and the cause. The arrays are read-only.
    """

    def __init__(self, path: str | Path):
        """Map the file and check its header."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                header, self._start = _read_header(self.path, handle, size)
                self.metadata, self._offsets, self.specs = _read_entries(self.path, header)
                _check_layout(self.path, self._offsets, size - self._start)
                self._map = Map(handle)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def view(self, name: str) -> np.ndarray:
        """The tensor as an array over the file, without a copy (uint16 bits where its dtype is bfloat16)."""
        spec, (start, _) = self.specs[name], self._offsets[name]
        count = math.prod(spec.shape)
        if not count:  # numpy makes no array over zero bytes
            return np.empty(spec.shape, NUMPY_DTYPES[spec.dtype])
        flat = np.frombuffer(self._map.data, NUMPY_DTYPES[spec.dtype], count, self._start + start)
        return flat.reshape(spec.shape)

    def position(self, name: str) -> int:
        """Where in the file the tensor starts, to read tensors in the order of the disk."""
        return self._offsets[name][0]

    def release(self, name: str) -> None:
        """Give back the memory that pages of this tensor occupy; touching it again reads it again."""
        start, stop = (self._start + offset for offset in self._offsets[name])
        self._map.release(start, stop)


def write_tensor_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    fetch: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> FileRecord:
    """Write a safetensors file, one tensor at a time, and wait until it is on disk.

    `fetch(name)` gives a tensor's bits when its turn comes, so that no more than one is held on the host. The file is
    written under another name and renamed at the end. The checksum is zlib's crc32, taken on the way: at 3.9 GB/s
    (sha256: 1.8, blake2b: 0.9, one core, Python 3.11) it hides behind the disk, and it is there to find damage, not
    forgery.
    """
    header, starts = tensor_file_header(specs, metadata or {})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as handle:
            sink = _Sink(handle)
            sink.write(memoryview(header))
            for name in starts:
                sink.write(_raw_bytes(name, specs[name], fetch(name)))
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return FileRecord(path.name, sink.size, sink.crc32)


def tensor_file_header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file starts with, and where behind it each tensor starts, in the order of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, position = {}, 0
    # Wide dtypes first, as the safetensors library does: then every tensor is aligned.
    for name in sorted(specs, key=lambda name: -np.dtype(NUMPY_DTYPES[specs[name].dtype]).itemsize):
        spec, starts[name] = specs[name], position
        position += spec.nbytes
        span = [starts[name], position]
        header[name] = {"dtype": _CODE_OF[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, starts


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file as it is now."""
    size, crc32, buffer = 0, 0, memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            size, crc32 = size + count, zlib.crc32(buffer[:count], crc32)
    return FileRecord(path.name, size, crc32)


class _Sink:
    """A file that counts and sums what is written to it."""

    def __init__(self, handle: Any):
        self.handle, self.size, self.crc32 = handle, 0, 0

    def write(self, data: memoryview) -> None:
        while len(data):  # an unbuffered file may take less than it is given
            written = self.handle.write(data[:WRITE_BYTES])
            self.size, self.crc32 = self.size + written, zlib.crc32(data[:written], self.crc32)
            data = data[written:]


def _raw_bytes(name: str, spec: TensorSpec, array: np.ndarray) -> memoryview:
    wanted = np.dtype(NUMPY_DTYPES[spec.dtype])
    if array.dtype != wanted or tuple(array.shape) != spec.shape:
        raise ValueError(f"{name}: announced as {spec}, handed over as {array.dtype} {array.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_header(path: Path, handle: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data starts."""
    first = handle.read(8)
    if first == b"version ":
        raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory")
    if len(first) < 8:
        raise CheckpointError(f"{path}: is truncated: {size} bytes, too few for a safetensors file; {_AGAIN}")
    (length,) = struct.unpack("<Q", first)
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: is not a safetensors file: its header claims {length} bytes")
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: is truncated: its header has {length} bytes, the file only {size} in all; {_AGAIN}"
        )
    try:
        header = json_value(handle.read(length))
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: its header is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _read_entries(
    path: Path, header: dict[str, Any]
) -> tuple[dict[str, str], dict[str, tuple[int, int]], dict[str, TensorSpec]]:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: is damaged: the metadata in its header is not a map of strings; {_AGAIN}")
    offsets, specs = {}, {}
    for name, entry in header.items():
        try:
            offsets[name], specs[name] = _read_entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot read the tensor {name!r} of its header: {error}") from None
    return metadata, offsets, specs


def _read_entry(entry: Any) -> tuple[tuple[int, int], TensorSpec]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("dtype, shape and data_offsets are needed")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        raise ValueError(f"dtype {code!r} is not one that duetvl reads ({', '.join(_CODES)})")
    if not _sizes(shape) or not _sizes(span) or len(span) != 2:
        raise ValueError(f"shape {shape} or data_offsets {span} are not natural numbers")
    spec = TensorSpec(_CODES[code], tuple(shape))
    if span[1] - span[0] != spec.nbytes:
        raise ValueError(f"{code} {shape} takes {spec.nbytes} bytes, data_offsets {span} hold {span[1] - span[0]}")
    return (span[0], span[1]), spec


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_layout(path: Path, offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    """The tensors must fill the data from end to end, each byte once."""
    position = 0
    for name, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
        if start != position:
            kind = "overlaps the one before it" if start < position else f"leaves a hole of {start - position} bytes"
            raise CheckpointError(f"{path}: is damaged: the tensor {name!r} {kind}; {_AGAIN}")
        if stop > size:
            raise CheckpointError(
                f"{path}: is truncated: the tensor {name!r} ends at byte {stop} of the data, there are {size}; {_AGAIN}"
            )
        position = stop
    if position != size:
        raise CheckpointError(
            f"{path}: is damaged: {size - position} bytes follow the last tensor that its header knows; {_AGAIN}"
        )
