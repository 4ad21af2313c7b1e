"""`duetvl plan`: layouts that the code's own checks take, in order; what is said where none fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from duetvl.cli import main
from duetvl.core.errors import ConfigError
from duetvl.planning.command import Question, bytes_of, pixels_of, plan, wish_of
from duetvl.planning.guides import guide_for
from duetvl.planning.placing import placed
from duetvl.planning.search import Candidate, Search
from duetvl.training.memory import division_of, estimate, stage_ranks
from duetvl.training.recipe.reading import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "model_type": "qwen2_5_vl", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "tie_word_embeddings": True,
    "vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4,
    "vision_config": {
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 256, "num_heads": 4,
        "tokens_per_second": 2, "fullatt_block_indexes": [1],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    (directory / "config.json").write_text(json.dumps(SMALL))
    return directory


@pytest.fixture(scope="module")
def question(model: Path) -> Question:
    """One that is quickly answered."""
    picture = {"sample": 256, "answer": 64, "picture": (224, 224), "seq": 2048}
    return Question(str(model), devices=8, device="910B3", global_batch=64, **picture)


@pytest.fixture(scope="module")
def search(question: Question) -> Search:
    return Search(wish_of(question))


def test_proposals_are_recipes_in_order_that_fit(search):
    best = search.best(30)
    wish = search.wish
    assert len(best) >= 15
    assert [one.step.seconds for one in best] == sorted(one.step.seconds for one in best)
    assert len({(one.recipe.parallel, one.recipe.train, one.recipe.data.pack_tokens) for one in best}) == len(best)
    kinds = {(p.pp > 1, p.virtual > 1, p.tp > 1, p.zero) for p in (one.recipe.parallel for one in best)}
    assert len(kinds) >= 5
    for one in best:
        parallel = type(one.recipe.parallel).model_validate(one.recipe.parallel.model_dump())  # checked as a recipe is
        assert parallel.mesh.size == wish.devices
        load, count = search._load(one.recipe)
        peaks = [
            estimate(wish.config, one.recipe, load, count, None, division_of(one.recipe, wish.config, rank)).peak
            for rank in stage_ranks(one.recipe)
        ]
        assert one.memory.peak == max(peaks) <= wish.memory


def test_nothing_faster_is_left_out(search):
    """The bound that ends the search never says more than a layout takes."""
    for section in search.sections():
        recipe = search.recipe(Candidate(section, 512), "none" if section.zero == 1 else "full")
        least = search._model(recipe).at_least(division_of(recipe, search.wish.config))
        assert least <= search.seconds(recipe).seconds * (1 + 1e-9)


def test_less_memory_brings_recomputation_and_then_none_that_fits(question):
    roomy = Search(wish_of(question)).best(1)[0]
    tight = Search(wish_of(replace(question, memory=round(roomy.memory.peak * 0.5), lora=False)))
    best = tight.best(3)
    assert best and all(one.memory.on_device <= tight.wish.memory for one in best)
    assert best[0].step.seconds > roomy.step.seconds
    smallest = tight.smallest().memory.on_device
    short = replace(question, memory=smallest - 1000)
    ways = r"too much; it fits with optim.offload=true \(.*, or with --lora .* on 16 devices \([^\n]*$"
    with pytest.raises(ConfigError, match=rf"no layout of 8 x 910B3 fits in .* the smallest, pp .* {ways}"):
        list(plan(short))


def test_fields_that_are_given_stay(question):
    given = replace(question, overrides=["parallel.tp=2", "train.recompute=full", "parallel.vision=shard"])
    best = Search(wish_of(given)).best(4)
    assert {(one.recipe.parallel.tp, one.recipe.train.recompute) for one in best} == {(2, "full")}
    assert {one.recipe.parallel.vision for one in best} == {"shard"}
    with pytest.raises(ConfigError, match="--devices 8: the degrees that are set take 3 devices"):
        list(plan(replace(question, overrides=["parallel.tp=3"])))
    with pytest.raises(ConfigError, match=r"parallel.tp 16: the model has 8 query heads"):
        list(plan(replace(question, devices=16, overrides=["parallel.tp=16"])))


def test_the_command_writes_a_recipe_that_reads_back(model, tmp_path, capsys):
    target = tmp_path / "plan.yaml"
    words = ["plan", str(model), "--devices", "4", "--memory", "1GiB", "--seq", "1024", "--sample", "256", "--answer"]
    words += ["64", "--picture", "224x224", "--lora", "--dpo", "-n", "2", "lora.rank=4", "--out", str(target)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "adapters of language," in out and " pairs of 512 tokens, 128 trained" in out
    recipe = load_recipe(target)
    assert recipe.parallel.mesh.size == 4 and recipe.lora.rank == 4 and recipe.dpo is not None
    assert recipe.model.dtype == "bfloat16" and recipe.data.pack_tokens in (1024, 512)
    assert main(words) == 2  # it is there already
    assert main([*words[:-2], "parallel.pp=2"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out.split("\n\n", 1)[1])
    assert printed["parallel"]["pp"] == 2
    assert sum(np.ravel(printed["parallel"]["language_layers"])) == SMALL["num_hidden_layers"]
    assert printed["train"]["recompute"] in ("none", "selective", "full")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Qwen2.5-VL-9B"}, r"is no directory with a config.json, nor a size that is known: Qwen2-VL-2B"),
        ({"devices": 0}, "--devices 0: give the number of devices"),
        (
            {"devices": 64, "global_batch": 1, "overrides": ["parallel.tp=1", "parallel.cp=1", "parallel.pp=1"]},
            "a step of 1 samples fills 1 micro-batches of 2048 tokens",
        ),
        ({"device": "TPU"}, r"device type 'TPU' is not in the table; known are 910B1"),
        ({"sample": 100}, r"--sample 100: 1 pictures are 64 tokens and the answer 64.* at least 128"),
        ({"sample": 4096}, r"--sample 4096: a micro-batch of --seq 2048 tokens has no room"),
        (
            {"device": "300I DUO", "overrides": ["model.dtype=float32"]},
            "float32 is not in the table, which has float16",
        ),
    ],
)
def test_questions_that_cannot_be_answered(question, change, message):
    with pytest.raises(ConfigError, match=message):
        list(plan(replace(question, **change)))


def test_processes_on_this_machine(question):
    wish = wish_of(replace(question, device="cpu", devices=2))
    assert wish.device.name == "this cpu" and wish.base.model.dtype == "float32"
    assert wish.device.peaks["float32"] > 1e8 and wish.device.bandwidth > 1e7
    assert Search(wish).best(3)[0].step.seconds > 0


def test_sizes_on_the_command_line():
    assert bytes_of("64GiB", "-") == 64 * 2**30 and bytes_of("1.5 gb", "-") == 1_500_000_000
    assert pixels_of("28x56") == (28, 56)
    for text in ("64X", "GiB", "-1GiB", "1.2.3GB", "0"):
        with pytest.raises(ConfigError, match="give bytes with a unit"):
            bytes_of(text, "--memory")
    with pytest.raises(ConfigError, match="give height and width"):
        pixels_of("0x5")


# -- layers on stages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tower", "decoder", "pp", "virtual"), [(32, 28, 4, 1), (32, 80, 8, 2), (4, 8, 4, 3), (2, 6, 8, 1)]
)
def test_stages_are_even_in_time(tower, decoder, pp, virtual):
    times = [0.3] * tower, [1.0] * (decoder - 1) + [2.0]
    vision, language = placed(*times, pp, virtual)
    counts = [(v, n) for v_row, n_row in zip(vision, language, strict=True) for v, n in zip(v_row, n_row, strict=True)]
    assert sum(v for v, _ in counts) == tower and sum(n for _, n in counts) == decoder
    assert all(v + n for v, n in counts) and counts[-1][1]
    slowest = max(0.3 * v + n for v, n in counts[:-1])
    assert max(slowest, 0.3 * counts[-1][0] + counts[-1][1] + 1) <= max(2.0, sum(map(sum, times)) / len(counts) + 1.3)


# -- the guides --------------------------------------------------------------------------------------------------------


def test_the_guides_layouts_are_those_of_the_recipes():
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(path)
        guide = guide_for(recipe.model.path, lora=recipe.lora is not None, dpo=recipe.dpo is not None)
        section, parallel = guide.section(recipe.parallel.mesh.size), recipe.parallel
        for name in ("mesh", "vision_layers", "language_layers"):
            assert getattr(section, name) == getattr(parallel, name), (path.name, name)


def test_a_layout_of_the_guides_beside_the_first(capsys):
    assert main(["plan", "Qwen2.5-VL-7B", "--devices", "8", "-n", "1", "--global-batch", "192"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"2  pp 2 x dp 4 x cp 1 x tp 1 \(guide\) +\d+  none", out)
    assert re.search(r"the guides' layout takes \S+ s, \d+% more than the first, most of it \w+", out)
    assert main(["plan", "Qwen2.5-VL-7B", "--devices", "3", "-n", "1"]) == 0
    assert "the guides' layout is not for 3 devices: it takes 2 devices" in capsys.readouterr().out
    assert main(["plan", "Qwen2-VL-2B", "--devices", "2", "-n", "1", "parallel.tp=2"]) == 0
    assert "the guides' layout (pp 1 x dp 2 x cp 1 x tp 1) has another parallel.tp" in capsys.readouterr().out
