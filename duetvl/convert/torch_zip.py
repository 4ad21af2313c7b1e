"""Torch's zip container (`torch.save` since 1.6) without torch: read state dicts, and plan files to be written.

A file is a zip archive of stored (never compressed) records: `data.pkl`, a pickle in which tensors refer to storages by
key, and one record for each storage, `data/0`, `data/1`, ..., each aligned to 64 bytes.

**Reading is safe by construction.** The pickle is not unpickled: a small machine follows its instructions, and knows
none that imports or calls. It makes plain containers, and tensors where it meets torch's own functions for them; all
else (Megatron's arguments, optimizer and random state) becomes `OPAQUE`.

**Checksums.** Torch neither checks nor needs the crc32 of a record when it loads (2.13; `torch.save` can be told to
leave them out), other tools such as `unzip -t` do. They are written: they hide behind the disk (see tensor_files.py).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from duetvl.convert.streaming import PlannedFile
from duetvl.core.errors import CheckpointError
from duetvl.storage.tensor_files import NUMPY_DTYPES, TensorSpec

OPAQUE: Final = type("Opaque", (), {"__slots__": (), "__repr__": lambda self: "OPAQUE"})()
ALIGNMENT: Final = 64
_STORAGES: Final = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_STORAGE_OF: Final = {dtype: name for name, dtype in _STORAGES.items()}
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_UNREADABLE: Final = (
    ValueError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError, RecursionError, struct.error
)  # fmt: skip
_LIMIT32: Final = 0xFFFFFFFF
_AGAIN: Final = "copy or download it again"


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None  # None: bytes, each tensor says what they are
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: str
    spec: TensorSpec
    offset: int  # in numbers, as strides
    strides: tuple[int, ...]


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
                # Read-only: a private writable mapping larger than memory and swap is refused by the kernel.
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self._records = {name: _locate(self.path, self._map, info) for name, info in records.items()}
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
            if isinstance(value, _Tensor)
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
        numbers = np.frombuffer(self._map, dtype, size // dtype.itemsize, start)[tensor.offset :]
        if tensor.strides == _row_major(tensor.spec.shape):
            return numbers[:count].reshape(tensor.spec.shape)
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(numbers, tensor.spec.shape, strides, writeable=False)

    def release(self, name: str) -> None:
        """Give back the memory that pages of this tensor's storage occupy."""
        start, size = self._records[f"data/{self._tensors[name].storage}"]
        aligned = start - start % mmap.PAGESIZE
        if size and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, aligned, start + size - aligned)

    def _check_byteorder(self) -> None:
        start, size = self._records.get("byteorder", (0, 0))
        if self._map[start : start + size] not in (b"", b"little"):
            raise CheckpointError(f"{self.path}: was written on a big-endian machine; load and save it with torch here")

    def _read_pickle(self) -> Any:
        start, size = self._records["data.pkl"]
        try:
            return _Machine().run(self._map[start : start + size])
        except _UNREADABLE as error:
            cause = str(error) or type(error).__name__
            raise CheckpointError(f"{self.path}: is damaged: its data.pkl cannot be read ({cause}); {_AGAIN}") from None

    def _check_tensor(self, name: str, tensor: _Tensor) -> None:
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


