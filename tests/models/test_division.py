"""The division of a model over a grid of ranks, on paper: the ranks hold all of it, and each number has one owner."""

from __future__ import annotations

import numpy as np
import pytest

from duetvl.core.boxes import LocalPart
from duetvl.core.mesh import Mesh
from duetvl.core.stages import Stages
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.division import Division, dealt, owned_rows

HEAD = 4
LAYER = "model.layers.0.self_attn"


def shapes(heads: Heads) -> dict[str, tuple[int, ...]]:
    width = heads.query * HEAD
    return {
        f"{LAYER}.q_proj.weight": (width, width),
        f"{LAYER}.k_proj.weight": (heads.kv * HEAD, width),
        f"{LAYER}.k_proj.bias": (heads.kv * HEAD,),
        f"{LAYER}.k_proj.lora_B.weight": (heads.kv * HEAD, 3),
        f"{LAYER}.k_proj.lora_A.weight": (3, width),
        f"{LAYER}.o_proj.weight": (width, width),
        "model.layers.0.input_layernorm.weight": (width,),
        "model.layers.3.mlp.down_proj.weight": (width, 10),
        "model.norm.weight": (width,),
        "model.embed_tokens.weight": (97, width),
        "visual.blocks.0.attn.qkv.weight": (3 * heads.vision * HEAD, 8),
        "visual.blocks.0.attn.proj.bias": (8,),
    }


def number(whole: np.ndarray, part: LocalPart) -> np.ndarray:
    return np.concatenate([whole[box.slices] for box in part.slices.boxes], part.slices.axis)


@pytest.mark.parametrize("vision", ["divide", "shard"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("heads", "mesh"),
    [
        (Heads(28, 4, 16), Mesh(tp=3)),
        (Heads(28, 4, 16), Mesh(tp=5, dp=2)),
        (Heads(28, 4, 16), Mesh(tp=8, dp=2)),
        (Heads(16, 2, 16), Mesh(tp=3, dp=3)),
        (Heads(16, 2, 16), Mesh(tp=4)),
        (Heads(12, 2, 16), Mesh(dp=3)),
    ],
    ids=str,
)
def test_every_number_is_held_and_updated_by_one_rank(heads: Heads, mesh: Mesh, sequence: bool, vision: str) -> None:
    """The gradient of each number, as the ranks compute its parts, is summed to itself, once."""
    check_numbers(Division(mesh, heads, 0, sequence, vision))
    check_numbers(Division(mesh, heads, 0, sequence, vision, zero=3))


EVEN, ENDS = Stages.even(1, 4, 2), Stages((1, 0, 0, 0), (1, 1, 1, 1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vision", ["divide", "shard"])
@pytest.mark.parametrize(
    ("mesh", "stages"),
    [
        (Mesh(pp=2), EVEN),
        (Mesh(pp=2, dp=2), ENDS),
        (Mesh(pp=2, dp=2, cp=2, tp=3), EVEN),
        (Mesh(pp=2, tp=2), Stages((0, 1, 0, 0), (0, 2, 2, 0))),  # empty stages first and last; ends on both ranks
        (Mesh(pp=4, cp=3), Stages((1, 0, 0, 0), (0, 4, 0, 0))),  # a tied embedding's ends on one rank
        (Mesh(cp=3, tp=2), Stages.even(1, 4, 1)),
    ],
    ids=str,
)
def test_every_number_of_a_pipeline_is_updated_by_one_rank(mesh: Mesh, stages: Stages, vision: str, tied: bool) -> None:
    check_numbers(Division(mesh, Heads(16, 2, 16), 0, False, vision, stages, tied))


def check_numbers(first: Division) -> None:
    """Those of every parameter, over all ranks of its stages."""
    heads, mesh = first.heads, first.mesh
    views = [first.of_rank(rank) for rank in range(mesh.size)]
    for path, shape in shapes(heads).items():
        ranks = {rank: view for rank, view in enumerate(views) if view.holds(path)}
        whole = np.arange(np.prod(shape)).reshape(shape)
        updated = np.zeros(whole.size, int)
        for rank, division in ranks.items():
            part, sharing = division.part(path, shape), division.sharing(path, shape)
            held, unit = number(whole, part), number(whole, sharing.unit)
            np.testing.assert_array_equal(held, unit[sharing.first : sharing.first + len(held)])
            assert sharing.axes in division.teams
            team = ranks[rank].team(sharing.axes)
            for other in team:
                theirs = ranks[other].sharing(path, shape)
                assert (theirs.axes, theirs.unit, theirs.copies) == (sharing.axes, sharing.unit, sharing.copies)
            rows = owned_rows(len(unit), len(team), path)[team.index(rank)]
            owned = number(whole, sharing.unit.rows(rows.start, rows.stop))
            np.testing.assert_array_equal(owned, unit[rows.start : rows.stop])
            np.add.at(updated, owned.reshape(-1), 1)
        assert (updated == 1).all(), path


def test_frames_are_dealt_evenly() -> None:
    """The largest first, each to the rank that has least, ascending; some ranks may get none."""
    assert dealt([96, 60, 24, 16, 16, 4], 2) == [[0, 4], [1, 2, 3, 5]]
    assert dealt([16], 3) == [[0], [], []]
    assert dealt([], 2) == [[], []]
    rng = np.random.default_rng(0)
    for ranks in (2, 3, 8):
        sizes = [int(size) for size in rng.integers(4, 400, 50)]
        pieces = dealt(sizes, ranks)
        assert sorted(piece for own in pieces for piece in own) == list(range(50))
        loads = [sum(sizes[piece] for piece in own) for own in pieces]
        assert max(loads) - min(loads) <= max(sizes)


def test_owned_rows_are_even_and_begin_elsewhere_for_each_parameter() -> None:
    totals = np.zeros(5, int)
    for layer in range(100):
        rows = owned_rows(8, 5, f"model.layers.{layer}.mlp.down_proj.lora_A.weight")
        assert [row for piece in rows for row in piece] == list(range(8))
        assert {len(piece) for piece in rows} == {1, 2}
        totals += [len(piece) for piece in rows]
    assert totals.min() > 140 and totals.sum() == 800
