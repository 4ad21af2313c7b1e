"""The key-value cache against attention in float64 numpy over the rows that the tables name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from duetvl.core.backend import Backend
from duetvl.core.composed import ComposedKVCache
from duetvl.core.errors import ConfigError
from duetvl.core.kv_cache import Append, KVCache

from . import reference
from .cases import normal
from .tolerances import HALF, error

pytest.importorskip("torch")  # the rounding of the inputs

# One rounding of the result in half precision and a few of the probabilities; in float32 the exponentials.
TOLERANCES = {"float32": 5e-6, "bfloat16": 4 * HALF["bfloat16"], "float16": 4 * HALF["float16"]}
LAYERS, BLOCKS, BLOCK = 2, 24, 16


class PassRows(NamedTuple):
    """One sequence of a pass: its blocks, the rows it has, those that it gets."""

    blocks: tuple[int, ...]
    before: int
    new: int


A, B, C, D = (0, 1, 2, 3), (9, 4, 17), (5, 6, 11), (20, 21)  # two of them broken, one at its second block
SHARING, COPY = (9, 4, 14), (12, 13)
PASSES: dict[str, Sequence[Sequence[PassRows]]] = {
    "prefill, chunks and decode in one pass": (
        (PassRows(A, 0, 7), PassRows(C, 0, 1), PassRows(D, 0, 12)),
        (PassRows(C, 1, 33), PassRows(B, 0, 20)),
        (PassRows(A, 7, 1), PassRows(B, 20, 1), PassRows(C, 34, 1), PassRows(D, 12, 1)),
        (PassRows(D, 13, 1), PassRows(A, 8, 1)),
        (PassRows(B, 21, 14), PassRows(A, 9, 40), PassRows(C, 35, 1), PassRows(D, 14, 4)),
        (PassRows(D, 18, 14), PassRows(A, 49, 15), PassRows(B, 35, 13)),  # all full
    ),
    "equal lengths": (
        (PassRows(A, 0, 20), PassRows(D, 0, 20), PassRows(COPY, 0, 20)),
        (PassRows(A, 20, 1), PassRows(D, 20, 1), PassRows(COPY, 20, 1)),
        (PassRows(COPY, 21, 1), PassRows(D, 21, 1), PassRows(A, 21, 1)),
    ),
    "shared blocks": (
        (PassRows(B, 0, 32),),
        (PassRows(SHARING, 32, 5), PassRows(B, 32, 3)),
        (PassRows(B, 35, 1), PassRows(SHARING, 37, 1)),
    ),
    "used again, and rows behind them that are not seen": (
        (PassRows(A, 0, 60),),
        (PassRows(A, 0, 3),),
        (PassRows(A, 3, 1), PassRows(D, 0, 2)),
    ),
}


def append_of(parts: Sequence[PassRows]) -> Append:
    most = max(len(part.blocks) for part in parts)
    tables = np.array([part.blocks + (-1,) * (most - len(part.blocks)) for part in parts], np.int32)
    return Append(tables, np.array([part.before for part in parts]), np.array([part.new for part in parts]))


class Expected:
    """Keys and values of one layer in float64, by block."""

    def __init__(self, groups: int, size: int, block: int = BLOCK):
        self.block = block
        self.keys, self.values = (np.zeros((BLOCKS, block, groups, size)) for _ in range(2))

    def attend(self, parts: Sequence[PassRows], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.write(parts, k, v)
        outs, start = [], 0
        for part in parts:
            held = part.before + part.new
            keys, values = (x[list(part.blocks)].reshape(-1, *k.shape[1:])[:held] for x in (self.keys, self.values))
            outs.append(attention(q[start : start + part.new], keys, values))
            start += part.new
        return np.concatenate(outs)

    def write(self, parts: Sequence[PassRows], k: np.ndarray, v: np.ndarray) -> None:
        places = [(p.blocks[r // self.block], r % self.block) for p in parts for r in range(p.before, p.before + p.new)]
        for (block, row), key, value in zip(places, k, v, strict=True):
            self.keys[block, row], self.values[block, row] = key, value


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The last rows of a sequence, q (N, H, K), against all of it, k and v (M, G, K)."""
    new, held, times = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, times, 1) for x in (k, v))
    scores = np.einsum("nhk,mhk->hnm", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.arange(held) > np.arange(held - new, held)[:, None], -np.inf, scores)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hnm,mhk->nhk", p / p.sum(-1, keepdims=True), v)


def caches(be: Backend) -> Iterator[KVCache]:
    yield be.kv_cache
    yield ComposedKVCache(be.ops)


def drawn(be: Backend, dtype: str, rows: int, heads: int, groups: int, size: int, seed: int) -> tuple[list, list]:
    """q, k and v as float64 arrays and as tensors of the same values."""
    shapes = (heads, groups, groups)
    arrays = [reference.rounded(normal(rows, n, size, seed=3 * seed + i), dtype) for i, n in enumerate(shapes)]
    return arrays, [be.ops.from_numpy(x, dtype) for x in arrays]


