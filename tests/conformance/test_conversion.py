"""Between arrays, files and tensors: from_numpy, checkpoint I/O, and the two mutators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, need

from duetvl.core.backend import Backend, load_backend
from duetvl.core.errors import BackendError
from duetvl.core.optimizer import ParameterGroup
from duetvl.core.params import Parameter

from .cases import normal
from .reference import rounded

torch = pytest.importorskip("torch")

FLOATS = ("float32", "bfloat16", "float16")
STORED: dict[str, Any] = {
    "float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "int64": np.int64, "int32": np.int32,
}  # fmt: skip


def bits(x: torch.Tensor) -> np.ndarray:
    """As safetensors stores it: bfloat16 as uint16."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def awkward() -> torch.Tensor:
    """Numbers whose rounding is easy to get wrong: ties, overflow, subnormals, signed zeros."""
    values = normal(64, 33).astype(np.float32)
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    values[0, :13] = [np.inf, -np.inf, 0.0, -0.0, 65519.0, 65520.0, 1e-7, 3e38, *ties]
    return torch.tensor(values)


# -- checkpoint I/O --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_load_casts_any_slice_of_a_map_to_nearest_even(be: Backend, tmp_path: Path, stored: str, dtype: str) -> None:
    source = awkward().to(getattr(torch, stored))
    path = tmp_path / "raw"
    bits(source).tofile(path)
    mapped = np.memmap(path, dtype=STORED[stored], mode="r", shape=tuple(source.shape))
    cuts = (np.s_[:], np.s_[3:9], np.s_[:, 5:20], np.s_[::2, 1:7], np.s_[0], np.s_[2:2], np.s_[5:6, 3:4])
    for cut in cuts:
        found, name = be.checkpoint_io.save(be.checkpoint_io.load(mapped[cut], stored, dtype))
        expected = bits(source[cut].contiguous().to(getattr(torch, dtype)))
        assert (name, found.dtype, found.shape) == (dtype, STORED[dtype], expected.shape)
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", sorted(STORED))
def test_round_trip_is_bit_exact(be: Backend, dtype: str) -> None:
    """Every bit pattern, not-a-numbers of bfloat16 included; a 0-d array stays one."""
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.int16).astype(np.int32)
    array = raw.astype(np.uint16) if dtype == "bfloat16" else raw.astype(STORED[dtype])
    for values in (array.reshape(256, 256), array[3:4].reshape(())):
        found, name = be.checkpoint_io.save(be.checkpoint_io.load(values, dtype, dtype))
        assert (name, found.shape) == (dtype, values.shape)
        np.testing.assert_array_equal(found, values)


def test_load_does_not_share_memory(be: Backend) -> None:
    array = np.ones((3, 4), np.float32)
    x = be.checkpoint_io.load(array, "float32", "float32")
    array[:] = 7.0
    assert be.to_numpy(x).tolist() == np.ones((3, 4)).tolist()


