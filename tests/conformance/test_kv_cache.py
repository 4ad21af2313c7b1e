"""The key-value cache against attention over the whole history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from duetvl.core.backend import Backend
from duetvl.core.composed import ComposedKVCache
from duetvl.core.errors import ConfigError
from duetvl.core.kv_cache import Append, KVCache

from . import reference
from .cases import normal
from .tolerances import HALF, error

torch = pytest.importorskip("torch")

# One roundings of the result in half precision; in float32 the exponentials (see "exp" and "attention").
TOLERANCES = {"float32": 5e-6, "bfloat16": 4 * HALF["bfloat16"], "float16": 4 * HALF["float16"]}
SLOTS, CAPACITY, LAYERS = 4, 40, 2
# Each pass: (slot, new rows). Prefill whole and in pieces, decoding of several slots of different lengths, a full slot.
PASSES = (
    ((0, 7), (2, 1), (3, 12)),
    ((2, 5), (1, 3)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((3, 1), (0, 1)),
    ((1, 4), (0, 1), (2, 9)),
    ((3, 26), (2, 1)),
)


class Sequences:
    """What the cache should hold, in float64: keys and values of each slot, for one layer."""

    def __init__(self, groups: int, size: int):
        self.rows = {slot: (np.zeros((0, groups, size)), np.zeros((0, groups, size))) for slot in range(SLOTS)}

    def append(self, passes: tuple[tuple[int, int], ...]) -> Append:
        slots, new = (np.array(column) for column in zip(*passes, strict=True))
        return Append(slots, np.array([len(self.rows[int(s)][0]) for s in slots]), new)

    def attend(self, append: Append, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        outs, start = [], 0
        for slot, new in zip(append.slots.tolist(), append.new.tolist(), strict=True):
            rows = slice(start, start + new)
            start += new
            keys, values = self.rows[slot]
            self.rows[slot] = keys, values = np.concatenate([keys, k[rows]]), np.concatenate([values, v[rows]])
            outs.append(reference.attention_cached(*(torch.tensor(x) for x in (q[rows], keys, values))).numpy())
        return np.concatenate(outs)


def caches(be: Backend) -> Iterator[KVCache]:
    yield be.kv_cache
    yield ComposedKVCache(be.ops)


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (2, 2, 40), (6, 1, 80), (2, 1, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cached_attention_equals_full(be: Backend, dtype: str, heads: int, groups: int, size: int) -> None:
    for kv in caches(be):
        check(be, kv, dtype, heads, groups, size)


def check(be: Backend, kv: KVCache, dtype: str, heads: int, groups: int, size: int) -> None:
    cache = kv.cache_create(layers=LAYERS, slots=SLOTS, capacity=CAPACITY, kv_heads=groups, head_size=size, dtype=dtype)
    history = [Sequences(groups, size) for _ in range(LAYERS)]
    for step, passes in enumerate(PASSES):
        for layer in range(LAYERS):
            append = history[layer].append(passes)
            q, k, v = (
                reference.rounded(normal(append.rows, n, size, seed=10 * step + layer + 3 * i), dtype)
                for i, n in enumerate((heads, groups, groups))
            )
            kv.cache_append(cache, layer, be.ops.from_numpy(k, dtype), be.ops.from_numpy(v, dtype), append)
            out = kv.attention_cached(be.ops.from_numpy(q, dtype), cache, layer, append)
            assert be.ops.dtype_of(out) == dtype
            assert error(be.to_numpy(out), history[layer].attend(append, q, k, v)) < TOLERANCES[dtype]


def test_prefill_in_one_pass_or_several_is_the_same(be: Backend) -> None:
    q, k, v = (normal(30, n, 16, seed=i) for i, n in enumerate((4, 2, 2)))

    def in_pieces(*lengths: int) -> np.ndarray:
        cache = be.kv_cache.cache_create(layers=1, slots=2, capacity=30, kv_heads=2, head_size=16, dtype="float32")
        outs, done = [], 0
        for new in lengths:
            append = Append(np.array([1]), np.array([done]), np.array([new]))
            part = [be.ops.from_numpy(x[done : done + new], "float32") for x in (q, k, v)]
            be.kv_cache.cache_append(cache, 0, part[1], part[2], append)
            outs.append(be.to_numpy(be.kv_cache.attention_cached(part[0], cache, 0, append)))
            done += new
        return np.concatenate(outs)

    whole = in_pieces(30)
    for lengths in ((1,) * 30, (7, 1, 1, 21), (29, 1)):
        np.testing.assert_allclose(in_pieces(*lengths), whole, atol=5e-6)


def test_a_slot_can_be_used_again(be: Backend) -> None:
    """Rows beyond what `before` and `new` say are never seen."""
    cache = be.kv_cache.cache_create(layers=1, slots=1, capacity=8, kv_heads=1, head_size=16, dtype="float32")

    def run(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = (normal(rows, 1, 16, seed=seed + i).astype(np.float32) for i in range(3))
        append = Append(np.array([0]), np.array([0]), np.array([rows]))
        be.kv_cache.cache_append(cache, 0, be.ops.from_numpy(k), be.ops.from_numpy(v), append)
        out = be.kv_cache.attention_cached(be.ops.from_numpy(q), cache, 0, append)
        return be.to_numpy(out), reference.attention_cached(*(torch.tensor(x).double() for x in (q, k, v))).numpy()

    run(8, seed=1)
    np.testing.assert_allclose(*run(3, seed=5), atol=5e-6)


def test_overflow_is_refused_before_anything_is_written(be: Backend) -> None:
    cache: Any = be.kv_cache.cache_create(layers=1, slots=2, capacity=4, kv_heads=1, head_size=16, dtype="float32")
    rows = be.ops.zeros((4, 1, 16))
    with pytest.raises(ConfigError, match=r"slot 1 .* has 2 rows and room for 4; 3 more do not fit"):
        be.kv_cache.cache_append(cache, 0, rows, rows, Append(np.array([0, 1]), np.array([0, 2]), np.array([1, 3])))


def test_groups_that_do_not_divide_the_heads_are_refused(be: Backend) -> None:
    for kv in caches(be):
        cache = kv.cache_create(layers=1, slots=1, capacity=4, kv_heads=2, head_size=16, dtype="float32")
        with pytest.raises(ConfigError, match="7 query heads with 2 key-value groups"):
            kv.attention_cached(be.ops.zeros((1, 7, 16)), cache, 0, Append(np.array([0]), np.array([0]), np.array([1])))
