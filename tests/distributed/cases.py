"""What four real processes check. Each case runs on every rank; a case that raises on any rank fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np

from duetvl.core.backend import Backend
from duetvl.core.collectives import Receive, Send
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter
from duetvl.core.ranks import Ranks
from duetvl.data.loading.peers import Peers
from duetvl.parallel import differentiable as par
from duetvl.parallel.differentiable import Team

WORLD = 4
MESH = Mesh(dp=2, tp=2)
SUMMED = ("float32", "bfloat16", "float16", "int32", "int64")
MOVED = (*SUMMED, "bool")
UNEVEN = [3, 0, 1, 2]
CASES: dict[str, Callable[[Backend], None]] = {}


def case(check: Callable[[Backend], None]) -> Callable[[Backend], None]:
    """Run this in the world of four."""
    CASES[check.__name__] = check
    return check


def values(rank: int, *shape: int, low: int = -4) -> np.ndarray:
    """Small whole numbers, exact in every dtype and known on every rank: those of `rank`."""
    return np.random.default_rng([rank, *shape]).integers(low, 5, shape).astype(np.float32)


def same(be: Backend, found: Any, wanted: np.ndarray, dtype: str | None = None) -> None:
    """Equal to the last bit, in shape and, if given, in dtype."""
    assert dtype is None or be.ops.dtype_of(found) == dtype, (be.ops.dtype_of(found), dtype)
    array = be.to_numpy(found)
    assert array.shape == wanted.shape, (array.shape, wanted.shape)
    np.testing.assert_array_equal(array.astype(np.float64), wanted.astype(np.float64))


def close(be: Backend, found: Any, wanted: np.ndarray) -> None:
    """Equal up to the order of float32 sums."""
    np.testing.assert_allclose(be.to_numpy(found), wanted, rtol=2e-5, atol=2e-5)


@case
def ranks_decide_together(be: Backend) -> None:
    ranks = Ranks(be.collectives)
    assert (ranks.index, ranks.count, ranks.writes) == (be.collectives.rank, WORLD, be.collectives.rank == 0)
    assert ranks.sum([0.1 * (ranks.index + 1), 1.0]) == [0.1 + 0.2 + 0.1 * 3 + 0.4, 4.0]
    assert ranks.any(ranks.index == 2)
    assert not ranks.any(False)
    assert ranks.agree(f"the clock of {ranks.index}") == "the clock of 0"


@case
def the_data_threads_talk_while_the_main_thread_does(be: Backend) -> None:
    """By channels of their own, whose addresses went over the framework's once."""
    engine = be.collectives
    peers = Peers.meet(Mesh(dp=2, tp=2), engine.rank, engine.meeting_host(), engine.gather_objects)
    assert peers.team == ([0, 1], [2, 3])[engine.rank // 2]
    parcels = [(engine.rank, np.full(1 << 16, to)) for to in range(engine.size)]
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(lambda: [peers.pixels.route(parcels) for _ in range(5)])
        for _ in range(5):
            assert engine.gather_objects(engine.rank) == list(range(engine.size))
        for received in told.result():
            assert [rank for rank, _ in received] == list(range(engine.size))
            assert all((array == engine.rank).all() for _, array in received)
    peers.close()


# -- a checkpoint of many ranks ---------------------------------------------------------------------------------------


@case
def a_checkpoint_that_four_ranks_write_is_read_by_any_layout(be: Backend) -> None:
    import divided_checkpoint

    divided_checkpoint.check(be)


@case
def an_error_of_one_rank_is_raised_on_all(be: Backend) -> None:
    import starting  # as below

    starting.errors_are_shared(be)


@case
def a_start_that_one_rank_makes_otherwise_is_refused(be: Backend) -> None:
    import starting

    starting.a_start_is_refused(be)


# -- a model divided over ranks ----------------------------------------------------------------------------------------


def mesh_of(ranks: int) -> Mesh:
    """Of tensor parallelism; of three ranks, the fourth is alone."""
    return MESH if ranks == 2 else Mesh(tp=ranks)


def divided(be: Backend, over: int | Mesh, family: str, heads: tuple[int, int], *of: Any, **how: Any) -> None:
    import divided_models as models  # where the cases run; pytest, which reads their names, knows a package

    mesh = mesh_of(over) if isinstance(over, int) else over
    models.check(be, models.Whole(family, *heads, *of), mesh, **how)


@case
def a_model_over_two_ranks(be: Backend) -> None:
    divided(be, 2, "qwen2_5_vl", (4, 2), recompute="full")
    divided(be, 2, "qwen2_vl", (4, 2), vision="shard")


@case
def a_model_over_two_ranks_with_sequence_parallel(be: Backend) -> None:
    divided(be, 2, "qwen2_5_vl", (4, 2), sequence=True, vision="shard", recompute="selective")
    divided(be, 2, "qwen2_vl", (4, 2), sequence=True)


@case
def a_model_over_four_ranks_with_copies_of_key_heads(be: Backend) -> None:
    divided(be, 4, "qwen2_vl", (8, 2), recompute="language")
    divided(be, 4, "qwen2_5_vl", (8, 2), sequence=True, vision="shard", recompute="full")


@case
def a_model_over_three_ranks_with_uneven_heads(be: Backend) -> None:
    divided(be, 3, "qwen2_5_vl", (14, 2), sequence=True)
    divided(be, 3, "qwen2_vl", (8, 2), vision="shard", recompute="vision")


@case
def adapters_of_every_kind_of_layer(be: Backend) -> None:
    """With dropout, whose masks are those of one process; DoRA's row norms are of whole rows."""
    divided(be, 2, "qwen2_5_vl", (4, 2), "dora", sequence=True, recompute="selective", chosen=(0, 3))
    divided(be, 2, "qwen2_vl", (4, 2), "dora", sequence=True, vision="shard", chosen=(0,))
    divided(be, 4, "qwen2_5_vl", (8, 2), "lora", vision="shard", chosen=(0,))


@case
def adapters_start_and_are_read_as_on_one_process(be: Backend) -> None:
    import divided_models as models

    models.check_adapters(be, models.Whole("qwen2_vl", 4, 2), mesh_of(2), sequence=True)
    models.check_adapters(be, models.Whole("qwen2_5_vl", 8, 2), mesh_of(4), vision="shard")


@case
def what_a_recipe_prepares_is_divided(be: Backend) -> None:
    import prepared

    prepared.check_prepared(be)


@case
def a_tower_alone_is_trained_on_fewer_frames_than_ranks(be: Backend) -> None:
    """A rank without a frame takes part in the backward pass of the others."""
    divided(be, 4, "qwen2_vl", (8, 2), "full", ("language",), chosen=(2, 3))
    divided(be, 2, "qwen2_5_vl", (4, 2), "lora", ("language", "vision"), sequence=True, chosen=(2,))


@case
def answers_of_a_divided_model(be: Backend) -> None:
    import divided_models as models

    for ranks, heads, how in (
        (2, (4, 2), {"sequence": True}),
        (3, (8, 2), {"vision": "shard"}),
        (4, (8, 2), {"sequence": True, "vision": "shard"}),
    ):
        models.check_cache(be, models.Whole("qwen2_5_vl", *heads), mesh_of(ranks), **how)


# -- context parallelism -----------------------------------------------------------------------------------------------


@case
def a_model_over_ranks_that_exchange_heads(be: Backend) -> None:
    divided(be, Mesh(dp=2, cp=2), "qwen2_5_vl", (4, 2), recompute="full")
    divided(be, Mesh(cp=3), "qwen2_vl", (8, 2))
    divided(be, Mesh(cp=4), "qwen2_5_vl", (8, 2), recompute="language")


@case
def a_model_over_a_ring(be: Backend) -> None:
    divided(be, Mesh(dp=2, cp=2), "qwen2_vl", (4, 2), ulysses=1, recompute="full")
    divided(be, Mesh(cp=3), "qwen2_5_vl", (14, 2), ulysses=1)
    divided(be, Mesh(cp=4), "qwen2_vl", (8, 2), ulysses=1, recompute="selective")


@case
def a_model_over_rings_of_ranks_that_exchange_heads(be: Backend) -> None:
    divided(be, Mesh(cp=4), "qwen2_5_vl", (6, 3), ulysses=2)  # the second of two ranks needs a copy of a key head
    divided(be, Mesh(cp=4), "qwen2_vl", (4, 2), ulysses=2, recompute="full")


@case
def a_model_over_context_and_tensor_parallelism(be: Backend) -> None:
    divided(be, Mesh(cp=2, tp=2), "qwen2_5_vl", (8, 2), sequence=True, vision="shard", recompute="full")
    divided(be, Mesh(cp=2, tp=2), "qwen2_vl", (14, 2))
    divided(be, Mesh(cp=2, tp=2), "qwen2_5_vl", (4, 2), ulysses=1, sequence=True)
    divided(be, Mesh(cp=2, tp=2), "qwen2_vl", (6, 3), ulysses=1, vision="shard")


@case
def adapters_over_context_parallelism(be: Backend) -> None:
    """With dropout, whose masks are those of one process."""
    divided(be, Mesh(dp=2, cp=2), "qwen2_5_vl", (4, 2), "lora", ulysses=1, recompute="selective", chosen=(0, 3))
    divided(be, Mesh(cp=2, tp=2), "qwen2_vl", (4, 2), "dora", ulysses=1, sequence=True, chosen=(0,))
    divided(be, Mesh(cp=4), "qwen2_5_vl", (4, 2), "lora", ("language", "vision"), ulysses=2, chosen=(2,))


@case
def pairs_over_context_parallelism(be: Backend) -> None:
    divided(be, Mesh(dp=2, cp=2), "qwen2_5_vl", (4, 2), loss="ipo", chosen=(4, 2))
    divided(be, Mesh(cp=2, tp=2), "qwen2_vl", (4, 2), loss="sigmoid", ulysses=1, sequence=True, chosen=(4, 2))


@case
def answers_of_a_model_over_context_parallelism(be: Backend) -> None:
    import divided_models as models

    models.check_cache(be, models.Whole("qwen2_5_vl", 4, 2), Mesh(cp=2, tp=2), sequence=True)
    models.check_cache(be, models.Whole("qwen2_vl", 4, 2), Mesh(cp=4), ulysses=2)


# -- training over ranks (steps.py) ------------------------------------------------------------------------------------


def imported(module: str, name: str) -> None:
    """A check of a module that the ranks import alone: pytest knows this directory as a package."""

    def check(be: Backend) -> None:
        getattr(import_module(module), name)(be)

    check.__name__ = name.replace("check_", f"{module}_")
    case(check)


for each in (
    "check_training_stages", "check_virtual_stages", "check_pipelines_together", "check_rows", "check_stages",
    "check_traffic", "check_another_world", "check_plain", "check_uneven", "check_divided", "check_sharded",
    "check_adapters", "check_preferences", "check_half", "check_overflow", "check_not_finite", "check_edges",
):  # fmt: skip
    imported("steps", each)


for each in (
    "check_context", "check_context_in_pipelines", "check_context_of_pairs", "check_context_not_finite",
    "check_context_traffic", "check_half_over_a_ring",
):  # fmt: skip
    imported("context_steps", each)


# -- whole runs (whole_runs.py) ----------------------------------------------------------------------------------------

for each in (
    "check_other_data", "check_bad_record_of_one_rank", "check_stops", "check_watching", "check_odd_sizes",
    "check_memory_of_one_rank",
):  # fmt: skip
    imported("whole_runs", each)


# -- answering (engines.py) --------------------------------------------------------------------------------------------

for each in ("check_engines", "check_engines_with_one_key_head"):
    imported("engines", each)


# -- collectives over all ranks ----------------------------------------------------------------------------------------


@case
def all_reduce_sums_and_maxima(be: Backend) -> None:
    c = be.collectives
    parts = np.stack([values(r, 3, 2) for r in range(WORLD)])
    for dtype in SUMMED:
        x = be.ops.from_numpy(parts[c.rank], dtype)
        same(be, c.all_reduce(x), parts.sum(0), dtype)
        same(be, c.all_reduce(x, op="max"), parts.max(0), dtype)
        same(be, x, parts[c.rank])  # the argument is left alone
    same(be, c.all_reduce(be.ops.from_numpy(np.array(float(c.rank), np.float32))), np.array(6.0))


@case
def half_precision_is_summed_in_float32(be: Backend) -> None:
    # 256 + 1 is 256 in bfloat16, however often: 259 rounded once is 260.
    x = be.ops.from_numpy(np.full((WORLD, 2), 256.0 if be.collectives.rank == 0 else 1.0, np.float32), "bfloat16")
    same(be, be.collectives.all_reduce(x), np.full((WORLD, 2), 260.0))
    same(be, be.collectives.reduce_scatter(x), np.full((1, 2), 260.0))


@case
def all_gather_joins_rows(be: Backend) -> None:
    c = be.collectives
    for dtype in MOVED:
        even = [values(r, 2, 3, low=0) for r in range(WORLD)]
        uneven = [values(r, n, 3, low=0) for r, n in enumerate(UNEVEN)]
        if dtype == "bool":
            even, uneven = [x > 2 for x in even], [x > 2 for x in uneven]
        same(be, c.all_gather(be.ops.from_numpy(even[c.rank], dtype)), np.concatenate(even), dtype)
        x = be.ops.from_numpy(uneven[c.rank], dtype)
        same(be, c.all_gather(x, sizes=UNEVEN), np.concatenate(uneven), dtype)


@case
def reduce_scatter_keeps_a_piece_of_the_sum(be: Backend) -> None:
    c = be.collectives
    for dtype in SUMMED:
        for sizes in (None, UNEVEN, [0, 0, 0, 5]):
            rows = 8 if sizes is None else sum(sizes)
            parts = [values(r, rows, 2) for r in range(WORLD)]
            cuts = np.cumsum(sizes or [2] * WORLD)[:-1]
            found = c.reduce_scatter(be.ops.from_numpy(parts[c.rank], dtype), sizes=sizes)
            same(be, found, np.split(sum(parts), cuts)[c.rank], dtype)


@case
def sums_that_are_begun_go_on_beside_others(be: Backend) -> None:
    c, tp = be.collectives, be.collectives.groups(MESH.groups("tp"))
    c.traffic.clear()
    sizes = (None, UNEVEN, [0, 0, 0, 5])
    wholes = [[values(r, 8 if s is None else sum(s), 2, low=n) for r in range(WORLD)] for n, s in enumerate(sizes)]
    begun = [c.reduce_scatter_later(be.ops.from_numpy(w[c.rank]), None, s) for w, s in zip(wholes, sizes, strict=True)]
    ours = c.reduce_scatter_later(be.ops.from_numpy(wholes[0][c.rank]), tp)
    same(be, c.all_reduce(be.ops.from_numpy(wholes[0][c.rank])), sum(wholes[0]))
    for pending, whole, s in reversed(list(zip(begun, wholes, sizes, strict=True))):
        same(be, pending.wait(), np.split(sum(whole), np.cumsum(s or [2] * WORLD)[:-1])[c.rank])
    pair = c.group_ranks(tp)
    same(be, ours.wait(), np.split(sum(wholes[0][r] for r in pair), 2)[pair.index(c.rank)])
    assert c.traffic["reduce_scatter"] == 3 * 4 * 2 * (2 + 3 + 5) + 4 * 2 * 4, c.traffic


@case
def all_to_all_moves_rows(be: Backend) -> None:
    c = be.collectives
    table = np.array([[1, 0, 2, 3], [0, 0, 1, 0], [4, 1, 0, 2], [0, 0, 0, 0]])  # rows from (down) to (across)
    for counts in (np.full((WORLD, WORLD), 2), table):
        whole = [values(r, int(counts[r].sum()), 3, low=0) for r in range(WORLD)]
        sent = [np.split(x, np.cumsum(counts[r])[:-1]) for r, x in enumerate(whole)]
        wanted = np.concatenate([sent[r][c.rank] for r in range(WORLD)])
        for dtype in MOVED:
            as_dtype = (lambda a: a > 2) if dtype == "bool" else (lambda a: a)
            x = be.ops.from_numpy(as_dtype(whole[c.rank]), dtype)
            sizes = (counts[c.rank].tolist(), counts[:, c.rank].tolist()) if counts is table else (None, None)
            same(be, c.all_to_all(x, None, *sizes), as_dtype(wanted), dtype)


@case
def broadcast_from_any_rank(be: Backend) -> None:
    c = be.collectives
    for source, dtype in enumerate((*MOVED[:3], "bool")):
        x = values(c.rank, 2, 3) > 0 if dtype == "bool" else values(c.rank, 2, 3)
        wanted = values(source, 2, 3) > 0 if dtype == "bool" else values(source, 2, 3)
        same(be, c.broadcast(be.ops.from_numpy(x, dtype), source), wanted, dtype)


@case
def empty_tensors_are_legal(be: Backend) -> None:
    c, nothing = be.collectives, be.ops.zeros((0, 3), "bfloat16")
    for found in (c.all_reduce(nothing), c.all_gather(nothing), c.reduce_scatter(nothing), c.broadcast(nothing, 1)):
        same(be, found, np.zeros((0, 3)), "bfloat16")
    same(be, c.all_to_all(nothing), np.zeros((0, 3)), "bfloat16")
    same(be, c.all_gather(be.ops.zeros((2, 0))), np.zeros((8, 0)))
    there, back = (c.rank + 1) % WORLD, (c.rank - 1) % WORLD
    same(be, c.exchange([Send(nothing, there)], [Receive((0, 3), "bfloat16", back)])[0], np.zeros((0, 3)), "bfloat16")


@case
def objects_of_any_size(be: Backend) -> None:
    c = be.collectives
    mine = {"rank": c.rank, "text": "x" * (10**c.rank * 100)}
    assert c.gather_objects(mine) == [{"rank": r, "text": "x" * (10**r * 100)} for r in range(WORLD)]
    tp = c.groups(MESH.groups("tp"))
    assert c.gather_objects(c.rank, tp) == list(c.group_ranks(tp))


@case
def barrier_waits_for_the_last(be: Backend) -> None:
    time.sleep(0.3 * (be.collectives.rank == 3))
    before = time.time()
    be.collectives.barrier()
    after = time.time()
    assert min(t for _, t in be.collectives.gather_objects((before, after))) >= max(
        t for t, _ in be.collectives.gather_objects((before, after))
    )


@case
def traffic_is_counted(be: Backend) -> None:
    c = be.collectives
    c.traffic.clear()
    x = be.ops.from_numpy(values(c.rank, 8, 2))
    half = be.ops.cast(x, "bfloat16")
    there, back = (c.rank + 1) % WORLD, (c.rank - 1) % WORLD
    c.all_reduce(half), c.all_gather(half), c.reduce_scatter(x), c.all_to_all(half), c.broadcast(x, 1)
    c.exchange(
        [Send(half, there), Send(x, c.rank)], [Receive((8, 2), "float32", c.rank), Receive((8, 2), "bfloat16", back)]
    )
    assert c.traffic == {
        "all_reduce": 96,  # 64 bytes of float32 and 3/4 of them twice
        "all_gather": 96,
        "reduce_scatter": 48,
        "all_to_all": 24,
        "broadcast": 64 * (c.rank == 1),
        "exchange": 32,
    }, c.traffic


@case
def disagreement_is_refused_before_anything_is_sent(be: Backend) -> None:
    c, x = be.collectives, be.ops.zeros((3, 2))
    for wrong in (
        lambda: c.reduce_scatter(x),
        lambda: c.all_gather(x, sizes=[1, 1, 1, 1]),
        lambda: c.all_to_all(x, send=[1, 1, 1, 1]),
        lambda: c.groups([[0, 1], [1, 2, 3]]),
        lambda: c.exchange([Send(x, c.rank)], []),
    ):
        try:
            wrong()
        except ValueError:
            continue
        raise AssertionError("no ValueError")
    c.barrier()


# -- groups ------------------------------------------------------------------------------------------------------------


@case
def overlapping_groups_in_both_directions(be: Backend) -> None:
    c = be.collectives
    parts = [values(r, 4, 2) for r in range(WORLD)]
    x = be.ops.from_numpy(parts[c.rank])
    tp, dp = (c.groups(MESH.groups(axis)) for axis in ("tp", "dp"))
    assert c.groups(MESH.groups("tp")) is tp
    for _ in range(3):
        for axis, group in (("tp", tp), ("dp", dp)):
            ranks = MESH.ranks_along(axis, rank=c.rank)
            assert list(c.group_ranks(group)) == ranks
            own, theirs = ranks.index(c.rank), [parts[r] for r in ranks]
            same(be, c.all_reduce(x, group), sum(theirs))
            same(be, c.all_gather(x, group), np.concatenate(theirs))
            same(be, c.reduce_scatter(x, group), sum(theirs)[2 * own : 2 * own + 2])
            same(be, c.all_to_all(x, group), np.concatenate([p[2 * own : 2 * own + 2] for p in theirs]))
            same(be, c.broadcast(x, ranks[1], group), theirs[1])
            c.barrier(group)
    same(be, c.all_reduce(c.all_reduce(x, tp), dp), sum(parts))
    same(be, c.all_reduce(x), sum(parts))


@case
def groups_of_one_and_of_all(be: Backend) -> None:
    c = be.collectives
    x = be.ops.from_numpy(values(c.rank, 2, 2))
    alone, everyone = c.groups(MESH.groups("cp")), c.groups(MESH.groups("dp", "tp"))
    assert list(c.group_ranks(alone)) == [c.rank]
    assert c.all_reduce(x, alone) is x
    assert c.gather_objects(1, alone) == [1]
    same(be, c.all_reduce(x, everyone), sum(values(r, 2, 2) for r in range(WORLD)))


# -- point to point ----------------------------------------------------------------------------------------------------


@case
def ring_of_exchanges(be: Backend) -> None:
    c = be.collectives
    there, back = (c.rank + 1) % WORLD, (c.rank - 1) % WORLD
    for dtype in MOVED:
        x = be.ops.from_numpy(values(c.rank, 5, 2) > 0 if dtype == "bool" else values(c.rank, 5, 2), dtype)
        for step in range(1, WORLD):
            (x,) = c.exchange([Send(x, there)], [Receive((5, 2), dtype, back)])
            wanted = values((c.rank - step) % WORLD, 5, 2)
            same(be, x, wanted > 0 if dtype == "bool" else wanted, dtype)


@case
def messages_keep_their_order(be: Backend) -> None:
    c = be.collectives
    there, back = (c.rank + 1) % WORLD, (c.rank - 1) % WORLD
    for call in range(3):
        sends = [Send(be.ops.from_numpy(np.full((n + 1,), 10 * c.rank + n + call, np.int32)), there) for n in range(4)]
        sends.insert(1, Send(be.ops.from_numpy(np.array([c.rank])), c.rank))
        receives = [Receive((n + 1,), "int32", back) for n in range(4)]
        receives.insert(3, Receive((1,), "int64", c.rank))
        found = c.exchange(sends, receives)
        same(be, found.pop(3), np.array([c.rank]))
        for n, x in enumerate(found):
            same(be, x, np.full((n + 1,), 10 * back + n + call))


@case
def both_sides_send_large_tensors_at_once(be: Backend) -> None:
    c = be.collectives
    rows = 1 << 20  # 8 MB each: far more than sockets buffer
    x = be.ops.from_numpy(np.full((rows, 2), c.rank, np.float32))
    others = [r for r in range(WORLD) if r != c.rank]
    found = c.exchange([Send(x, r) for r in others], [Receive((rows, 2), "float32", r) for r in reversed(others)])
    for r, y in zip(reversed(others), found, strict=True):
        assert (be.to_numpy(y) == r).all()


@case
def pipeline_1f1b(be: Backend) -> None:
    """Every stage adds one to what comes down and doubles what comes back up, 2 MB a message."""
    c, count, shape = be.collectives, 6, (1 << 18, 2)
    first, last = c.rank == 0, c.rank == WORLD - 1

    def step(down: Any = None, up: Any = None, *, from_above: bool = False, from_below: bool = False) -> list[Any]:
        sends = [Send(down, c.rank + 1)] if down is not None and not last else []
        sends += [Send(up, c.rank - 1)] if up is not None and not first else []
        sources = [c.rank - 1] * (from_above and not first) + [c.rank + 1] * (from_below and not last)
        return c.exchange(sends, [Receive(shape, "float32", s) for s in sources])

    def top(micro: int) -> Any:
        return be.ops.from_numpy(np.full(shape, micro, np.float32))

    warm, seen, finished = min(WORLD - 1 - c.rank, count), [], []
    waiting: list[Any] = []
    for micro in range(warm):
        x = top(micro) if first else step(from_above=True)[0]
        waiting.append(x + 1.0)
        step(down=waiting[-1])
    x = (top(warm) if first else step(from_above=True)[0]) if warm < count else None
    for micro in range(warm, count):
        y = x + 1.0
        seen.append(float(be.to_numpy(y)[-1, -1]))
        d = y if last else step(down=y, from_below=True)[0]
        finished.append(float(be.to_numpy(d)[0, 0]))
        more = micro + 1 < count
        got = step(up=d * 2.0, from_above=more)
        x = (top(micro + 1) if first else got[0]) if more else None
    for _ in range(warm):
        d = step(from_below=True)[0]
        finished.append(float(be.to_numpy(d)[0, 0]))
        step(up=d * 2.0)
    assert seen == [m + c.rank + 1.0 for m in range(warm, count)], seen
    assert finished == [(m + WORLD) * 2.0 ** (WORLD - 1 - c.rank) for m in range(count)], finished


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradient(be: Backend, fn: Callable[[Any], Any], x: np.ndarray, weight: np.ndarray) -> Any:
    """Of sum(fn(x)^2 * weight) to x: different in every element."""

    def loss(y: Any) -> Any:
        out = fn(y)
        assert tuple(out.shape) == weight.shape, (out.shape, weight.shape)
        return be.ops.sum(out * out * be.ops.from_numpy(weight))

    return be.autograd.value_and_grad(loss, [be.ops.from_numpy(x)])[1][0]


def pieces(x: np.ndarray, sizes: Sequence[int], axis: int) -> list[np.ndarray]:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def layouts() -> list[tuple[int, list[int], tuple[int, ...]]]:
    """Axis, the ranks' sizes along it, and the whole's shape."""
    return [
        (0, [2] * 4, (8, 3)),
        (0, UNEVEN, (6, 3)),
        (1, UNEVEN, (2, 6, 3)),
        (-1, [1, 2, 3, 1], (2, 3, 7)),
    ]


@case
def gradient_of_copy_to(be: Backend) -> None:
    team, x = Team.of(be), values(9, 4, 3)
    weights = [values(r, 4, 3) for r in range(WORLD)]
    close(be, gradient(be, lambda y: par.copy_to(team, y), x, weights[team.index]), 2 * x * sum(weights))


@case
def gradient_of_reduce_from(be: Backend) -> None:
    team, weight = Team.of(be), values(9, 4, 3)
    parts = [values(r, 4, 3) for r in range(WORLD)]
    found = gradient(be, lambda y: par.reduce_from(team, y), parts[team.index], weight)
    close(be, found, 2 * sum(parts) * weight)


@case
def gradient_of_gather_from(be: Backend) -> None:
    team = Team.of(be)
    for axis, sizes, shape in layouts():
        x, weight = values(8, *shape), values(9, *shape)
        mine = pieces(x, sizes, axis)[team.index]
        found = gradient(be, lambda y, a=axis, s=sizes: par.gather_from(team, y, a, s), mine, weight)
        close(be, found, pieces(2 * x * weight, sizes, axis)[team.index])


@case
def gradient_of_scatter_to(be: Backend) -> None:
    team = Team.of(be)
    for axis, sizes, shape in layouts():
        x, weight = values(8, *shape), values(9, *shape)
        mine = pieces(weight, sizes, axis)[team.index]
        found = gradient(be, lambda y, a=axis, s=sizes: par.scatter_to(team, y, a, s), x, mine)
        close(be, found, 2 * x * weight)


@case
def gradient_of_gather_reduce(be: Backend) -> None:
    team = Team.of(be)
    for axis, sizes, shape in layouts():
        x, weights = values(8, *shape), [values(r, *shape) for r in range(WORLD)]
        mine = pieces(x, sizes, axis)[team.index]
        found = gradient(be, lambda y, a=axis, s=sizes: par.gather_reduce(team, y, a, s), mine, weights[team.index])
        close(be, found, pieces(2 * x * sum(weights), sizes, axis)[team.index])


@case
def gradient_of_reduce_scatter_from(be: Backend) -> None:
    team = Team.of(be)
    for axis, sizes, shape in layouts():
        parts, weight = [values(r, *shape) for r in range(WORLD)], values(9, *shape)
        mine = pieces(weight, sizes, axis)[team.index]
        found = gradient(be, lambda y, a=axis, s=sizes: par.reduce_scatter_from(team, y, a, s), parts[team.index], mine)
        close(be, found, 2 * sum(parts) * weight)


@case
def gradient_of_all_to_all_between_axes(be: Backend) -> None:
    team = Team.of(be)
    tokens, heads = [3, 1, 0, 2], [1, 2, 1, 0]
    for token_sizes, head_sizes in ((None, None), (tokens, heads)):
        t, h = token_sizes or [2] * 4, head_sizes or [1] * 4
        x, weight = values(8, sum(t), sum(h), 3), values(9, sum(t), sum(h), 3)
        mine, mine_after = pieces(x, t, 0)[team.index], pieces(weight, h, 1)[team.index]
        by_heads = lambda y, h=head_sizes, t=token_sizes: par.all_to_all(team, y, 1, 0, h, t)  # noqa: E731
        same(be, by_heads(be.ops.from_numpy(mine)), pieces(x, h, 1)[team.index])
        wanted = pieces(2 * x * weight, t, 0)[team.index]
        close(be, gradient(be, by_heads, mine, mine_after), wanted)
        there_and_back = lambda y, h=head_sizes, t=token_sizes, f=by_heads: par.all_to_all(team, f(y), 0, 1, t, h)  # noqa: E731
        close(be, gradient(be, there_and_back, mine, pieces(weight, t, 0)[team.index]), wanted)


@case
def gradient_of_all_to_all_along_one_axis(be: Backend) -> None:
    team = Team.of(be)
    counts = np.array([[1, 0, 2, 3], [0, 1, 1, 0], [4, 1, 0, 2], [0, 0, 0, 1]])
    send, receive = counts[team.index].tolist(), counts[:, team.index].tolist()
    x, weight = values(team.index, 3, sum(send)), values(team.index + 10, 3, sum(receive))
    found = gradient(be, lambda y: par.all_to_all(team, y, 1, 1, send, receive), x, weight)
    sent = [pieces(values(r, 3, int(counts[r].sum())), counts[r], 1) for r in range(WORLD)]
    arrived = [pieces(values(r + 10, 3, int(counts[:, r].sum())), counts[:, r], 1) for r in range(WORLD)]
    wanted = [2 * sent[team.index][r] * arrived[r][team.index] for r in range(WORLD)]
    close(be, found, np.concatenate(wanted, 1))


@case
def gradients_within_groups_and_in_half_precision(be: Backend) -> None:
    c = be.collectives
    for axis in ("tp", "dp"):
        team = Team.of(be, MESH.groups(axis))
        ranks = MESH.ranks_along(axis, rank=c.rank)
        x, weights = values(8, 4, 3), [values(r, 4, 3) for r in range(WORLD)]
        mine = pieces(x, [1, 3], 0)[team.index]
        found = gradient(be, lambda y, t=team: par.gather_reduce(t, y, 0, [1, 3]), mine, weights[c.rank])
        close(be, found, pieces(2 * x * sum(weights[r] for r in ranks), [1, 3], 0)[team.index])
    whole = par.gather_reduce(Team.of(be), be.ops.from_numpy(values(c.rank, 2, 3), "float16"), axis=1)
    same(be, whole, np.concatenate([values(r, 2, 3) for r in range(WORLD)], 1), "float16")


# -- equal to one process ----------------------------------------------------------------------------------------------

ROWS, WIDTH, HIDDEN = [5, 3], 6, 8


def whole_mlp(be: Backend) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output and weight gradients of the two-layer MLP on one process."""
    x, up, down = mlp_values()
    parameters = [Parameter("up", be.ops.from_numpy(up)), Parameter("down", be.ops.from_numpy(down))]

    def run(h: Any, up: Any, down: Any) -> Any:
        return be.ops.linear(be.ops.silu(be.ops.linear(h, up)), down)

    (y,), tape = be.autograd.run_stage(lambda w, h: run(h, w["up"], w["down"]), [be.ops.from_numpy(x)], parameters)
    be.autograd.backward(tape, [y])
    return be.to_numpy(y), [be.to_numpy(p.main_grad) for p in parameters]


def mlp_values() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = ((sum(ROWS), WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    x, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return x, up, down


def split_mlp(be: Backend, run: Callable[..., Any], tp: Team, dp: Team, rows_out: list[int] | None) -> None:
    """Columns of `up` and rows of `down` over tp, tokens over dp; gradients summed over dp."""
    x, up, down = mlp_values()
    mine = pieces(x, ROWS, 0)[dp.index]
    parameters = [
        Parameter("up", be.ops.from_numpy(np.split(up, 2, 0)[tp.index])),
        Parameter("down", be.ops.from_numpy(np.split(down, 2, 1)[tp.index])),
    ]
    entry = mine if rows_out is None else pieces(mine, rows_out, 0)[tp.index]
    (y,), tape = be.autograd.run_stage(lambda w, h: run(h, w["up"], w["down"]), [be.ops.from_numpy(entry)], parameters)
    be.autograd.backward(tape, [y])
    wanted, gradients = whole_mlp(be)
    wanted = pieces(wanted, ROWS, 0)[dp.index]
    close(be, y, wanted if rows_out is None else pieces(wanted, rows_out, 0)[tp.index])
    found = [be.collectives.all_reduce(p.main_grad, dp.group) for p in parameters]
    close(be, found[0], np.split(gradients[0], 2, 0)[tp.index])
    close(be, found[1], np.split(gradients[1], 2, 1)[tp.index])


@case
def mlp_over_tp2_dp2_equals_one_process(be: Backend) -> None:
    tp, dp = Team.of(be, MESH.groups("tp")), Team.of(be, MESH.groups("dp"))

    def run(h: Any, up: Any, down: Any) -> Any:
        hidden = be.ops.silu(be.ops.linear(par.copy_to(tp, h), up))
        return par.reduce_from(tp, be.ops.linear(hidden, down))

    split_mlp(be, run, tp, dp, None)
    split_mlp(be, lambda *tensors: be.autograd.checkpoint(run, *tensors), tp, dp, None)


@case
def mlp_with_sequence_parallel_equals_one_process(be: Backend) -> None:
    tp, dp = Team.of(be, MESH.groups("tp")), Team.of(be, MESH.groups("dp"))
    rows = [[2, 3], [3, 0]][dp.index]  # uneven, and empty on one rank

    def run(h: Any, up: Any, down: Any) -> Any:
        hidden = be.ops.silu(be.ops.linear(par.gather_reduce(tp, h, 0, rows), up))
        return par.reduce_scatter_from(tp, be.ops.linear(hidden, down), 0, rows)

    split_mlp(be, run, tp, dp, rows)
