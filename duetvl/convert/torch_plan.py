"""Planning a file of torch.save (torch_zip.py says what one is), to be written piece by piece without torch.

Torch neither checks nor needs the crc32 of a record when it loads (2.13; `torch.save` can be told to leave them out),
other tools such as `unzip -t` do. They are written: they hide behind the disk (see storage/tensor_files.py).
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Final

from duetvl.convert.streaming import PlannedFile
from duetvl.convert.torch_pickle import STORAGES
from duetvl.convert.torch_zip import row_major
from duetvl.storage.tensor_files import TensorSpec

ALIGNMENT: Final = 64
_STORAGE_OF: Final = {dtype: name for name, dtype in STORAGES.items()}
_LIMIT32: Final = 0xFFFFFFFF


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
    return PlannedFile(size, starts, fixed, finish, summed=True)


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
    shape, strides = (_integers(numbers) for numbers in (spec.shape, row_major(spec.shape)))
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
