"""The recipes that come with duetvl: each is valid for both backends, places its model's layers, and runs."""

from __future__ import annotations

import json
import math
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from duetvl.cli import _overrides
from duetvl.commands.parser import parse
from duetvl.core.errors import ConfigError
from duetvl.models.qwen_vl.config import published_config, published_names
from duetvl.training.lora import plan_adapters
from duetvl.training.memory import Memory, division_of, estimate, largest_load
from duetvl.training.recipe.reading import check_world, for_world, load_recipe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.train import train
from duetvl.training.watching.metrics import read_metrics

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
NAME = re.compile(r"qwen2(_5)?_vl_(\d+b)_(sft_full|sft_lora|sft_video|dpo_full|dpo_lora)")
ONE_PROCESS = ("parallel.pp=1", "parallel.dp=1", "parallel.tp=1", "parallel.vision_layers=null",
               "parallel.language_layers=null")  # fmt: skip

every_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def file_of(published: str) -> str:
    return published.replace(".", "_").replace("Qwen2-VL-", "qwen2_vl_").replace("Qwen2_5-VL-", "qwen2_5_vl_").lower()


def test_every_size_has_its_tasks():
    names = {path.stem for path in FILES}
    for published in published_names():
        assert {f"{file_of(published)}_{task}" for task in ("sft_full", "sft_lora", "dpo_lora")} <= names
    assert {f"{model}_dpo_full" for model in ("qwen2_vl_2b", "qwen2_vl_7b", "qwen2_5_vl_3b", "qwen2_5_vl_7b")} <= names
    assert {
        f"{model}_sft_video" for model in ("qwen2_vl_2b", "qwen2_vl_72b", "qwen2_5_vl_3b", "qwen2_5_vl_72b")
    } <= names
    assert all(NAME.fullmatch(name) for name in names)


@every_recipe
@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_it_is_valid_for_its_model_on_both_backends(path: Path, backend: str, monkeypatch):
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)
    recipe = load_recipe(path, _overrides(parse(["train", str(path), "--backend", backend])))
    assert recipe.backend.name == backend
    assert recipe.train.output_dir == f"runs/{path.stem}"
    published = recipe.model.path.removeprefix("Qwen/").removesuffix("-Instruct")
    assert path.stem.startswith(f"{file_of(published)}_")
    config = published_config(recipe.model.path)
    division_of(recipe, config)
    assert config.text.num_heads % recipe.parallel.tp == 0 == config.text.num_kv_heads % recipe.parallel.tp
    assert recipe.train.global_batch % recipe.parallel.dp == 0


@every_recipe
def test_its_name_says_what_it_does(path: Path):
    recipe = load_recipe(path)
    found = NAME.fullmatch(path.stem)
    assert found
    task = found[3]
    assert (recipe.lora is not None) == task.endswith("lora")
    assert (recipe.dpo is not None) == task.startswith("dpo")
    assert (recipe.data.video_max_pixels is not None) == (task == "sft_video")
    assert recipe.model.freeze == ("vision", "projector")
    assert path.stem in path.read_text(encoding="utf-8").split("\nmodel:")[0]


@every_recipe
def test_a_layout_for_several_devices_is_refused_on_one(path: Path):
    recipe = load_recipe(path)
    mesh = recipe.parallel.mesh
    if mesh.size == 1:
        check_world(recipe, 1)
        return
    with pytest.raises(ConfigError) as caught:
        check_world(recipe, 1)
    told = str(caught.value)
    assert told.startswith(f"parallel: pp {mesh.pp} x dp {mesh.dp} x cp {mesh.cp} x tp {mesh.tp}")
    assert f"needs {mesh.size} processes, and 1 was started" in told
    fields = re.search(r"or (\S.*) takes the same steps on one$", told)
    assert fields and load_recipe(path, fields[1].split()).parallel.mesh.size == 1
    check_world(load_recipe(path, fields[1].split()), 1)
    check_world(load_recipe(path, ONE_PROCESS), 1)