def test_save_of_a_view_is_contiguous(be: Backend) -> None:
    x = be.ops.from_numpy(normal(6, 4), "bfloat16")
    for view, expected in ((be.ops.transpose(x, (1, 0)), normal(6, 4).T), (x[:, 1:3], normal(6, 4)[:, 1:3])):
        found, _ = be.checkpoint_io.save(view)
        np.testing.assert_array_equal(found, bits(torch.tensor(expected).contiguous().bfloat16()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_backends_read_each_others_bits(be: Backend, dtype: str) -> None:
    need(*FRAMEWORKS)
    reader = load_backend("mindspore" if be.name == "torch_npu" else "torch_npu", device="cpu")
    raw, name = be.checkpoint_io.save(be.ops.from_numpy(awkward().numpy(), dtype))
    back, _ = reader.checkpoint_io.save(reader.checkpoint_io.load(raw, name, dtype))
    np.testing.assert_array_equal(back, raw)
    np.testing.assert_array_equal(raw, bits(awkward().to(getattr(torch, dtype))))


# -- arrays and dtypes -----------------------------------------------------------------------------------------------


def test_from_numpy_takes_any_array(be: Backend) -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    for array in (grid, grid[:, ::2], grid[::-1], grid.T, np.broadcast_to(grid[0], (2, 4)), grid[0, 0:1].reshape(())):
        x = be.ops.from_numpy(array)
        assert (tuple(x.shape), be.ops.dtype_of(x)) == (array.shape, "float32")
        np.testing.assert_array_equal(be.to_numpy(x), array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int64", "bool"])
def test_every_dtype_has_zeros_conversions_and_a_name(be: Backend, dtype: str) -> None:
    ops = be.ops
    zeros = ops.zeros((2, 3), dtype)
    assert (ops.dtype_of(zeros), be.to_numpy(zeros).tolist()) == (dtype, [[0] * 3] * 2)
    assert tuple(ops.zeros((), dtype).shape) == ()
    assert tuple(ops.zeros((0, 3), dtype).shape) == (0, 3)
    x = ops.from_numpy(np.array([0.0, 1.0, 2.5]), dtype)
    assert ops.dtype_of(x) == dtype
    expected = {"bool": [0, 1, 1], "int32": [0, 1, 2], "int64": [0, 1, 2]}.get(dtype, [0.0, 1.0, 2.5])
    assert be.to_numpy(ops.cast(x, "float32")).tolist() == expected
    assert ops.cast(x, dtype) is x


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_rounds_to_nearest_even_and_differentiates(be: Backend, dtype: str) -> None:
    ops = be.ops
    x = ops.from_numpy(awkward().numpy())
    np.testing.assert_array_equal(be.to_numpy(ops.cast(x, dtype)), rounded(awkward().numpy(), dtype))
    wide = ops.cast(ops.from_numpy(awkward().numpy(), dtype), "float32")
    np.testing.assert_array_equal(be.to_numpy(wide), rounded(awkward().numpy(), dtype))
    seed = normal(64, 33, seed=1).astype(np.float32)
    _, tape = be.autograd.run_stage(lambda _, x: ops.cast(x, dtype), [x], [])
    (dx,) = be.autograd.backward(tape, [ops.from_numpy(seed, dtype)])
    assert ops.dtype_of(dx) == "float32"
    np.testing.assert_array_equal(be.to_numpy(dx), rounded(seed, dtype))


# -- mutators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_mutators_write_in_place_and_cast(be: Backend, dtype: str) -> None:
    """A view made before sees the write, and so does an array over the same memory."""
    ops, values = be.ops, normal(6, 4)
    source = ops.from_numpy(values, "float32")
    whole, part = (np.zeros((6, 4)) for _ in range(2))
    whole[:], part[2:4] = values, values[1:3]
    for write, expected in (
        (lambda x: ops.assign(x, source), whole),
        (lambda x: ops.assign(x, ops.transpose(ops.from_numpy(values.T, "float32"), (1, 0))), whole),
        (lambda x: ops.write_slice(x, 2, source[1:3]), part),
        (lambda x: ops.write_slice(x, 2, source[1:1]), 0 * part),
    ):
        x = ops.zeros((6, 4), dtype)
        view, array = x[1:5], ops.to_numpy(x)
        write(x)
        np.testing.assert_array_equal(be.to_numpy(x), rounded(expected, dtype))
        np.testing.assert_array_equal(be.to_numpy(view), rounded(expected[1:5], dtype))
        if dtype != "bfloat16":  # whose array is a copy in float32
            np.testing.assert_array_equal(array, rounded(expected, dtype))


CUTS = {"first rows": np.s_[:2], "rows": np.s_[2:4], "columns": np.s_[:, 1:3], "one row": np.s_[3], "steps": np.s_[::2]}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_nothing_writes_through_a_slice(be: Backend, cut: Any) -> None:
    """On MindSpore a slice may be a copy, so that a write is lost: it is refused everywhere, and nothing changes."""
    ops, values = be.ops, normal(6, 4).astype(np.float32)
    base = ops.from_numpy(values.copy())
    part = base[cut]
    source = ops.zeros(tuple(part.shape))
    writes = (
        lambda: ops.assign(part, source),
        lambda: ops.write_slice(part, 0, source),
        lambda: be.optimizer.create([ParameterGroup([Parameter("w", part)])]),
    )
    for write in writes:
        with pytest.raises(BackendError, match="a write into a slice or a view of shape"):
            write()
    np.testing.assert_array_equal(be.to_numpy(base), values)


def test_nothing_writes_through_another_view(be: Backend) -> None:
    base = be.ops.from_numpy(normal(6, 4), "float32")
    for view in (be.ops.transpose(base, (1, 0)), be.ops.reshape(base, (4, 6))):
        with pytest.raises(BackendError, match=r"view of shape \(4, 6\)"):
            be.ops.assign(view, be.ops.zeros((4, 6)))
    assert be.to_numpy(base).tolist() == normal(6, 4).astype(np.float32).tolist()


def test_tensors_from_everywhere_may_be_written_into(be: Backend) -> None:
    """Whole ones, however they were made, of any dtype and of no elements."""
    ops = be.ops
    x = ops.from_numpy(normal(6, 4), "float32")
    made = [x, x * 2.0, ops.cast(x, "bfloat16"), ops.zeros(()), ops.zeros((0, 3))]
    made += [be.checkpoint_io.load(normal(3, 2).astype(np.float32), "float32", dtype) for dtype in FLOATS]
    made += [ops.from_numpy(normal(6, 4)[1:3], "float32"), ops.from_numpy(normal(6, 4).T, "float32")]
    for whole in made:
        ops.assign(whole, ops.zeros(tuple(whole.shape)) + 3.0)
        assert (be.to_numpy(whole) == 3.0).all()


def test_assign_to_other_kinds(be: Backend) -> None:
    ops = be.ops
    number, integers = ops.zeros(()), ops.zeros((2,), "int32")
    ops.assign(number, ops.from_numpy(np.array(3.0, np.float32)))
    ops.assign(integers, ops.from_numpy(np.array([3.0, -4.0], np.float32)))
    assert (be.to_numpy(number).tolist(), be.to_numpy(integers).tolist()) == (3.0, [3, -4])


def test_mutators_are_not_recorded(be: Backend) -> None:
    """A running sum kept beside a stage does not become part of its tape."""
    ops = be.ops
    total = ops.zeros((2,))

    def fn(x: Any) -> Any:
        y = x * 3.0
        ops.assign(total, y)
        return y * y

    _, tape = be.autograd.run_stage(lambda _, x: fn(x), [ops.from_numpy(np.array([1.0, 2.0], np.float32))], [])
    (dx,) = be.autograd.backward(tape, [ops.from_numpy(np.ones(2, np.float32))])
    assert (be.to_numpy(total).tolist(), be.to_numpy(dx).tolist()) == ([3.0, 6.0], [18.0, 36.0])
