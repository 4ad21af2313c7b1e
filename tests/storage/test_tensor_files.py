"""Safetensors files: the same as the library's, and one clear error for every kind of damage."""

from __future__ import annotations

import json
import os
import struct
import zlib

import numpy as np
import pytest

from duetvl.core.errors import CheckpointError
from duetvl.storage.tensor_files import NUMPY_DTYPES, FileRecord, TensorFile, TensorSpec, file_record, write_tensor_file

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "mask": np.array([True, False, True]),
    "half": RANDOM.standard_normal((3, 5)).astype(np.float16),
    "bits": RANDOM.integers(0, 1 << 16, (4, 3), dtype=np.uint16),
    "empty": np.zeros((0, 4), np.float32),
    "single": np.array(2.5, np.float32),
    "wide": RANDOM.standard_normal((2, 3, 4)),
    "näme 名": np.arange(7, dtype=np.int64),
}
SPECS = {name: TensorSpec("bfloat16" if name == "bits" else x.dtype.name, x.shape) for name, x in ARRAYS.items()}


def write(path, metadata=None):
    return write_tensor_file(path, SPECS, ARRAYS.__getitem__, metadata)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), span=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_round_trip_and_record(tmp_path):
    record = write(tmp_path / "a.safetensors", {"format": "pt"})
    data = (tmp_path / "a.safetensors").read_bytes()
    assert record == FileRecord("a.safetensors", len(data), zlib.crc32(data)) == file_record(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.specs == SPECS
    for name, array in ARRAYS.items():
        view = file.view(name)
        assert not view.flags.writeable or not view.size
        assert view.flags.aligned
        assert view.shape == array.shape
        assert np.array_equal(view, array)


def test_a_view_cannot_be_written_to(tmp_path):
    write(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        file.view("wide")[...] = 0
    file.release("wide")
    assert np.array_equal(file.view("wide"), ARRAYS["wide"])


def test_a_file_larger_than_all_memory_is_mapped(tmp_path):
    """Sparse: 2 TiB of zeros that take a few kilobytes of the disk."""
    count = 1 << 40
    path = raw_file(tmp_path / "huge.safetensors", {"a": entry("BF16", [count], [0, 2 * count])})
    start = path.stat().st_size
    try:
        os.truncate(path, start + 2 * count)
    except OSError:
        pytest.skip("this file system has no files of 2 TiB")
    file = TensorFile(path)
    assert file.view("a").shape == (count,)
    assert file.view("a")[count - 1] == 0


def test_the_library_reads_ours(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    write(tmp_path / "a.safetensors", {"format": "pt"})
    found = safetensors_torch.load_file(tmp_path / "a.safetensors")
    assert found["bits"].dtype == torch.bfloat16
    assert np.array_equal(found["bits"].view(torch.int16).numpy().view(np.uint16), ARRAYS["bits"])
    assert all(np.array_equal(found[name].numpy(), x) for name, x in ARRAYS.items() if name != "bits")


def test_we_read_the_library_s(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(x) for name, x in ARRAYS.items() if name != "bits"}
    tensors["bits"] = torch.from_numpy(ARRAYS["bits"].view(np.int16)).view(torch.bfloat16)
    safetensors_torch.save_file(tensors, tmp_path / "b.safetensors", {"note": "x"})
    file = TensorFile(tmp_path / "b.safetensors")
    assert file.specs == SPECS
    assert file.metadata == {"note": "x"}
    assert all(np.array_equal(file.view(name), x) for name, x in ARRAYS.items())


def test_every_dtype_of_the_library(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    arrays = {name: np.arange(3).astype(code) for name, code in NUMPY_DTYPES.items() if name != "bfloat16"}
    safetensors_numpy.save_file(arrays, tmp_path / "a.safetensors")
    assert {n: s.dtype for n, s in TensorFile(tmp_path / "a.safetensors").specs.items()} == {n: n for n in arrays}


def test_header_of_odd_length(tmp_path):
    """As early versions of the library wrote them: the data is not aligned, and still right."""
    path = raw_file(tmp_path / "a.safetensors", b'{"a":' + json.dumps(entry()).encode() + b"}" + b" " * 3)
    path.write_bytes(path.read_bytes() + np.array([1, 2], np.float32).tobytes())
    assert TensorFile(path).view("a").tolist() == [1.0, 2.0]


def test_truncation_at_every_byte(tmp_path):
    path, cut = tmp_path / "a.safetensors", tmp_path / "cut.safetensors"
    write(path)
    data = path.read_bytes()
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: is truncated: .*copy or download it again"):
            TensorFile(cut)


@pytest.mark.parametrize(
    ("header", "data", "cause"),
    [
        (b"{", b"", "not valid JSON"),
        (b"\xff\xfe{}", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "the key 'a' is given twice in one object"),
        ({"__metadata__": {"a": 1}}, b"", "metadata in its header is not a map of strings"),
        ({"a": 3}, b"", "'a' of its header: dtype, shape and data_offsets are needed"),
        ({"a": {"dtype": "F32"}}, b"", "dtype, shape and data_offsets are needed"),
        ({"a": entry("F8_E4M3", (8,))}, b"\0" * 8, r"dtype 'F8_E4M3' is not one that duetvl reads \(F64, F32"),
        ({"a": entry(["F32"])}, b"\0" * 8, "is not one that duetvl reads"),
        ({"a": entry(shape=[-2])}, b"\0" * 8, "not natural numbers"),
        ({"a": entry(shape=[True])}, b"\0" * 8, "not natural numbers"),
        ({"a": entry(shape=[2.0])}, b"\0" * 8, "not natural numbers"),
        ({"a": entry(span=(0, 8, 8))}, b"\0" * 8, "not natural numbers"),
        ({"a": entry(shape=[1 << 62, 1 << 62])}, b"\0" * 8, "takes .* bytes, data_offsets .* hold 8"),
        ({"a": entry(span=(8, 0))}, b"\0" * 8, "hold -8"),
        ({"a": entry(shape=[3])}, b"\0" * 8, "F32 .3. takes 12 bytes, data_offsets .0, 8. hold 8"),
        ({"a": entry(), "b": entry(span=(4, 12))}, b"\0" * 12, "'b' overlaps the one before it"),
        ({"a": entry(), "b": entry(span=(12, 20))}, b"\0" * 20, "'b' leaves a hole of 4 bytes"),
        ({"a": entry()}, b"\0" * 11, "3 bytes follow the last tensor"),
    ],
)
def test_damaged_headers(tmp_path, header, data, cause):
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=cause) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_tensor_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file: its header claims 1152921504606846976 bytes"):
        TensorFile(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        TensorFile(path)
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        TensorFile(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        TensorFile(tmp_path / "absent.safetensors")


def test_a_failing_write_leaves_no_file(tmp_path):
    def fetch(name):
        if name == "half":
            raise RuntimeError("lost the device")
        return ARRAYS[name]

    with pytest.raises(RuntimeError, match="lost the device"):
        write_tensor_file(tmp_path / "a.safetensors", SPECS, fetch)
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_not_as_announced(tmp_path):
    with pytest.raises(ValueError, match="half: announced as"):
        write_tensor_file(
            tmp_path / "a.safetensors", SPECS, lambda name: ARRAYS[name][:1] if name == "half" else ARRAYS[name]
        )