@every_recipe
def test_every_value_says_where_it_comes_from(path: Path):
    body = path.read_text(encoding="utf-8").split("\nmodel:")[1]
    bare = [line for line in body.splitlines() if re.match(r"  \w+: ", line) and "  # " not in line]
    assert not bare


def test_the_table_is_that_of_the_files():
    rows = {}
    for line in (RECIPES / "README.md").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| \[(\S+)\.yaml\]", line):
            rows[found[1]] = [cell.strip() for cell in line.strip("| ").split("|")]
    assert sorted(rows) == [path.stem for path in FILES]
    for path in FILES:
        recipe, row = load_recipe(path), rows[path.stem]
        mesh = recipe.parallel.mesh
        assert row[1] == recipe.model.path.removeprefix("Qwen/").removesuffix("-Instruct")
        assert row[3:6] == [
            str(mesh.size),
            f"{mesh.pp} x {mesh.dp} x {mesh.cp} x {mesh.tp}",
            str(recipe.train.global_batch),
        ]
        assert float(row[6]) == recipe.optim.lr


# -- layouts without pipeline stages ----------------------------------------------------------------------------------

GIB = 2**30


def replacements() -> list[tuple[str, int, str, float, float]]:
    """The rows of the table: pattern of recipes, devices, fields, GiB of tensors, GiB of the optimizer's among them."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8").split("## Layouts without pipeline stages")[1]
    row = re.compile(r"^\| `(\S+)` \| (\d+) \| `(.+)` \| (\d+) \| (\d+) \|$", re.MULTILINE)
    return [(name, int(ranks), fields, float(a), float(b)) for name, ranks, fields, a, b in row.findall(text)]


def common_fields() -> list[str]:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    found = re.search(r"`pp` above 1 without stages, add `([^`]+)`", text)
    assert found
    return found[1].split()


def estimated(recipe: Recipe) -> Memory:
    """For packs of the samples that the table's notes name: (tokens, trained, patches)."""
    config = published_config(recipe.model.path)
    division_of(recipe, config)
    plan = plan_adapters(recipe, config)
    load = largest_load(recipe, [(640, 256, 4 * 334)] if recipe.dpo else [(512, 128, 4 * 334)])
    return estimate(config, recipe, *load, plan.adapters if plan else None)


def test_a_layout_is_named_for_each_recipe_with_stages():
    staged = [path for path in FILES if load_recipe(path).parallel.pp > 1]
    matched = [path for path in staged for row in replacements() if fnmatch(path.stem, row[0])]
    assert matched == staged  # each once


@pytest.mark.parametrize("row", replacements(), ids=lambda row: row[0])
def test_that_layout_trains_in_the_memory_that_is_named(row):
    pattern, ranks, fields, whole, optimizer = row
    found = []
    for path in [path for path in FILES if fnmatch(path.stem, pattern)]:
        assert load_recipe(path).parallel.mesh.size == ranks
        found.append(estimated(for_world(load_recipe(path, [*common_fields(), *fields.split()]), ranks)))
    largest = max(found, key=lambda memory: memory.peak)
    assert largest.peak / GIB == pytest.approx(whole, abs=1.0)
    assert largest.optimizer / GIB == pytest.approx(optimizer, abs=1.0)


@every_recipe
def test_the_command_at_its_top_trains_it(path: Path):
    """In that layout, on as many processes as it starts: a backslash continues a line, a remark ends the command."""
    head = path.read_text(encoding="utf-8").split("\nmodel:")[0].replace("\\\n#", "")
    commands = [line.lstrip("# ").partition("    (or")[0] for line in head.splitlines()]
    (words,) = [shlex.split(line) for line in commands if re.match(r"duetvl (train|launch) ", line)]
    started = 1
    if words[1] == "launch":
        launched, words = words[: words.index("--")], words[words.index("--") :]
        given = dict(zip(launched[2::2], launched[3::2], strict=True))
        started = int(given["--nproc"]) * int(given.get("--nnodes", "1"))
    inner = parse(words[1:])
    assert Path(inner.recipe) == Path("recipes", path.name)
    recipe = for_world(load_recipe(path, _overrides(inner)), started)
    assert recipe.parallel.mesh.size == load_recipe(path).parallel.mesh.size
    assert recipe.parallel == load_recipe(path).parallel  # and the layout is the guide's own


