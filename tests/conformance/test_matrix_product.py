"""Products of numpy's arrays by oneDNN equal numpy's own in float64, however the operands lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("mindspore")

from duetvl.backends.mindspore import matrix_product
from duetvl.backends.mindspore.matrix_product import product, products

Array = np.ndarray
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "every second row": lambda x: np.repeat(x, 2, 0)[::2],
    "columns of a wider matrix": lambda x: np.concatenate([x, x], 1)[:, : x.shape[1]],
    "every second column": lambda x: np.repeat(x, 2, 1)[:, ::2],
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "one row for all": lambda x: np.broadcast_to(x[:1], x.shape),
}
SIZES = ((1, 5, 7), (2, 1, 3), (4, 3, 1), (9, 33, 70), (64, 16, 80), (100, 30, 7), (0, 4, 3), (3, 0, 4), (1, 1, 1))


def draw(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_library_is_there() -> None:
    """Where this fails MindSpore's wheel has changed, and all products are numpy's: right, and slower."""
    assert matrix_product._sgemm() is not None


@pytest.mark.parametrize("threads", [1, 3])
def test_products_in_every_layout(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "_threads", lambda: threads)
    monkeypatch.setattr(matrix_product, "WORTH_DIVIDING", 1)
    for rows, inner, columns in SIZES:
        for name, lay in LAYOUTS.items():
            a, b = lay(draw(rows, inner)), lay(draw(inner, columns))
            y = product(a, b)
            expected = a.astype(np.float64) @ b.astype(np.float64)
            assert (y.dtype, y.shape, y.flags.c_contiguous) == (np.float32, (rows, columns), True)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5, err_msg=f"{rows, inner, columns} {name}")


@pytest.mark.parametrize("worth_a_call", [1, 1 << 30])
def test_a_product_for_each_leading_place(worth_a_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_product, "WORTH_A_CALL", worth_a_call)
    a, b = draw(2, 3, 12, 5), draw(2, 3, 9, 5).swapaxes(-1, -2)
    np.testing.assert_allclose(products(a, b), np.matmul(a, b), rtol=1e-5, atol=1e-5)


def test_numpy_where_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = draw(9, 4), draw(4, 6)
    monkeypatch.setattr(matrix_product, "_sgemm", lambda: None)
    np.testing.assert_array_equal(product(a, b), np.matmul(a, b))
