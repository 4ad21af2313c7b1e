"""Torch's zip container (`torch.save` since 1.6), read without torch.

A file is a zip archive of stored (never compressed) records: `data.pkl`, a pickle in which tensors refer to storages by
key (torch_pickle.py), and one record for each storage, `data/0`, `data/1`, ..., each aligned to 64 bytes. How one is
written is in torch_plan.py. Torch does not check the crc32 of a record when it loads, nor is it checked here.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.convert.torch_pickle import PickledTensor, read_pickle
from duetvl.core.errors import CheckpointError
from duetvl.storage.tensor_files import NUMPY_DTYPES, Map, TensorSpec

_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_AGAIN: Final = "copy or download it again"


class TorchFile:
    """The tensors in the top-level dicts of a file that torch saved, mapped; names are `SECTION.NAME`.

    `sections` is a regular expression for the keys of those dicts. Opening checks that every tensor is inside its
    storage: CheckpointError names file and cause. `root` is the whole content, with OPAQUE where it is none of ours.
    """

    def __init__(self, path: str | Path, sections: str = r"model\d*"):
        """Map the file, read its pickle, and check its tensors."""
        self.path = Path(path)
        try:
            records = _read_directory(self.path)
            with open(self.path, "rb") as handle:
                self._map = Map(handle)
            self._records = {name: _locate(self.path, self._map.data, info) for name, info in records.items()}
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        self._check_byteorder()
        self.root = self._read_pickle()
        tops = self.root.items() if isinstance(self.root, dict) else ()
        self.sections = [key for key, value in tops if isinstance(value, dict) and re.fullmatch(sections, str(key))]
        self._tensors = {
            f"{section}.{name}": value
            for section in self.sections
            for name, value in self.root[section].items()
            if isinstance(value, PickledTensor)
        }
        for name, tensor in self._tensors.items():
            self._check_tensor(name, tensor)
        self.specs: Mapping[str, TensorSpec] = {name: tensor.spec for name, tensor in self._tensors.items()}

    def view(self, name: str) -> np.ndarray:
        """The tensor as an array over the file, without a copy (uint16 bits where its dtype is bfloat16)."""
        tensor = self._tensors[name]
        dtype, count = np.dtype(NUMPY_DTYPES[tensor.spec.dtype]), math.prod(tensor.spec.shape)
        if not count:  # numpy makes no array over zero bytes
            return np.empty(tensor.spec.shape, dtype)
        start, size = self._records[f"data/{tensor.storage}"]
        numbers = np.frombuffer(self._map.data, dtype, size // dtype.itemsize, start)[tensor.offset :]
        if tensor.strides == row_major(tensor.spec.shape):
            return numbers[:count].reshape(tensor.spec.shape)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers, tensor.spec.shape, strides, writeable=False)

    def release(self, name: str) -> None:
        """Give back the memory that pages of this tensor's storage occupy."""
        start, size = self._records[f"data/{self._tensors[name].storage}"]
        self._map.release(start, start + size)

    def _check_byteorder(self) -> None:
        start, size = self._records.get("byteorder", (0, 0))
        if self._map.data[start : start + size] not in (b"", b"little"):
            raise CheckpointError(f"{self.path}: was written on a big-endian machine; load and save it with torch here")

    def _read_pickle(self) -> Any:
        start, size = self._records["data.pkl"]
        try:
            return read_pickle(self._map.data[start : start + size])
        except ValueError as error:
            raise CheckpointError(f"{self.path}: is damaged: its data.pkl cannot be read ({error}); {_AGAIN}") from None

    def _check_tensor(self, name: str, tensor: PickledTensor) -> None:
        where = self._records.get(f"data/{tensor.storage}")
        if where is None:
            raise CheckpointError(f"{self.path}: is damaged: the storage of {name!r} is absent; {_AGAIN}")
        steps = sum((size - 1) * stride for size, stride in zip(tensor.spec.shape, tensor.strides, strict=True))
        itemsize = np.dtype(NUMPY_DTYPES[tensor.spec.dtype]).itemsize
        if math.prod(tensor.spec.shape) and (tensor.offset + steps + 1) * itemsize > where[1]:
            raise CheckpointError(
                f"{self.path}: is damaged: {name!r} {list(tensor.spec.shape)} reaches beyond the {where[1]} bytes of "
                f"its storage; {_AGAIN}"
            )


def _read_directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The records by name, without the archive's own."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"{path}: {_why_no_zip(path, error)}") from None
    roots = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError(f"{path}: is a zip archive, but not one that torch.save made: it has no data.pkl")
    return {info.filename.removeprefix(roots[0]): info for info in infos if info.filename.startswith(roots[0])}


def _why_no_zip(path: Path, error: Exception) -> str:
    with open(path, "rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    if head.startswith(_LEGACY):
        return "has the format that torch wrote before 1.6; load and save it with a newer torch"
    kind = "is truncated or damaged" if head.startswith(b"PK") else "is no file of torch.save"
    return f"{kind} ({error}); {_AGAIN}"


def _locate(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a record's bytes start, and how many there are."""
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: is damaged: no record {info.filename!r} where its directory says; {_AGAIN}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: the record {info.filename!r} is compressed, which torch never does; unpack it")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + info.file_size > len(data):
        raise CheckpointError(f"{path}: is truncated: the record {info.filename!r} ends beyond it; {_AGAIN}")
    return start, info.file_size


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array without gaps, counted in numbers."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
