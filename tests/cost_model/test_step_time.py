"""The cost model against sums done by hand, and the pipeline that it plays against the schedule that runs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.stages import Stages
from duetvl.cost_model.devices import DeviceType, Link, Shares, device_names, device_of, device_type
from duetvl.cost_model.links import Team, collective, message
from duetvl.cost_model.passes import Passes
from duetvl.cost_model.step_time import CostModel, Optimizing, Work
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import ModelConfig, published_config
from duetvl.models.qwen_vl.flops import Amounts, inference_flops, training_flops
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.memory import Trained
from duetvl.parallel import schedule
from duetvl.parallel.division import Division
from duetvl.parallel.schedule import one_f_one_b, played
from duetvl.training.lora import plan_adapters
from duetvl.training.recipe.reading import make_recipe

SIMPLE = DeviceType(
    "simple", 10**9, {"float32": 1e12}, 1e10, 4, Link(1e9, 0.0), Link(1e8, 0.0), 1e9, {}, Shares(1.0, 1.0, 1.0)
)
TEXT = 1000  # tokens, of which half are trained


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return published_config("Qwen2-VL-2B-Instruct")


def model_of(config: ModelConfig, device: DeviceType = SIMPLE, pictures: int = 0, **more) -> CostModel:
    grids = np.array([[1, 36, 36]] * pictures).reshape(-1, 3)
    amounts = Amounts.of_sizes(config, TEXT, TEXT / 2, pictures * 1296, [TEXT], grids)
    work = Work(amounts, more.pop("micro_batches", 4), 1296 * (pictures > 0))
    trained = Trained.of(config, "float32", more.pop("freeze", ()))
    return CostModel(config, trained, work, Optimizing(**more), device)


def text_numbers(config: ModelConfig) -> int:
    """Of the matrices that every token meets."""
    paths = Trained.of(config, "float32").shapes.items()
    return sum(int(np.prod(shape)) for path, shape in paths if ".layers." in path and len(shape) > 1)


def test_one_rank_computes_what_its_weights_ask_for(config):
    step = model_of(config).step(Division.of(config, Mesh(), 0))
    head = TEXT / 2 * config.text.vocab_size * config.text.hidden_size
    attention = 4 * config.text.num_layers * config.text.hidden_size * TEXT * (TEXT + 1) / 2
    products = 4 * 3 * (2 * TEXT * text_numbers(config) + 2 * head + attention)
    numbers = sum(int(np.prod(shape)) for shape in Trained.of(config, "float32").shapes.values())
    assert step.compute == pytest.approx(products / 1e12 + 4 * 12 * numbers / 1e10, rel=1e-6)
    assert step.update == pytest.approx(numbers * (2 * 12 + 8) / 1e10, rel=1e-6)
    assert step.seconds == pytest.approx(step.compute + step.update)
    assert (step.bubble, step.waiting, step.sent) == (0.0, pytest.approx(0.0, abs=1e-9), 0)


@dataclass(frozen=True)
class Counted:
    """A parameter as far as it is counted."""

    shape: tuple[int, ...]
    trainable: bool


@pytest.mark.parametrize("freeze", [(), ("vision",), ("vision", "projector"), ("language",)])
def test_operations_are_those_that_utilisation_counts(config, freeze):
    """Of a batch, by the count that tests/models/test_flops.py compares with torch's own."""
    vision, patches = config.vision, 2 * 36 * 36
    ids = np.concatenate(
        [[config.vision_start_token_id], np.full(patches // 4, config.image_token_id), np.full(300, 5)]
    )
    grids, rows = np.array([[1, 36, 36]] * 2), np.zeros((patches, vision.patch_row), np.float32)
    batch = QwenVLFamily(config).pack([Sample(ids, ids, rows, grids)])
    trained = Trained.of(config, "float32", freeze)
    amounts = Amounts.of(config, batch)
    passes = Passes(config, trained, amounts, "none", 36 * 36)
    parameters = {path: Counted(shape, path in trained.paths) for path, shape in trained.shapes.items()}
    one = passes.of_rank(Division.of(config, Mesh(), 0))[0]
    assert one.total == pytest.approx(training_flops(config, parameters, batch), rel=0.002)
    assert one.forward == pytest.approx(inference_flops(config, batch))
    divided = [passes.of_rank(Division.of(config, Mesh(pp=4), rank)) for rank in range(4)]
    assert sum(part.total for rank in divided for part in rank.values()) == pytest.approx(one.total)


def test_what_is_frozen_or_computed_again_or_kept_by_the_host(config):
    whole = model_of(config, pictures=2).step(Division.of(config, Mesh(), 0))
    frozen = model_of(config, pictures=2, freeze=["vision"]).step(Division.of(config, Mesh(), 0))
    again = model_of(config, pictures=2, recompute="full").step(Division.of(config, Mesh(), 0))
    host = model_of(config, pictures=2, offload=True).step(Division.of(config, Mesh(), 0))
    assert frozen.compute < whole.compute and frozen.update < whole.update
    assert again.seconds - whole.seconds == pytest.approx(again.again) and again.again < whole.compute / 3
    assert host.update > whole.update


def test_adapters_leave_out_the_gradients_of_weights(config):
    recipe = make_recipe({"model": {"path": "-"}, "data": {"train": "-"}, "lora": {"rank": 8}})
    plan = plan_adapters(recipe, config)
    whole, adapted = Trained.of(config, "float32"), Trained.of(config, "float32", (), plan.adapters)
    assert all(map(is_adapter, adapted.paths))
    work = model_of(config).work
    times = [CostModel(config, one, work, Optimizing(), SIMPLE).step(Division.of(config, Mesh(), 0)) for one in
             (whole, adapted)]  # fmt: skip
    assert 0.5 < times[1].compute / times[0].compute < 0.75  # two products for each weight in the place of three


@pytest.mark.parametrize(("ranks", "virtual", "batches"), [(2, 1, 5), (4, 1, 8), (4, 2, 8), (3, 3, 7), (4, 1, 2)])
def test_a_schedule_played_with_its_own_times_takes_as_long(ranks, virtual, batches):
    planned = one_f_one_b(ranks, virtual, batches)
    seconds, busy = played(planned, lambda one: schedule._TIME[one.direction], lambda _: 0.0)
    assert seconds == planned.length
    assert 1 - sum(busy) / (seconds * ranks) == pytest.approx(planned.idle)


def test_a_slow_stage_and_slow_messages_hold_up_all(config):
    planned = one_f_one_b(4, 1, 16)
    even, _ = played(planned, lambda _: 1.0, lambda _: 0.0)
    uneven, busy = played(planned, lambda one: 2.0 if one.stage == 1 else 1.0, lambda _: 0.0)
    sent, _ = played(planned, lambda _: 1.0, lambda _: 0.1)
    assert uneven >= busy[1] == 64.0 and even < sent < uneven


@pytest.mark.parametrize("stages", [(7, 7, 7, 7), (1, 10, 10, 7)])
def test_long_steps_go_on_as_their_rounds_do(config, stages, monkeypatch):
    division = Division.of(config, Mesh(pp=4), 0, stages=Stages((32, 0, 0, 0), stages))
    model = model_of(config, pictures=1, micro_batches=61)
    short = model.step(division)
    monkeypatch.setattr("duetvl.cost_model.step_time._PLAYED", 100)
    whole = model.step(division)
    assert short.seconds == pytest.approx(whole.seconds, rel=0.01)
    assert short.bubble == pytest.approx(whole.bubble, abs=0.01)


def test_layouts_divide_the_work(config):
    model = model_of(config, pictures=4, micro_batches=8)
    alone = model.step(Division.of(config, Mesh(), 0))
    tp = model.step(Division.of(config, Mesh(tp=4), 0, sequence=True))
    assert tp.compute == pytest.approx(alone.compute / 4, rel=0.1) and tp.sums > 0
    cp = model.step(Division.of(config, Mesh(cp=2), 0))
    assert cp.compute < 0.6 * alone.compute and cp.pieces > 0
    gathered = model.step(Division.of(config, Mesh(dp=2), 0, zero=3))
    assert gathered.blocks > 0 and gathered.update < alone.update
    stages = Stages((32, 0), (10, 18))
    staged = model.step(Division.of(config, Mesh(pp=2), 0, stages=stages))
    assert staged.seconds < alone.seconds and staged.waiting > 0 and 0 < staged.bubble < 1


def test_links_inside_a_node_and_between_nodes():
    mesh = replace(SIMPLE, inside=Link(7e9, 1e-6, to_one=1e9))
    assert collective(mesh, Team.of([0, 1], 4), 1e9, 2) == pytest.approx(1.0 + 2e-6)  # a cable for each pair
    assert collective(mesh, Team.of([0, 1, 2, 3], 4), 3e9, 0) == pytest.approx(1.0)
    assert collective(SIMPLE, Team.of([0, 4], 4), 1e8, 0) == pytest.approx(1.0)
    assert collective(SIMPLE, Team.of(range(8), 4), 4e8, 0) == pytest.approx(1.0)  # four ports a node
    assert message(SIMPLE, 3, 4, 1e8) == pytest.approx(1.0) and message(SIMPLE, 0, 3, 1e9) == pytest.approx(1.0)
    assert collective(SIMPLE, Team.of([5], 4), 1e9, 3) == 0.0


@pytest.mark.parametrize("name", device_names())
def test_each_number_of_a_device_says_where_it_is_from(name):
    device = device_type(name)
    numbers = {one.name for one in fields(device)} - {"name", "sources", "shares"}
    assert numbers | {"latency"} == set(device.sources)
    assert all(len(source) > 10 for source in device.sources.values())


def test_devices_by_name():
    assert device_type("ascend 910b2").name == device_of("Ascend910B2").name == "910B2"
    assert device_type("Atlas 300I DUO").name == "300I DUO" and device_of("NVIDIA H200").name == "H200"
    assert device_of("Ascend910_9392").name == "A3" and device_of("NVIDIA L40S") is None
    with pytest.raises(ConfigError, match=r"did you mean H200.*910B3"):
        device_type("H201")
    with pytest.raises(ConfigError, match="float32 is not in the table, which has bfloat16, float16"):
        device_type("910B3").operations("float32")
