"""What a rank of a pipeline has of a model: its stages' parameters, read, frozen and adapted as those of the whole."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest

from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.stages import Stages
from duetvl.models.lora import Adapters, Size, is_adapter
from duetvl.models.qwen_vl.adapters import add_adapters, layers, load_adapter, open_adapter_for, save_adapter
from duetvl.models.qwen_vl.loading import load_model
from duetvl.parallel.context import Context
from duetvl.parallel.differentiable import Team
from duetvl.parallel.division import EMBEDDING, Division
from duetvl.parallel.inventory import own_entries
from duetvl.parallel.tensor import RankLayout
from duetvl.storage.weights_dir import open_weights, write_shards
from duetvl.training.groups import parameter_groups
from duetvl.training.recipe.optim_section import OptimSection

NAMES = ["qwen2-untied", "qwen2.5-tied"]


def laid(be, division):
    """The layout of a rank of a pipeline, whose layers are whole."""
    return RankLayout(division, Team.of(be), Context.of(be, [[0]], 1))


def on_ranks(tiny, be, name, count=3):
    """The model as each rank of a pipeline has it; those in the middle have no layer."""
    whole = load_model(tiny.directory(name), backend=be)
    middle, vision, layers = (0,) * (count - 2), whole.config.vision.depth, whole.config.text.num_layers
    stages = Stages((vision, *middle, 0), (1, *middle, layers - 1))
    first = Division.of(whole.config, Mesh(pp=count), 0, stages=stages)
    parts = []
    for division in map(first.of_rank, range(count)):
        parts.append(load_model(tiny.directory(name), backend=be, dtype="bfloat16", division=division))
        parts[-1].layout = laid(be, division)
    return whole, parts


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_read_by_its_stage_alone(tiny, be, name):
    whole, parts = on_ranks(tiny, be, name)
    times = Counter(path for part in parts for path in part.parameters)
    assert times.keys() == whole.parameters.keys() == whole.shapes.keys()
    tied = whole.config.tie_word_embeddings
    assert {path for path, count in times.items() if count > 1} == ({EMBEDDING} if tied else set())
    assert {part.dtype for part in parts} == {"bfloat16"}
    for part in parts:
        assert part.shapes == whole.shapes
        assert all(be.ops.dtype_of(p.tensor) == "bfloat16" for p in part.parameters.values())


def test_a_stage_without_layers_has_nothing_and_a_dtype(tiny, be):
    part = on_ranks(tiny, be, "qwen2-untied", 5)[1][1]
    assert (part.parameters, part.dtype) == ({}, "bfloat16")
    part.freeze(["vision"])
    everything = own_entries(load_model(tiny.directory("qwen2-untied"), backend=be).parameters.values(), be)
    optim = OptimSection(lr_scale={"vision": 0.1}, no_decay=("lm_head",))
    groups = parameter_groups(part.parameters, everything, optim, part.parts)
    state = be.optimizer.create(groups)
    be.optimizer.step(state, groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8, grad_scale=1.0)
    assert (groups, state.step, be.optimizer.grad_norm([])) == ([], {}, 0.0)


def test_patterns_are_those_of_the_whole_model(tiny, be):
    whole, parts = on_ranks(tiny, be, "qwen2-untied")
    whole.freeze(["vision", "model.norm"])
    for part in parts:
        part.freeze(["vision", "model.norm"])
        assert all(p.trainable == whole.parameters[path].trainable for path, p in part.parameters.items())
        with pytest.raises(ConfigError, match=r"model.freeze: 'nrm' matches no parameter"):
            part.freeze(["nrm"])


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_begin_as_in_one_process_and_are_read_by_their_stage(tiny, be, tmp_path, dora):
    whole, parts = on_ranks(tiny, be, "qwen2-untied")
    views = [part.layout.division for part in parts]
    parts = [load_model(tiny.directory("qwen2-untied"), backend=be, division=view) for view in views]
    adapters = Adapters(dict.fromkeys(layers(whole.config).choose(("language", "vision")), Size(2, 4.0)), dora=dora)
    add_adapters(whole, adapters, seed=5)
    save_adapter(whole, tmp_path / "adapter")
    stored = open_adapter_for(whole.config, tmp_path / "adapter")
    for view, part in zip(views, parts, strict=True):
        part.layout = laid(be, view)
        for lay in (lambda part=part: add_adapters(part, adapters, 5), lambda part=part: load_adapter(part, stored)):
            lay()
            assert {p for p in part.parameters if is_adapter(p)} == set(filter(view.holds, stored.tensors))
            for path, p in part.parameters.items():
                np.testing.assert_array_equal(be.to_numpy(p.tensor), be.to_numpy(whole.parameters[path].tensor))
            assert part.adapters is not None and part.adapters.to_json()["sizes"] == adapters.to_json()["sizes"]
            part.freeze(["visual.blocks"])


def test_a_tensor_that_is_missing_is_told_by_every_rank(tiny, be, tmp_path):
    shutil.copytree(tiny.directory("qwen2-untied"), tmp_path / "m")
    config = load_model(tmp_path / "m", backend=be).config
    weights = open_weights(tmp_path / "m")
    specs = {name: weights.spec(name) for name in weights.names if "norm2" not in name}
    write_shards(tmp_path / "n", specs, lambda name: np.array(weights.view(name)))
    shutil.copy(tmp_path / "m/config.json", tmp_path / "n")
    for rank in (0, 1):
        with pytest.raises(CheckpointError, match="absent"):
            load_model(tmp_path / "n", backend=be, division=Division.of(config, Mesh(pp=2), rank))