# -- runs ------------------------------------------------------------------------------------------------------------


def overrides(directory: Path, data: str) -> list[str]:
    """The tiny model and data in the place of a recipe's, and two short steps."""
    return [
        f"model.path={directory / 'model'}",
        "model.dtype=float32",
        f"data.train={directory / data}",
        "data.image_root=null",
        "data.max_pixels=12544",
        "train.steps=2",
        "train.global_batch=4",
        f"train.output_dir={directory / 'run'}",
        "log.tensorboard=false",
        "log.plot=false",
        *ONE_PROCESS,
    ]


def losses(recipe: Recipe, be) -> list[float]:
    result = train(recipe, backend=be)
    assert result.step == 2
    assert (result.run_dir / "export").is_dir()
    return [row["loss"] for row in read_metrics(result.run_dir)]


def test_a_recipe_for_supervised_fine_tuning_runs(be, tmp_path):
    tiny_run.write_recipe(tmp_path)
    recipe = load_recipe(RECIPES / "qwen2_5_vl_7b_sft_full.yaml", overrides(tmp_path, "data.jsonl"))
    first, second = losses(recipe, be)
    assert 4 < first < 7 and 4 < second < 7  # about the logarithm of the vocabulary's size


def test_a_recipe_with_lora_runs_and_leaves_an_adapter(be, tmp_path):
    tiny_run.write_recipe(tmp_path)
    recipe = load_recipe(RECIPES / "qwen2_5_vl_7b_sft_lora.yaml", overrides(tmp_path, "data.jsonl"))
    first, second = losses(recipe, be)
    assert 4 < first < 7 and 4 < second < 7
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["qwen2_vl_2b_dpo_full", "qwen2_5_vl_72b_dpo_lora"])
def test_a_recipe_for_pairs_runs(be, tmp_path, name):
    tiny_run.write_recipe(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    for record in records:
        *record["messages"], chosen = record["messages"]
        record |= {"chosen": chosen, "rejected": {"role": "assistant", "content": "I cannot tell"}}
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    first, second = losses(load_recipe(RECIPES / f"{name}.yaml", overrides(tmp_path, "pairs.json")), be)
    assert first == pytest.approx(math.log(2), rel=1e-5)  # policy and reference are still the same
    assert 0.5 < second < 0.8


def test_a_recipe_for_videos_runs(be, tmp_path):
    tiny_run.write_recipe(tmp_path)
    records = []
    for number in range(4):
        frames = [f"frame{number}-{k}.png" for k in range(3)]
        for k, name in enumerate(frames):
            Image.new("RGB", (56, 56), (60 * k, 40 * number, 90)).save(tmp_path / name)
        question = {"role": "user", "content": "<video>what moves?"}
        records.append({"messages": [question, {"role": "assistant", "content": "nothing"}], "videos": [frames]})
    (tmp_path / "videos.json").write_text(json.dumps(records))
    recipe = load_recipe(RECIPES / "qwen2_5_vl_3b_sft_video.yaml", overrides(tmp_path, "videos.json"))
    first, second = losses(recipe, be)
    assert 4 < first < 7 and 4 < second < 7


@every_recipe
def test_its_own_layout_leaves_room_in_64_gib(path: Path):
    """An eighth of a device is left to the allocator and the collectives; offloaded state is on the host."""
    recipe = load_recipe(path)
    memory = estimated(for_world(recipe, recipe.parallel.mesh.size))
    assert (memory.peak - memory.optimizer * memory.offload) / GIB < 56
