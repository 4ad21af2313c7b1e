"""The one table of how a model is divided: what every rank has, together the whole of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from duetvl.core.boxes import Box, Slices
from duetvl.core.stages import even_range
from duetvl.models.qwen_vl.config import published_config, published_names
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import Heads, owner_of, shard_of, slices_of


def heads_of(config) -> Heads:
    return Heads(config.text.num_heads, config.text.num_kv_heads, config.vision.num_heads)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", published_names())
def test_the_parts_make_up_the_whole(name, ranks):
    """Every number is held; by one rank where the tensor is cut and heads suffice, else by as many as share a head."""
    config = published_config(name)
    heads = heads_of(config)
    for path, shape in parameter_shapes(config).items():
        if owner_of(path).layer not in (0, "first", "last"):
            continue
        shard = shard_of(path)
        axis = shard.axis or 0
        times = np.zeros(shape[axis], np.int8)
        for rank in range(ranks):
            for box in slices_of(path, shape, heads, rank, ranks).boxes:
                times[box.slices[axis]] += 1
                assert Box.whole(shape).overlap(box) == box
                assert [n for i, n in enumerate(box.shape) if i != axis] == [
                    n for i, n in enumerate(shape) if i != axis
                ]
        copies = ranks if shard.axis is None else 1
        if shard.unit == "kv_head":
            copies = max(1, ranks // heads.kv)
        assert (times == copies).all(), path


def test_what_megatron_cuts():
    shape = (3 * 8, 5)
    cut = slices_of("visual.blocks.31.attn.qkv.weight", shape, Heads(4, 2, 2), 1, 2)
    assert cut == Slices((Box((4, 0), (4, 5)), Box((12, 0), (4, 5)), Box((20, 0), (4, 5))), 0)
    assert cut.shape == (12, 5)
    assert slices_of("model.layers.7.mlp.down_proj.weight", (6, 8), Heads(4, 2, 2), 1, 2).boxes == (
        Box((0, 4), (6, 4)),
    )
    for path in (
        "model.layers.7.self_attn.o_proj.bias",
        "visual.blocks.0.mlp.fc2.bias",
        "visual.merger.mlp.2.bias",
        "model.norm.weight",
        "visual.blocks.3.norm1.bias",
        "visual.patch_embed.proj.weight",
    ):
        assert shard_of(path).axis is None, path
    assert shard_of("visual.merger.mlp.0.bias").axis == shard_of("lm_head.weight").axis == 0


@pytest.mark.parametrize(
    ("path", "axis"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", 0),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight", 0),
        ("model.layers.0.mlp.down_proj.lora_A.weight", 1),
        ("model.layers.0.mlp.down_proj.lora_B.weight", None),
        ("model.layers.0.mlp.down_proj.lora_magnitude_vector.weight", None),
        ("visual.blocks.1.attn.qkv.lora_B.weight", 0),
    ],
)
def test_adapters_are_cut_as_their_layers_are(path, axis):
    assert shard_of(path).axis == axis


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(28, 4, 3), (28, 4, 5), (28, 4, 8), (16, 2, 3), (16, 2, 4)])
def test_uneven_heads_each_find_their_keys(heads, groups, ranks):
    """Each rank has the groups that its query heads need and no others."""
    counted = Counter()
    for rank in range(ranks):
        queries, _ = Heads(heads, groups, 1).held("head", rank, ranks)
        held, _ = Heads(heads, groups, 1).held("kv_head", rank, ranks)
        assert {head // (heads // groups) for head in queries} == set(held)
        counted.update(queries)
    assert counted == Counter(range(heads))


def test_stages_own_what_they_compute():
    assert owner_of("visual.blocks.31.attn.qkv.weight").layer == 31
    assert (owner_of("visual.patch_embed.proj.weight").layer, owner_of("visual.merger.mlp.2.bias").layer) == (
        "first",
        "last",
    )
    assert [owner_of(p).layer for p in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")] == [
        "first",
        "last",
        "last",
    ]
    assert {owner_of("visual.merger.ln_q.weight").tower, owner_of("model.layers.2.mlp.up_proj.weight").tower} == {
        "vision",
        "language",
    }


def test_even_ranges_are_the_whole_in_order():
    for count in range(12):
        for ranks in (1, 2, 3, 5):
            parts = [even_range(count, rank, ranks) for rank in range(ranks)]
            assert [n for part in parts for n in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