class _Machine:
    """Follows the instructions of a pickle as far as they make plain data and tensors.

    `pickletools` decodes them; that only reads bytes. Keys of dicts other than strings and numbers are left out: none
    of ours, and hashing what an attacker nested a million times would end the process.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        if handler := _HANDLERS.get(name):
            handler(self)
        elif name in _MEMO_GET:
            self.stack.append(self.memo[int(argument)])
        elif name in _MEMO_PUT:
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif name == "GLOBAL":
            self.stack.append(_Global(argument.replace(" ", ".")))
        elif name == "INST":
            self._items()
            self.stack.append(OPAQUE)
        elif name in ("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"):
            self.stack.append(OPAQUE)
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name not in ("PROTO", "FRAME", "READONLY_BUFFER"):
            raise ValueError(f"unknown instruction {name}")

    def _items(self) -> list[Any]:
        """What lies above the last mark."""
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _set(self, flat: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_pairs(zip(flat[::2], flat[1::2], strict=True)))

    def _global_from_stack(self) -> None:
        module, name = self._top(2)
        self.stack.append(_Global(f"{module}.{name}"))

    def _reduce(self) -> None:
        function, arguments = self._top(2)
        self.stack.append(_rebuild(function, arguments))

    def _persistent(self) -> None:
        (pid,) = self._top(1)
        self.stack.append(_storage(pid))

    def _opaque(self, count: int) -> None:
        self._top(count)
        self.stack.append(OPAQUE)

    def _object(self) -> None:
        self._items()
        self.stack.append(OPAQUE)


_MEMO_GET: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MEMO_PUT: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_LITERALS: Final = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
})  # fmt: skip
_HANDLERS: Final[Mapping[str, Callable[[_Machine], Any]]] = {
    "MARK": lambda m: m.marks.append(len(m.stack)),
    "POP": lambda m: m.marks.pop() if m.marks and m.marks[-1] == len(m.stack) else m._top(1),
    "POP_MARK": lambda m: m._items(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "NONE": lambda m: m.stack.append(None),
    "NEWTRUE": lambda m: m.stack.append(True),
    "NEWFALSE": lambda m: m.stack.append(False),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_SET": lambda m: m.stack.append([]),
    "EMPTY_TUPLE": lambda m: m.stack.append(()),
    "TUPLE": lambda m: m.stack.append(tuple(m._items())),
    "TUPLE1": lambda m: m.stack.append(tuple(m._top(1))),
    "TUPLE2": lambda m: m.stack.append(tuple(m._top(2))),
    "TUPLE3": lambda m: m.stack.append(tuple(m._top(3))),
    "LIST": lambda m: m.stack.append(m._items()),
    "FROZENSET": lambda m: m.stack.append(m._items()),
    "DICT": lambda m: m.stack.append(_pairs(_by_two(m._items()))),
    "APPEND": lambda m: m._extend(m._top(1)),
    "APPENDS": lambda m: m._extend(m._items()),
    "ADDITEMS": lambda m: m._extend(m._items()),
    "SETITEM": lambda m: m._set(m._top(2)),
    "SETITEMS": lambda m: m._set(m._items()),
    "STACK_GLOBAL": lambda m: m._global_from_stack(),
    "REDUCE": lambda m: m._reduce(),
    "BINPERSID": lambda m: m._persistent(),
    "BUILD": lambda m: m._top(1),  # attributes of an object: of no use here
    "NEWOBJ": lambda m: m._opaque(2),
    "NEWOBJ_EX": lambda m: m._opaque(3),
    "OBJ": lambda m: m._object(),
}


def _by_two(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _pairs(pairs: Iterator[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: value for key, value in pairs if isinstance(key, (str, int, float, bytes, type(None)))}


def _rebuild(function: Any, arguments: Any) -> Any:
    """The result of a call where it is a tensor or a plain dict; nothing is called."""
    name = function.name if isinstance(function, _Global) else ""
    if not isinstance(arguments, tuple):
        return OPAQUE
    if name == "collections.OrderedDict":
        return _pairs(tuple(pair) for pair in arguments[0]) if arguments else {}
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    if name == "torch._utils._rebuild_tensor_v3":
        storage, offset, shape, strides = arguments[:4]
        return _tensor(storage, offset, shape, strides, arguments[6])
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name == "torch._tensor._rebuild_from_type_v2":
        return _rebuild(arguments[0], arguments[2])
    return OPAQUE


def _storage(pid: Any) -> Any:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Global):
        return OPAQUE
    module, _, kind = pid[1].name.rpartition(".")
    if (module, kind) == ("torch.storage", "UntypedStorage"):
        return _Storage(str(pid[2]), None, pid[4])
    return _Storage(str(pid[2]), _STORAGES[kind], pid[4]) if module == "torch" and kind in _STORAGES else OPAQUE


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any = None) -> Any:
    if not isinstance(storage, _Storage):
        return OPAQUE  # of a dtype that no weights have
    name = storage.dtype or (dtype.name.removeprefix("torch.") if isinstance(dtype, _Global) else "")
    if name not in NUMPY_DTYPES:
        return OPAQUE
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise ValueError(f"a tensor has the shape {shape}, strides {strides} and offset {offset}")
    return _Tensor(storage.key, TensorSpec(name, tuple(shape)), offset, tuple(strides))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    name: str
    size: int
    header: int  # position
    start: int
    content: bytes | None  # None: a tensor's


def plan_torch_file(
    sections: Mapping[str, Mapping[str, TensorSpec]],
    values: Mapping[str, float | int] | None = None,
    archive: str = "model_optim_rng",
) -> PlannedFile:
    """A file that `torch.load(weights_only=True)` reads, mapped or not, as `{section: {name: tensor}, **values}`.

    `starts` are by `SECTION.NAME`.
    """
    names = [f"{section}.{name}" for section, specs in sections.items() for name in specs]
    specs = [spec for tensors in sections.values() for spec in tensors.values()]
    contents: list[tuple[str, int, bytes | None]] = [
        (name, len(content), content)
        for name, content in (
            ("data.pkl", _pickle(sections, values or {})),
            (".format_version", b"1"),
            (".storage_alignment", str(ALIGNMENT).encode()),
            ("byteorder", b"little"),
        )
    ]
    contents += [(f"data/{number}", spec.nbytes, None) for number, spec in enumerate(specs)]
    identity = str(int.from_bytes(hashlib.sha256(contents[0][2] or b"").digest(), "big") % 10**40).zfill(40)
    contents += [("version", 2, b"3\n"), (".data/serialization_id", 40, identity.encode())]
    records = _place(archive, contents)
    end = records[-1].start + records[-1].size
    known = {record.name: record.content for record in records if record.content is not None}
    data = [record for record in records if record.content is None]

    def finish(crc32: Mapping[str, int]) -> list[tuple[int, bytes]]:
        sums = {record.name: crc32[name] for record, name in zip(data, names, strict=True)}
        sums |= {name: zlib.crc32(content) for name, content in known.items()}
        headers = [(record.header, _local_header(record, sums[record.name])) for record in records]
        return [*headers, (end, _central_directory(records, sums, end))]

    fixed = tuple((record.start, record.content) for record in records if record.content is not None)
    size = end + len(_central_directory(records, dict.fromkeys((r.name for r in records), 0), end))
    starts = {name: record.start for record, name in zip(data, names, strict=True)}
    return PlannedFile(size, starts, fixed, finish)


def _place(archive: str, contents: list[tuple[str, int, bytes | None]]) -> list[_Record]:
    records, position = [], 0
    for name, size, content in contents:
        full = f"{archive}/{name}"
        bare = position + 30 + len(full.encode()) + (20 if size >= _LIMIT32 else 0) + 4
        start = bare + -bare % ALIGNMENT
        records.append(_Record(full, size, position, start, content))
        position = start + size
    return records


def _local_header(record: _Record, crc32: int) -> bytes:
    """With an extra field (`FB`, as torch's) that fills up to the alignment."""
    name = record.name.encode()
    big = record.size >= _LIMIT32
    size = _LIMIT32 if big else record.size
    extra = struct.pack("<HHQQ", 1, 16, record.size, record.size) if big else b""
    padding = record.start - record.header - 30 - len(name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    version = 45 if big else 0
    return struct.pack(
        "<4s5H3I2H", b"PK\x03\x04", version, 0x800, 0, 0, 0x21, crc32, size, size, len(name), len(extra)
    ) + (name + extra)


def _central_directory(records: list[_Record], crc32: Mapping[str, int], start: int) -> bytes:
    out = BytesIO()
    for record in records:
        name, big, far = record.name.encode(), record.size >= _LIMIT32, record.header >= _LIMIT32
        wide = [record.size] * (2 * big) + [record.header] * far
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size, header, version = min(record.size, _LIMIT32), min(record.header, _LIMIT32), 45 if wide else 0
        out.write(
            struct.pack(
                "<4s6H3I5H2I", b"PK\x01\x02", version, version, 0x800, 0, 0, 0x21, crc32[record.name], size, size,
                len(name), len(extra), 0, 0, 0, 0, header,
            ) + name + extra
        )  # fmt: skip
    return out.getvalue() + _end_of_directory(len(records), len(out.getvalue()), start)


def _end_of_directory(count: int, size: int, start: int) -> bytes:
    wide = b""
    if count >= 0xFFFF or start >= _LIMIT32:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        wide += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    entries, offset = min(count, 0xFFFF), min(start, _LIMIT32)
    return wide + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, entries, entries, size, offset, 0)


def _pickle(sections: Mapping[str, Mapping[str, TensorSpec]], values: Mapping[str, float | int]) -> bytes:
    """Protocol 2, with no more than the instructions that torch's safe loader knows."""
    out = [b"\x80\x02}("]
    storage = 0
    for section, specs in sections.items():
        out += [_text(section), b"}("]
        for name, spec in specs.items():
            out += [_text(name), _pickled_tensor(str(storage), spec)]
            storage += 1
        out.append(b"u")
    for name, value in values.items():
        out += [_text(name), struct.pack(">cd", b"G", value) if isinstance(value, float) else _integer(value)]
    return b"".join([*out, b"u."])


def _pickled_tensor(key: str, spec: TensorSpec) -> bytes:
    """`_rebuild_tensor_v2(storage, 0, shape, strides, requires_grad=False, backward_hooks=OrderedDict())`."""
    kind = f"ctorch\n{_STORAGE_OF[spec.dtype]}\n".encode()
    storage = b"".join([b"(", _text("storage"), kind, _text(key), _text("cpu"), _integer(math.prod(spec.shape)), b"tQ"])
    shape, strides = (_integers(numbers) for numbers in (spec.shape, _row_major(spec.shape)))
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = [storage, _integer(0), shape, strides, b"\x89", hooks]
    return b"".join([b"ctorch._utils\n_rebuild_tensor_v2\n(", *arguments, b"tR"])


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integers(values: tuple[int, ...]) -> bytes:
    return b"".join([b"(", *map(_integer, values), b"t"])


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack("<cB", b"K", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
