"""Recipes: what they take, and what they say about what they do not take."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from duetvl.commands.parser import parse
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.stages import Stages
from duetvl.models.qwen_vl.config import published_config
from duetvl.training.memory import division_of
from duetvl.training.recipe import text
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.recipe.placement import exchanging, stages_of
from duetvl.training.recipe.reading import check_world, for_world, load_recipe, make_recipe
from duetvl.training.recipe.sections import LoraSection, Recipe
from duetvl.training.recipe.text import recipe_reference
from duetvl.training.recipe.yaml_values import parse_yaml, write_yaml

BASE = {"model": {"path": "ckpt"}, "data": {"train": "data.jsonl"}}


def make(*overrides: str) -> Recipe:
    return make_recipe(BASE, overrides, name="chat")


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_and_overrides():
    lists = "model.freeze=[vision, projector]", "data.train=[a.jsonl, b.json]"
    recipe = make("optim.lr=3e-5", *lists, "optim.clip=null")
    assert recipe.optim.lr == 3e-5
    assert recipe.optim.clip is None
    assert recipe.model.freeze == ("vision", "projector")
    assert [source.path for source in recipe.data.train] == ["a.jsonl", "b.json"]
    assert recipe.train.output_dir == "runs/chat"
    assert make("model.freeze=vision").model.freeze == ("vision",)
    assert make().model.freeze == ("vision", "projector")
    assert make("lora.rank=8").model.freeze == make("model.freeze=[]").model.freeze == ()
    assert make("lora.rank=8", "model.freeze=vision").model.freeze == ("vision",)
    with pytest.raises(ConfigError, match=r"optim\.lr_scale names 'projector', which is frozen where model\.freeze is"):
        make("optim.lr_scale={projector: 5}")
    assert make("optim.lr_scale={projector: 5}", "model.freeze=vision").optim.lr_scale == {"projector": 5}


def test_the_last_override_wins():
    assert make("optim.lr=1", "optim.lr=2").optim.lr == 2.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "optim.rl=3e-5",
            "optim has no field 'rl'; did you mean 'lr'? "
            "(betas, clip, decay, eps, loss_scale, loss_scale_window, lr, lr_scale, min_lr_ratio, no_decay, offload, "
            "schedule, state_dtype, warmup, weight_decay)",
        ),
        (
            "optm.lr=1",
            "a recipe has no section 'optm'; did you mean 'optim'? "
            "(backend, checkpoint, data, dpo, eval, log, lora, model, optim, parallel, train)",
        ),
        ("train.epochs=1e300", "train.epochs: found 1e+300, allowed: a number or null, > 0, <= 1e+09"),
        ("optim.lr=fast", "optim.lr: found 'fast', allowed: a number, > 0"),
        ("optim.lr=0", "optim.lr: found 0, allowed: a number, > 0"),
        ("optim.lr=.nan", "optim.lr: found nan, allowed: a number, > 0"),
        ("optim.lr=", "optim.lr has no value; allowed: a number, > 0; or leave the field out"),
        ("optim.clip=", "optim.clip has no value; allowed: a number or null, > 0; or leave the field out"),
        ("data.train=", "data.train has no value; allowed: a path or a list of sources, not empty"),
        ("optim.betas=[0.9]", "optim.betas: found [0.9], allowed: 2 numbers, each: a number, >= 0, < 1"),
        ("optim.schedule=cos", "optim.schedule: found 'cos', allowed: cosine, linear, constant, inverse_sqrt, wsd"),
        ("train.steps=1.5", "train.steps: found 1.5, allowed: a whole number or null, >= 1"),
        ("train.steps=true", "train.steps: found true, allowed: a whole number or null, >= 1"),
        ("data.shuffle=no", "data.shuffle: found 'no', allowed: true or false"),
        ("data.train=[]", "data.train: found [], allowed: a path or a list of sources, not empty"),
        ("model.freeze=[3]", "model.freeze: found 3, allowed: one or a list of text"),
        (
            "optim.lr_scale={vision: 0}",
            "optim.lr_scale: found 0, allowed: a mapping of text to a number, > 0",
        ),
        ("optim.warmup=1.5", "optim.warmup: found 1.5, allowed: a fraction of all steps below 1, or whole steps"),
        ("train.eval_every=3", "train.eval_every 3 needs data.val or data.val_rate, and neither is given"),
        ("train.eval_first=true", "train.eval_first needs data.val or data.val_rate, and neither is given"),
        ("checkpoint.keep_best=eval_loss", "checkpoint.keep_best eval_loss needs train.eval_every"),
        ("train.patience=3", "train.patience 3 counts evaluations: give train.eval_every"),
        ("lr=3", "override 'lr=3' is not of the form section.key=value; did you mean optim.lr=3?"),
        (
            "learning_rate=3",
            "override 'learning_rate=3' is not of the form section.key=value; did you mean optim.lr=3?",
        ),
        (
            "lora=3",
            "lora: found 3, allowed: a section with fields (rank, alpha, dropout, targets, rslora, dora, adapter)",
        ),
        ("log=[1]", f"log: found [1], allowed: a section with fields ({', '.join(text.fields('log'))})"),
        (
            "lora={rnk: 3}",
            "lora has no field 'rnk'; did you mean 'rank'? (adapter, alpha, dora, dropout, rank, rslora, targets)",
        ),
        ("rl", "override 'rl' is not of the form section.key=value"),
        (
            "every=3",
            "override 'every=3' is not of the form section.key=value; did you mean checkpoint.every=3 or "
            "log.every=3 or eval.every=3?",
        ),
        ("optim.learning_rate=1", "optim has no field 'learning_rate'; did you mean optim.lr?"),
        ("train.lr=1", "train has no field 'lr'; did you mean optim.lr?"),
        ("lora.r=1", "lora has no field 'r'; did you mean lora.rank?"),
        ("optim.lr", "override 'optim.lr' is not of the form section.key=value; did you mean optim.lr=VALUE?"),
        ("optim.lr=[", "override optim.lr: not valid YAML: expected the node content, but found '<stream end>'"),
        (
            "data.train=[*.tar, b]",
            "override data.train: not valid YAML: expected alphabetic or numeric character, but found '.'; put a text "
            "that begins with * in quotes",
        ),
        (
            "model.path=a\0",
            "model.path: found 'a\\x00', which is not text in UTF-8 without a byte 0",
        ),
        (
            "model.path=\udcff",
            "model.path: found '\\udcff', which is not text in UTF-8 without a byte 0",
        ),
        ('model.freeze=[["a\\nb"]]', "model.freeze: found [a\\nb], allowed: one or a list of text"),
        ("train.steps=99999999999999999999", "train.steps: found a whole number beyond 64 bits"),
    ],
)
def test_an_error_names_the_field_what_was_found_and_what_is_allowed(override, expected):
    assert message(override) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("*.tar", "*.tar"), ("dir #2/a", "dir #2/a"), ("a: b", "a: b"), ("@x", "@x"), ("&a", "&a"), ("!x", "!x"),
        ("- a", "- a"), (" a ", "a"), ("'1e5'", "1e5"), ('"*"', "*"),
    ],
)  # fmt: skip
def test_an_override_without_quotes_or_brackets_is_taken_whole(text, value):
    assert make(f"model.path={text}").model.path == value


@pytest.mark.parametrize("section", ["lora", "dpo"])
@pytest.mark.parametrize(
    ("below", "there"), [("", True), (" {}", True), (" # all defaults", True), (" null", False), (" ~", False)]
)
def test_a_section_with_nothing_below_it_is_there(tmp_path, section, below, there):
    (tmp_path / "a.yaml").write_text(f"model: {{path: m}}\n{section}:{below}\ndata: {{train: d}}\n")
    assert (getattr(load_recipe(tmp_path / "a.yaml"), section) is not None) == there


@pytest.mark.parametrize("section", [name for name in Recipe.model_fields if name not in ("model", "data")])
def test_every_other_section_may_be_empty(tmp_path, section):
    (tmp_path / "a.yaml").write_text(f"model: {{path: ckpt}}\ndata: {{train: data.jsonl}}\n{section}:\n")
    assert load_recipe(tmp_path / "a.yaml") == make_recipe({**BASE, section: {}}, name="a")


def test_a_field_with_nothing_after_it_is_null_only_where_that_is_its_default(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {path: m}\ndata: {train: d, val: , cutoff_len: }\nlog:\n  wandb:\n")
    assert load_recipe(tmp_path / "a.yaml").data.val == ()
    (tmp_path / "a.yaml").write_text("model: {path: m}\ndata: {train: d}\ncheckpoint:\n  keep_last:\n")
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last has no value"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=[a, {path: b, weight: -1}]", "data.train[1].weight: found -1, allowed: a number, >= 1e-06"),
        ("data.train={path: b, weight: 1e-7}", "data.train[0].weight: found 1.0e-7, allowed: a number, >= 1e-06"),
        ("data.train={pth: b}", "data.train[0] has no field 'pth'; did you mean 'path'?"),
        ("data.train={weight: 2}", "data.train[0].path is missing: File (JSON"),
        ("data.val={path: b, format: lava}", "data.val[0].format: found 'lava', allowed: auto, messages, sharegpt"),
        ("data.train={path: b, columns: {image: x}}", "b: columns has no 'image'; did you mean 'images'?"),
        ("data.train={path: b, tags: {usertag: x}}", "b: tags has no 'usertag'; did you mean 'user_tag'?"),
    ],
)
def test_an_error_in_a_data_set_names_its_field(override, expected):
    with pytest.raises(ConfigError) as caught:
        make_recipe({"model": {"path": "m"}, "data": {"train": "d"}}, [override])
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.steps=5", "train.epochs=2"), "train.steps 5 and train.epochs 2 both set the length"),
        (
            ("optim.loss_scale=1024", "model.dtype=float32"),
            "optim.loss_scale applies to model.dtype float16 only, not to float32",
        ),
        (("model.freeze=[vision,projector,language]",), "nothing would be trained"),
        (("optim.schedule=constant", "optim.min_lr_ratio=0.1"), "does not apply to optim.schedule constant"),
        (("optim.decay=0.2",), "optim.decay applies to optim.schedule wsd only, not to cosine"),
        (("optim.schedule=wsd", "optim.decay=1.5"), "optim.decay: found 1.5, allowed: a fraction"),
        (("data.min_pixels=100", "data.max_pixels=50"), "data.min_pixels 100 is more than data.max_pixels 50"),
        (("dpo.loss=hinge", "dpo.label_smoothing=0.1"), "dpo.label_smoothing applies to dpo.loss sigmoid only"),
        (("dpo.beta=0.1", "train.loss=sample"), "train.loss sample does not apply to dpo"),
        (("dpo.beta=0.1", "data.train_on_prompt=true"), "data.train_on_prompt does not apply to dpo"),
        (("dpo.beta=0.1", "lora.dropout=0.05"), "lora.dropout 0.05 does not apply to dpo"),
        (("dpo.cache=c", "data.streaming=true", "train.steps=5"), "dpo.cache reads all pairs before the first step"),
    ],
)
def test_contradictions(overrides, expected):
    assert expected in message(*overrides)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "model is missing: a recipe needs the section with model.path (and 1 more field)"),
        ({**BASE, "model": {}}, "model.path is missing: Directory of the model in the Hugging Face layout, or an id"),
        ({**BASE, "model": 3}, "model: found 3, allowed: a section with fields (path, base, dtype, freeze)"),
        (
            {"model": {"pth": "m"}, "data": {}},
            "model has no field 'pth'; did you mean 'path'? (base, dtype, freeze, path)",
        ),
        ({**BASE, 1: {}}, "the recipe: the key 1 is not text"),
        ({**BASE, "optim": {1: 2}}, "optim: the key 1 is not text"),
        ({**BASE, "optim": {"lr_scale": {None: 2}}}, "optim.lr_scale: the key null is not text"),
        (None, "expected sections"),
        ([1], "found list"),
    ],
)
def test_files_without_the_sections(values, expected):
    with pytest.raises(ConfigError) as caught:
        make_recipe(values)
    assert expected in str(caught.value)


def test_another_number_of_processes_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"pp 1 x dp 2 x cp 1 x tp 2 needs 4 processes, and 3 were started; start 4"):
        check_world(make("parallel.dp=2", "parallel.tp=2"), 3)
    with pytest.raises(ConfigError, match=r"needs 1 process, and 2 were started; .* parallel.dp=auto"):
        check_world(make(), 2)
    placed = make("parallel.pp=2", "parallel.language_layers=[1, 1]")
    with pytest.raises(
        ConfigError, match=r"or parallel.pp=1 parallel.language_layers=null takes the same steps on one"
    ):
        check_world(placed, 1)
    check_world(placed, 2)
    check_world(make(), 1)
    check_world(make("parallel.dp=2", "parallel.tp=2"), 4)


def test_dp_auto_takes_the_rest_of_the_processes():
    assert for_world(make("parallel.dp=auto"), 1) == make()
    assert for_world(make("parallel.dp=auto", "parallel.tp=2"), 6).parallel.mesh == Mesh(dp=3, tp=2)
    assert make("parallel.dp=auto", "parallel.tp=2").parallel.mesh == Mesh(tp=2)
    with pytest.raises(ConfigError, match="3 processes were started, which 2 does not divide; start a multiple of 2"):
        for_world(make("parallel.dp=auto", "parallel.tp=2"), 3)


def test_degrees_that_a_model_cannot_have_are_refused_with_the_possible_ones():
    model = published_config("Qwen2.5-VL-3B")
    assert division_of(make("parallel.tp=16"), model).mesh.tp == 16
    with pytest.raises(ConfigError, match=r"tp 17: .* has 16 query heads.*possible are 1 to 16, .* 1, 2, 4, 8, 16$"):
        division_of(make("parallel.tp=17"), model)


def test_layers_of_stages_are_flat_or_a_row_for_each_virtual_stage():
    flat = make("parallel.pp=2", "parallel.vision_layers=[32, 0]", "parallel.language_layers=[12, 16]").parallel
    assert flat.language_layers == ((12, 16),) and flat.virtual == 1
    rows = make("parallel.pp=2", "parallel.vision_layers=[[8,0],[0,0]]", "parallel.language_layers=[[0,1],[2,3]]")
    assert rows.parallel.language_layers == ((0, 1), (2, 3)) and rows.parallel.virtual == 2
    # The documented example of four ranks and three virtual stages, where both towers meet on stage 3.
    make(
        "parallel.pp=4",
        "parallel.vision_layers=[[10,10,10,2],[0,0,0,0],[0,0,0,0]]",
        "parallel.language_layers=[[0,0,0,1],[4,4,4,4],[4,3,2,2]]",
    )
    assert make("parallel.language_layers=null").parallel.virtual == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("parallel.vision_layers=[32, 0]",), "parallel.vision_layers [32, 0] has 2 stages, parallel.pp is 1; give"),
        (("parallel.pp=2", "parallel.language_layers=[[7, 7], [14]]"), "language_layers [14] has 1 stages"),
        (("parallel.language_layers=[0]",), "parallel.language_layers places no layer at all"),
        (
            ("parallel.pp=4", "parallel.vision_layers=[30,2,0,0]", "parallel.language_layers=[1,10,10,7]"),
            "puts vision layers on stage 1, after parallel.language_layers has begun on stage 0",
        ),
        (
            ("parallel.vision_layers=[[1],[1]]", "parallel.language_layers=[2]"),
            "parallel.vision_layers has 2 virtual stages, parallel.language_layers 1; give both as many rows",
        ),
        (
            ("parallel.vision_layers=[-1]",),
            "parallel.vision_layers: found -1, allowed: numbers of layers, one for each stage, or a list of them for "
            "each virtual stage, not empty or null",
        ),
        (("parallel.vision_layers=[[1], 2]",), "parallel.vision_layers: found 2, allowed: numbers of layers"),
        (("parallel.vision_layers=[]",), "parallel.vision_layers: found [], allowed: numbers of layers"),
        (("parallel.cp_algorithm=ulises",), "parallel.cp_algorithm: found 'ulises', allowed: ulysses, ring"),
        (("parallel.cp=4", "parallel.ulysses=2"), "is for parallel.cp_algorithm hybrid, which is ulysses; give"),
        (
            ("parallel.cp=4", "parallel.cp_algorithm=hybrid", "parallel.ulysses=3"),
            "parallel.ulysses 3 does not divide parallel.cp 4; possible are 1, 2, 4",
        ),
        (("parallel.zero=2", "train.recompute=full"), "parallel.zero: found 2, allowed: 1, 3"),
        (("parallel.zero=3",), "needs train.recompute full, found none"),
        (("parallel.zero=3", "train.recompute=full", "parallel.pp=2"), "parallel.pp is 2: give parallel.pp=1"),
        (("parallel.cp_algorithm=hybrid", "parallel.ulysses=0"), "parallel.ulysses: found 0, allowed: "),
    ],
)
def test_layers_that_cannot_be_placed(overrides, expected):
    assert expected in message(*overrides)


def placed(*overrides: str, model: str = "Qwen2.5-VL-7B") -> Stages:
    return stages_of(make(*overrides).parallel, published_config(model))


def test_layers_add_up_to_the_model():
    assert placed("parallel.pp=2", "parallel.language_layers=[12, 16]") == Stages((32, 0), (12, 16))
    with pytest.raises(ConfigError) as caught:
        placed("parallel.pp=2", "parallel.language_layers=[12, 15]")
    assert str(caught.value) == (
        "parallel.language_layers [[12, 15]] places 27 layers, the language model has 28; "
        "evenly over 2 stages they would be [14, 14]"
    )
    with pytest.raises(ConfigError, match="places 31 layers, the vision tower has 32"):
        placed("parallel.vision_layers=[31]")


def test_a_tower_without_a_list_is_placed_by_default():
    assert placed() == Stages((32,), (28,))
    assert placed("parallel.pp=3") == Stages((32, 0, 0), (10, 9, 9))
    language = "parallel.language_layers=[[0,1,8],[8,8,3]]"
    assert placed("parallel.pp=3", language) == Stages((32, 0, 0, 0, 0, 0), (0, 1, 8, 8, 8, 3))
    vision = "parallel.vision_layers=[16,16,0]"
    assert placed("parallel.pp=3", vision) == Stages((16, 16, 0), (0, 14, 14))
    assert placed("parallel.pp=3", vision, language) == Stages((16, 16, 0, 0, 0, 0), (0, 1, 8, 8, 8, 3))
    rows = "parallel.vision_layers=[[31,0],[1,0]]"
    assert placed("parallel.pp=2", rows) == Stages((31, 0, 1, 0), (0, 0, 14, 14))
    assert placed("parallel.language_layers=[[10],[18]]") == Stages((32, 0), (10, 18))


def test_every_rank_of_a_pipeline_has_a_layer():
    assert placed("parallel.pp=28").language == (1,) * 28
    with pytest.raises(ConfigError) as caught:
        placed("parallel.pp=29")
    assert str(caught.value) == (
        "parallel.pp 29: rank 28 of the pipeline has no layer of the model; possible without lists are 1 to 28"
    )
    with pytest.raises(ConfigError, match=r"rank 1 of the pipeline has no layer of the model; give it some in"):
        placed("parallel.pp=3", "parallel.language_layers=[12, 0, 16]")
    # A stage may have none where its rank has some in another row.
    placed("parallel.pp=2", "parallel.language_layers=[[0, 0], [14, 14]]")


def test_ranks_that_exchange_heads_have_one_each():
    model = published_config("Qwen2.5-VL-7B")  # 28 query heads

    def degree(*overrides: str) -> int:
        return exchanging(make(*overrides).parallel, model)

    assert [degree(), degree("parallel.cp=28"), degree("parallel.cp=5")] == [1, 28, 5]
    assert degree("parallel.cp=64", "parallel.cp_algorithm=ring") == 1
    hybrid = "parallel.cp_algorithm=hybrid"
    assert degree("parallel.cp=64", hybrid) == 16
    assert degree("parallel.cp=64", hybrid, "parallel.tp=4") == 4
    assert degree("parallel.cp=64", hybrid, "parallel.ulysses=2") == 2
    with pytest.raises(ConfigError) as caught:
        degree("parallel.cp=8", "parallel.tp=4")
    assert str(caught.value) == (
        "parallel.cp 8 with parallel.cp_algorithm ulysses: a rank has 7 query heads, of which each rank that exchanges "
        "them needs one at least; possible are 1 to 7, or any number with parallel.cp_algorithm=hybrid or ring"
    )
    with pytest.raises(ConfigError, match=r"parallel.ulysses 32: the model has 28 .*; possible are 1, 2, 4, 8, 16$"):
        degree("parallel.cp=64", hybrid, "parallel.ulysses=32")


def test_a_division_has_the_stages_and_teams_of_its_recipe():
    recipe = make(
        "parallel.pp=2", "parallel.language_layers=[12,16]", "parallel.cp=4", "parallel.cp_algorithm=hybrid",
        "parallel.ulysses=2",
    )  # fmt: skip
    division = division_of(recipe, published_config("Qwen2.5-VL-7B"), 4)
    assert division.ulysses == 2 and division.stages == Stages((32, 0), (12, 16))
    assert division.holds("model.layers.12.mlp.up_proj.weight") and not division.holds("visual.merger.mlp.0.weight")


def test_yaml_and_json_files(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {path: m}\ndata:\n  train: d.jsonl\noptim: {lr: 1e-5}\nlog:\n")
    (tmp_path / "b.json").write_text('{\n\t"model": {"path": "m"},\n\t"data": {"train": "d.jsonl"}\n}')
    assert load_recipe(tmp_path / "a.yaml").optim.lr == 1e-5
    assert load_recipe(tmp_path / "b.json").train.output_dir == "runs/b"


def test_a_tilde_is_the_home_directory(monkeypatch):
    """YAML and `section.key=~/...` reach us as they are: a shell replaces it at the beginning of a word alone."""
    monkeypatch.setenv("HOME", "/home/me")
    fields = ("train.output_dir", "model.path", "data.image_root", "data.cache", "lora.adapter", "data.train")
    recipe = make(*(f"{field}=~/x" for field in fields))
    found = recipe.model_dump(mode="json")
    assert {found[section][key] for section, key in (field.split(".") for field in fields[:-1])} == {"/home/me/x"}
    assert recipe.data.train[0].path == "/home/me/x"
    assert make("train.output_dir=runs/~x").train.output_dir == "runs/~x"


def test_paths_are_left_as_they_are_given(tmp_path, monkeypatch):
    """Relative to the working directory, as those of overrides."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text("model: {path: ckpt}\ndata: {train: data/a.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/a.yaml")
    assert (recipe.model.path, recipe.data.train[0].path) == ("ckpt", "data/a.jsonl")


HEAD = "model: {path: m}\ndata: {train: d}\n"
LAUGHS = "&a [1,2,3,4,5,6,7,8,9]" + "".join(f", &{k} [{', '.join([f'*{j}'] * 9)}]" for j, k in pairwise("abcdefgh"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: {path: m}\nmodel: {path: n}\n", "line 2, column 1: not valid YAML: the key 'model' is given twice"),
        ("model: {path: m\n", "not valid YAML"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        ("a: \x01", "not valid YAML: unacceptable character"),
        (f"{HEAD}1: x\n", "line 3, column 1: not valid YAML: the key '1' is not text; put it in quotes"),
        (f"{HEAD}optim: {{lr_scale: {{true: 2}}}}\n", "the key 'true' is not text"),
        (f"{HEAD}? [a]\n: b\n", "a key must be text"),
        (f"{HEAD}? {{a: b}}\n: b\n", "a key must be text"),
        (f"{HEAD}lora: {'[' * 3000}{']' * 3000}\n", "nested"),
        (f"{HEAD}lora: {'[' * 30}{']' * 30}\n", "lora: is nested more than 16 deep"),
        (f"{HEAD}log: {{wandb: [{LAUGHS}]}}\n", "log.wandb: is nested more than 16 deep, or has more than 100000"),
        (f"{HEAD}log: {{wandb: &a [*a]}}\n", "recursive"),
        (f"{HEAD}log: {{wandb: !!bool x}}\n", "'x' is not of the type bool"),
        (f"{HEAD}log: {{wandb: !!timestamp x}}\n", "could not determine a constructor"),
        (f'{HEAD}log: {{wandb: "\\ud800"}}\n', "log.wandb: found '\\ud800'"),
        (f"{HEAD}log: {{wandb: *x}}\n", "found undefined alias"),
        (f"{HEAD}log: {{wandb: *.x}}\n", "; put a text that begins with * in quotes"),
        (" " * (1 << 20) + "a", "has 1048577 bytes, a recipe at most 1048576"),
    ],
)
def test_damaged_files(tmp_path, content, expected):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "a.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"model": {"path": "a", "path": "b"}}', "the key 'path' is given twice"),
        ('{"model": {"path": "\\ud800"}}', "surrogates not allowed"),
        (f'{{"model": {"[" * 3000}{"]" * 3000}}}', "nested"),
        ('{"model": {"path": "m"},', "cannot be read as JSON"),
    ],
)
def test_damaged_json_files(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_recipe(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_characters_written_as_two_surrogates(tmp_path, name):
    (tmp_path / name).write_text(
        '\ufeff{"model": {"path": "\\ud83d\\ude00"}, "data": {"train": "d"}}', encoding="utf-8"
    )
    assert load_recipe(tmp_path / name).model.path == "\U0001f600"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: is a pipe or a device; write the recipe to a file first"):
        load_recipe(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a directory; give the file of a recipe"):
        load_recipe(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_recipe("a" * 5000)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), (".5", 0.5), ("-3", -3), ("010", 10), ("0x10", 16), ("0o10", 8),
        ("1:30", "1:30"), ("no", "no"), ("on", "on"), ("true", True), ("null", None), ("~", None), ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"), ("[1, a]", [1, "a"]), ("{a: 1e3}", {"a": 1000.0}), ("'1'", "1"),
    ],
)  # fmt: skip
def test_yaml_values(text, value):
    assert parse_yaml(text, "x") == value
    assert type(parse_yaml(text, "x")) is type(value)


def test_a_recipe_survives_being_written():
    recipe = make("optim.lr=1e-5", "data.val=v.jsonl", "optim.clip=null", "optim.eps=1e-12")
    assert make_recipe(parse_yaml(write_yaml(recipe.model_dump(mode="json")), "x")) == recipe


@pytest.mark.parametrize("text", ["1e5", "0o17", "", "null", "true", ".inf", "12", "*.tar", "a: b", "no", "010", "'x"])
def test_texts_survive_being_written(text):
    assert parse_yaml(write_yaml({"key": text}), "x") == {"key": text}


def test_the_document_is_current():
    document = Path(__file__).parents[2] / "docs" / "recipe.md"
    assert document.read_text(encoding="utf-8") == recipe_reference(), (
        "write it again: python -c 'from duetvl.training.recipe.text import recipe_reference as r; "
        'open("docs/recipe.md", "w").write(r())\''
    )


def test_settings_of_other_tools_are_answered_with_the_field_or_the_way():
    with pytest.raises(ConfigError) as caught:
        make_recipe({"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "stage": "sft", "lora_rank": 8})
    assert str(caught.value).startswith(
        "a recipe has no section 'model_name_or_path'; did you mean model.path? docs/migrating.md has the fields"
    )
    with pytest.raises(ConfigError, match="'dataset_param' is a key of MindSpeed-MM's files; `duetvl import-"):
        make_recipe({"dataset_param": {}, "dataloader_param": {}})


def test_every_name_of_another_tool_leads_to_a_field_that_is_there():
    for name in text._ELSEWHERE:
        section, _, key = text._ELSEWHERE[name].partition(".")
        assert key in text.fields(section), name


def test_a_whole_section_as_an_override():
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "lora": {"rank": 64}}
    made = {text: make_recipe(values, [text]).lora for text in ("lora={}", "lora=", "lora={rank: 4, dora: true}")}
    assert made["lora={}"] == made["lora="] == LoraSection()
    assert (made["lora={rank: 4, dora: true}"].rank, made["lora={rank: 4, dora: true}"].dora) == (4, True)
    assert make_recipe(values, ["lora=null"]).lora is None
    assert make_recipe(values, ["lora={}", "lora.rank=5"]).lora == LoraSection(rank=5)
    assert make_recipe(values, ["optim=null"]).optim == OptimSection()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--lr 3", "optim.lr=3"),
        ("--optim.lr=3", "optim.lr=3"),
        ("optim.lr = 3", "optim.lr=3"),
        ("train.steps=9 optim.lr= 3", "optim.lr=3"),
        ("optim.lr =3 log.every=2", "optim.lr=3"),
        ("--optm.rl 3", "optim.lr=3"),
        ("--per-device-train-batch-size 4 train.steps=3", "train.global_batch=4"),
        ("--lora {}", "lora={}"),
        ("--every 4", "checkpoint.every=4 or log.every=4 or eval.every=4"),
    ],
)
def test_fields_given_as_options_get_their_spelling(words, meant, capsys):
    with pytest.raises(SystemExit):
        parse(["train", "run.yaml", *words.split()])
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_words_near_to_no_field_get_the_form(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "run.yaml", "--nonsense", "3"])
    assert "a field of the recipe is given as section.key=value, as in optim.lr=1e-5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ({"optim.lr": 3}, "in a file the field stands below its section: `optim: {lr: ...}`"),
        ({"learnig_rate": 3}, "a recipe has no section 'learnig_rate'; did you mean optim.lr?"),
        ({"optim": {"learnig_rate": 3}}, "optim has no field 'learnig_rate'; did you mean optim.lr?"),
        (
            {"optim": {"lr=3": None}},
            "optim has no field 'lr=3'; in YAML a colon and a blank stand between them: `lr: 3`",
        ),
        ({"log": "every = 3"}, "in YAML a colon and a blank stand between them: `every: 3`"),
        ({"optm": {"lr": 3}}, "a recipe has no section 'optm'; did you mean 'optim'?"),
    ],
)
def test_what_is_misspelt_in_a_file_gets_its_spelling(written, hint):
    with pytest.raises(ConfigError) as caught:
        make_recipe({"model": {"path": "m"}, "data": {"train": "d"}, **written})
    assert hint in str(caught.value)