def created(kv: KVCache, dtype: str, groups: int, size: int, layers: int = LAYERS, block: int = BLOCK) -> Any:
    return kv.cache_create(layers=layers, blocks=BLOCKS, block_size=block, kv_heads=groups, head_size=size, dtype=dtype)


def extended(be: Backend, kv: KVCache, cache: Any, layer: int, plan: Any, tensors: Sequence[Any]) -> np.ndarray:
    q, k, v = tensors
    kv.cache_append(cache, layer, k, v, plan)
    out = kv.attention_cached(q, cache, layer, plan)
    assert be.ops.dtype_of(out) == be.ops.dtype_of(q)
    return be.to_numpy(out)


# The models' own heads, 2B, 7B and 72B; those of a rank that copies a key head for each query head; those of tests.
HEADS = [(12, 2, 128), (28, 4, 128), (16, 2, 128), (3, 3, 128), (4, 2, 16), (6, 1, 80), (2, 2, 40)]
COMPOSED_HEADS = [(3, 3, 128), (4, 2, 16), (6, 1, 80)]


@pytest.mark.parametrize(("heads", "groups", "size"), HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cached_attention_equals_full(be: Backend, dtype: str, heads: int, groups: int, size: int) -> None:
    composed = [ComposedKVCache(be.ops)] if (heads, groups, size) in COMPOSED_HEADS else []
    for kv in (be.kv_cache, *composed):
        for passes in PASSES.values():
            check(be, kv, passes, dtype, heads, groups, size)


@pytest.mark.parametrize("kind", [kind for kind in PASSES if kind != "shared blocks"])  # which are full
def test_every_block_size_does(be: Backend, kind: str) -> None:
    """That of the backend too: the same tables then hold more rows than they are used for."""
    for kv in caches(be):
        for block in (kv.block_size, 32):
            check(be, kv, PASSES[kind], "float32", 4, 2, 16, block)


def check(
    be: Backend, kv: KVCache, passes: Sequence[Sequence[PassRows]], dtype: str, heads: int, groups: int, size: int,
    block: int = BLOCK,
) -> None:  # fmt: skip
    cache = created(kv, dtype, groups, size, block=block)
    expected = [Expected(groups, size, block) for _ in range(LAYERS)]
    for step, parts in enumerate(passes):
        append = append_of(parts)
        plan = kv.plan(cache, append)
        for layer in range(LAYERS):
            arrays, tensors = drawn(be, dtype, append.rows, heads, groups, size, seed=10 * step + layer)
            found = extended(be, kv, cache, layer, plan, tensors)
            assert error(found, expected[layer].attend(parts, *arrays)) < TOLERANCES[dtype], (step, layer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copied_blocks_are_those_of_the_source_in_all_layers(be: Backend, dtype: str) -> None:
    """A second sequence goes on from a copy of the first one's blocks, and leaves these alone."""
    for kv in caches(be):
        cache, source, copy = created(kv, dtype, 2, 16), (3, 4, 5, 6), (10, 11, 12, 13)
        expected = [Expected(2, 16) for _ in range(LAYERS)]

        def run(parts: Sequence[PassRows], seed: int, kv=kv, cache=cache, expected=expected) -> None:
            append = append_of(parts)
            plan = kv.plan(cache, append)
            for layer in range(LAYERS):
                arrays, tensors = drawn(be, dtype, append.rows, 4, 2, 16, seed + layer)
                found = extended(be, kv, cache, layer, plan, tensors)
                assert error(found, expected[layer].attend(parts, *arrays)) < TOLERANCES[dtype]

        run([PassRows(source, 0, 40)], seed=0)
        kv.cache_copy(cache, source=3, target=10, count=3)
        for layer in expected:
            layer.keys[10:13], layer.values[10:13] = layer.keys[3:6], layer.values[3:6]
        run([PassRows(copy, 40, 2), PassRows(source, 40, 3)], seed=5)
        run([PassRows(source, 43, 1), PassRows(copy, 42, 18)], seed=10)


ROWS = 150  # more than two of the largest blocks' halves: what is read ends at three different places
PIECES = [(1,) * ROWS, (7, 1, 57, 64, 20, 1), (64, 85, 1), (3,) * 50, (149, 1)]
PLACES = [  # its blocks, and who is beside it
    ((9, 3, 12), ()),
    ((7, 8, 9), (PassRows((1, 2, 3), 0, 0), PassRows((4, 5, 6), 0, 0))),  # equally far apart
    ((9, 8, 7), (PassRows((13, 14, 15), 0, 0), PassRows((16, 17, 18, 19), 1, 0))),
]


@pytest.mark.parametrize(("heads", "groups", "size"), [(12, 2, 128), (3, 3, 128), (28, 4, 128), (6, 1, 80)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sequence_is_the_same_in_any_pieces_and_company(
    be: Backend, dtype: str, heads: int, groups: int, size: int
) -> None:
    """Bit for bit where the backend repeats bits: whole, in chunks, row by row, in any blocks, beside others."""
    kv = be.kv_cache
    arrays, _ = drawn(be, dtype, ROWS, heads, groups, size, seed=0)

    def in_pieces(lengths: Sequence[int], blocks: tuple[int, ...], *others: PassRows) -> np.ndarray:
        """What the sequence sees; the others come before it in each pass, with rows of their own."""
        cache, outs, done = created(kv, dtype, groups, size, 1, block=64), [], 0
        for new in lengths:
            company = [other._replace(before=other.before + done, new=new) for other in others]
            plan = kv.plan(cache, append_of([*company, PassRows(blocks, done, new)]))
            beside, _ = drawn(be, dtype, new * len(others), heads, groups, size, seed=1 + done)
            rows = [np.concatenate([y, x[done : done + new]]) for x, y in zip(arrays, beside, strict=True)]
            tensors = [be.ops.from_numpy(x, dtype) for x in rows]
            outs.append(extended(be, kv, cache, 0, plan, tensors)[-new:])
            done += new
        return np.concatenate(outs)

    whole = in_pieces((ROWS,), (2, 3, 4))
    for lengths in PIECES:
        for blocks, company in PLACES:
            found = in_pieces(lengths, blocks, *company)
            same = np.array_equal(found, whole)
            assert same if be.capabilities.bitwise_repeatable else error(found, whole) < TOLERANCES[dtype], lengths


def test_what_blocks_held_before_is_not_seen(be: Backend) -> None:
    """Not even numbers that are none: those of a request that failed."""
    for kv in caches(be):
        cache = created(kv, "float32", 2, 16, 1, kv.block_size)
        whole = append_of([PassRows((0, 1), 0, 2 * kv.block_size)])
        bad = be.ops.from_numpy(np.full((whole.rows, 2, 16), np.nan, np.float32))
        kv.cache_append(cache, 0, bad, bad, kv.plan(cache, whole))
        expected = Expected(2, 16, kv.block_size)
        before = 0
        for new in (3, 1, kv.block_size - 5, 1, 1, 7):  # up to the end of a block and over it
            parts = [PassRows((0, 1), before, new)]
            arrays, tensors = drawn(be, "float32", new, 4, 2, 16, seed=before)
            found = extended(be, kv, cache, 0, kv.plan(cache, append_of(parts)), tensors)
            assert error(found, expected.attend(parts, *arrays)) < TOLERANCES["float32"], (before, new)
            before += new


def test_a_pass_writes_its_own_rows_alone(be: Backend) -> None:
    """Whatever the tables: a copy of the other blocks, read before and after, is the same to the bit."""
    for kv in caches(be):
        cache = created(kv, "float32", 2, 16, layers=1)
        _, tensors = drawn(be, "float32", 64, 4, 2, 16, seed=1)
        extended(be, kv, cache, 0, kv.plan(cache, append_of([PassRows((6, 7, 8, 9), 0, 64)])), tensors)
        parts = [PassRows((5, 10), 0, 32), PassRows((4, 11), 0, 17), PassRows((12,), 0, 16)]
        _, others = drawn(be, "float32", 65, 4, 2, 16, seed=2)
        whole = append_of([PassRows((6, 7, 8, 9), 63, 1)])
        last = [x[63:] for x in tensors]
        before = extended(be, kv, cache, 0, kv.plan(cache, whole), last)
        extended(be, kv, cache, 0, kv.plan(cache, append_of(parts)), others)
        np.testing.assert_allclose(extended(be, kv, cache, 0, kv.plan(cache, whole), last), before, atol=1e-6)


# -- what makes no sense ----------------------------------------------------------------------------------------------


def test_a_pass_that_cannot_be_is_refused(be: Backend) -> None:
    for kv in caches(be):
        cache = created(kv, "float32", 1, 16)
        rows = r"sequence 1 of a pass has 10 rows in the key-value cache and room for 16; it adds 7"
        with pytest.raises(ConfigError, match=rows):
            kv.plan(cache, append_of([PassRows((0, 1, 2), 16, 5), PassRows((7,), 10, 7)]))
        with pytest.raises(ConfigError, match=r"sequence 0 .* adds 0: a pass adds at least one row"):
            kv.plan(cache, append_of([PassRows((0,), 4, 0)]))
        with pytest.raises(ConfigError, match=f"block {BLOCKS} of a key-value cache that has {BLOCKS}"):
            kv.plan(cache, append_of([PassRows((BLOCKS,), 0, 1)]))


@pytest.mark.parametrize("copy", [(0, 2, 3), (3, 1, 3), (0, BLOCKS - 1, 2), (-1, 5, 1), (0, 5, 0)])
def test_a_copy_that_cannot_be_is_refused(be: Backend, copy: tuple[int, int, int]) -> None:
    for kv in caches(be):
        with pytest.raises(ConfigError, match=f"a copy of {copy[2]} blocks from {copy[0]} to {copy[1]} in"):
            kv.cache_copy(created(kv, "float32", 1, 16), *copy)


def test_groups_that_do_not_divide_the_heads_are_refused(be: Backend) -> None:
    for kv in caches(be):
        cache = created(kv, "float32", 2, 16, layers=1)
        plan = kv.plan(cache, append_of([PassRows((0,), 0, 1)]))
        with pytest.raises(ConfigError, match="7 query heads with 2 key-value groups"):
            kv.attention_cached(be.ops.zeros((1, 7, 16)), cache, 0, plan)
