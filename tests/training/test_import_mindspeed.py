"""Runs of MindSpeed-MM become recipes: every key is accounted for, and no script is ever run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import mindspeed_runs as runs
import pytest
import tiny_run

from duetvl.cli import main
from duetvl.core.errors import ConfigError
from duetvl.migrate.importer import Imported, import_run
from duetvl.migrate.key_tables import key_tables
from duetvl.migrate.reading import read_keys
from duetvl.migrate.tables import TABLES
from duetvl.models.qwen_vl.config import published_config
from duetvl.training.lora import plan_adapters
from duetvl.training.recipe.reading import load_recipe, make_recipe
from duetvl.training.recipe.sections import Recipe
from duetvl.training.recipe.yaml_values import parse_yaml
from duetvl.training.train import train

ROOT = Path(__file__).parents[2]
SMALL = runs.GUIDES["qwen2_5_vl_7b"]
FREEZE = {
    "vision": "image_encoder.vision_encoder.freeze", "projector": "image_encoder.vision_projector.freeze",
    "language": "text_decoder.freeze",
}  # fmt: skip


def recipe_of(made: Imported) -> Recipe:
    return make_recipe(parse_yaml(made.text, "made"), name="run")


def notes(made: Imported, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in made.report.notes if note.kind == kind}


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def edit(file: Path, path: str, value: object) -> None:
    """Set a dotted key of a JSON file."""
    values = inner = json.loads(file.read_text())
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[name]
    inner[last] = value
    file.write_text(json.dumps(values))


# -- the guides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", runs.GUIDES)
@pytest.mark.parametrize(("task", "kind"), [({}, "sft_full"), ({"lora": True}, "sft_lora")], ids=["full", "lora"])
def test_a_guide_becomes_the_recipe_of_its_size(tmp_path, name, task, kind):
    """The recipes that come with duetvl hold the guides' values, except where their comments say so."""
    recipe = recipe_of(import_run(*runs.write(tmp_path, runs.GUIDES[name], **task)))
    ours = load_recipe(ROOT / "recipes" / f"{name}_{kind}.yaml")
    layout = load_recipe(ROOT / "recipes" / f"{name}_sft_full.yaml").parallel
    assert recipe.parallel.mesh == layout.mesh
    assert recipe.parallel.language_layers == layout.language_layers
    assert recipe.parallel.vision_layers == layout.vision_layers
    assert recipe.train.global_batch == ours.train.global_batch and recipe.train.steps == ours.train.steps
    assert recipe.model.freeze == ours.model.freeze and recipe.model.dtype == ours.model.dtype
    assert recipe.optim == ours.optim.model_copy(update={"clip": None, "lr": 1e-5, "offload": False})
    assert recipe.lora == ours.lora
    assert recipe.data.max_pixels == ours.data.max_pixels and recipe.data.cutoff_len == ours.data.cutoff_len
    assert recipe.data.seed == ours.data.seed


@pytest.mark.parametrize("name", ["qwen2_vl_72b", "qwen2_5_vl_3b"])
def test_videos_and_pairs(tmp_path, name):
    guide = runs.GUIDES[name]
    video = recipe_of(import_run(*runs.write(tmp_path, guide, video=True)))
    ours = load_recipe(ROOT / "recipes" / f"{name}_sft_video.yaml").data
    fields = ("video_min_pixels", "video_max_pixels", "video_fps", "video_max_frames", "video_frames")
    assert [getattr(video.data, field) for field in fields] == [getattr(ours, field) for field in fields]
    made = import_run(*runs.write(tmp_path, guide, dpo=True, lora=True))
    pairs, ours = recipe_of(made), load_recipe(ROOT / "recipes" / f"{name}_dpo_lora.yaml")
    assert pairs.dpo == ours.dpo and pairs.lora == ours.lora and pairs.optim.lr == ours.optim.lr
    assert pairs.data.train[0].format == "preference"
    assert made.summary.startswith("dpo with lora, ")


@pytest.mark.parametrize("task", [{}, {"lora": True}, {"lora": True, "dpo": True}, {"video": True}], ids=str)
@pytest.mark.parametrize("name", ["qwen2_5_vl_72b", "qwen2_vl_2b"])
def test_every_key_and_every_field_is_in_the_report(tmp_path, task, name):
    """Whatever the three files say is there, and whatever the recipe says."""
    files = runs.write(tmp_path, runs.GUIDES[name], **task)
    edit(files[0], "dataset_param.basic_parameters.val_dataset", "./data/val.json")
    made = import_run(*files)
    told = [note for note in made.report.notes if note.kind != "not needed"]
    for section, values in parse_yaml(made.text, "made").items():
        for field in values:
            assert [note for note in told if f"{section}.{field}" in f"{note.key} {note.text}"], f"{section}.{field}"
    text = " ".join(f"{note.key} {note.text}" for note in made.report.notes)
    for key in [*read_keys(files[0], "data"), *read_keys(files[1], "model")]:
        assert re.search(rf"\b{key.rpartition('.')[2]}\b", text), key
    for argument in re.findall(r"(?<= )--[a-z][a-z0-9-]+", files[2].read_text().partition("GPT_ARGS=")[2]):
        assert re.search(rf"{argument}(?![\w-])", text), argument


def test_every_key_is_in_the_report(tmp_path):
    files = runs.write(tmp_path, SMALL, lora=True)
    text = "\n".join(import_run(*files).report.lines())
    program = next(words for words in files[2].read_text().split('"') if "--use-mcore-models" in words)
    for argument in [word for word in program.split() if word.startswith("--")]:
        assert argument in text, argument
    for key in ("image_max_pixels", "template", "drop_last", "freeze", "bridge_patch", "rope_theta", "mrope_section"):
        assert key in text, key
    assert "CUDA_DEVICE_MAX_CONNECTIONS, TASK_QUEUE_ENABLE" in text


@pytest.mark.parametrize(
    ("frozen", "apply", "expected"),
    [
        (["vision", "projector"], "", ["language"]),
        (["vision"], "", ["language", "projector"]),
        ([], "", ["language", "vision", "projector"]),
        (["language"], "", ["vision", "projector"]),
        (["vision", "projector"], "--lora-apply-modules image_encoder text_decoder", ["language"]),
        (["projector"], "--lora-apply-modules image_encoder", ["vision"]),
    ],
)
@pytest.mark.parametrize("dpo", [False, True])
def test_what_is_frozen_has_no_adapter(tmp_path, frozen, apply, expected, dpo):
    """MindSpeed-MM adapts the modules that are not frozen; --lora-apply-modules is `all` in its own scripts."""
    files = runs.write(tmp_path, SMALL, lora=True, dpo=dpo)
    for part, key in FREEZE.items():
        edit(files[1], key, part in frozen)
    change(files[2], "--lora-r 8", f"--lora-r 8 {apply}")
    made = import_run(*files)
    recipe = recipe_of(made)
    assert recipe.model.freeze == tuple(frozen)
    assert sorted(recipe.lora.targets) == sorted(expected)
    modules = plan_adapters(recipe, published_config("Qwen2.5-VL-7B")).adapters.sizes
    assert {part_of(module) for module in modules} == set(expected)
    assert notes(made, "used")["freeze"].startswith(f"model.freeze: {', '.join(frozen) or 'nothing'}")


def part_of(module: str) -> str:
    return "language" if module.startswith("model.") else "projector" if ".merger." in module else "vision"


def test_an_adapter_of_frozen_modules_alone_is_refused(tmp_path):
    files = runs.write(tmp_path, SMALL, lora=True)
    change(files[2], "--lora-r 8", "--lora-r 8 --lora-apply-modules image_encoder")
    with pytest.raises(ConfigError, match=r"model\.json freezes vision_encoder, vision_projector, so no module has an"):
        import_run(*files)


def test_an_imported_run_trains(be, tmp_path, capsys):
    tiny_run.write_recipe(tmp_path)
    (tmp_path / "run.yaml").write_text(import_run(*runs.write(tmp_path, SMALL, lora=True)).text)
    result = train(
        tmp_path / "run.yaml",
        [
            f"model.path={tmp_path / 'model'}", "model.dtype=float32", f"data.train={tmp_path / 'data.jsonl'}",
            "data.image_root=null", "data.workers=0", "train.steps=2", "train.global_batch=4",
            f"train.output_dir={tmp_path / 'out'}", "parallel.pp=1", "parallel.dp=1", "parallel.vision_layers=null",
            "parallel.language_layers=null", "log.tensorboard=false", "log.plot=false",
        ],
        backend=be,
    )  # fmt: skip
    assert result.step == 2 and result.loss is not None and 4 < result.loss < 7
    assert (result.run_dir / "export" / "adapter_config.json").is_file()
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens_per_sample"] for row in rows] == [row["tokens"] / 4 for row in rows]  # as --log-tps says
    assert re.search(
        rf"^{rows[-1]['total_tokens']:.0f} tokens in .* s of steps: .* tokens/s$", capsys.readouterr().out, re.M
    )


# -- what changes its meaning, what does not fit together ------------------------------------------------------------


def test_meanings_that_change_are_told(tmp_path):
    changed = notes(import_run(*runs.write(tmp_path, SMALL)), "changed")
    assert changed["--clip-grad"] == "optim.clip: null - 0 is no clipping there"
    assert "data.too_long: truncate" in changed["--seq-length"]
    assert "train.loss: sample, which is the same with one sample in each" in changed["loss"]
    assert "weights come from model.path" in changed["--load"]
    assert "data.min_pixels: 3136" in changed["image_min_pixels"]


def test_a_model_json_with_other_numbers_is_told(tmp_path):
    """The guides' model_3b.json gives the vision tower a width of 1280 to project to."""
    files = runs.write(tmp_path, runs.GUIDES["qwen2_5_vl_3b"])
    edit(files[1], "image_encoder.vision_encoder.llm_hidden_size", 1280)
    edit(files[1], "text_decoder.seq_length", 2048)
    change(files[2], "--vocab-size 151936", "--vocab-size 152064")
    edit(files[0], "dataset_param.preprocess_parameters.model_name_or_path", "ckpt/Qwen2-VL-2B-Instruct")
    told = notes(import_run(*files), "contradiction")
    assert told["image_encoder.vision_encoder.llm_hidden_size"] == (
        "1280, the published model has 2048; its config.json decides"
    )
    assert told["--seq-length"] == "1024, but text_decoder.seq_length is 2048; the script's is taken"
    assert told["--vocab-size"] == "152064, but text_decoder.vocab_size is 151936; config.json decides"
    assert "looks like Qwen2-VL-2B, model.json is of Qwen2.5-VL-3B" in told["model_name_or_path"]


def test_stages_of_the_script_and_of_the_model_must_agree(tmp_path):
    files = runs.write(tmp_path, SMALL)
    with pytest.raises(ConfigError) as caught:
        import_run(*files, variables={"PP": "4"})
    assert str(caught.value) == (
        "model.json: pipeline_num_layers [32, 0] is for 2 stages, the script has --pipeline-model-parallel-size 4; "
        "correct one of them, or give PP=2 here"
    )
    edit(files[1], "text_decoder.pipeline_num_layers", [12, 15])
    with pytest.raises(ConfigError, match="places 27 layers, the language model has 28"):
        import_run(*files)


def test_virtual_stages(tmp_path):
    guide = runs.GUIDES["qwen2_vl_7b"]
    language, vision = [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]], [[10, 10, 10, 2], [0] * 4, [0] * 4]
    files = runs.write(tmp_path, guide._replace(language=language, vision=vision))
    change(files[2], "--use-flash-attn", "--use-flash-attn --virtual-pipeline-model-parallel-size 3")
    made = import_run(*files)
    assert recipe_of(made).parallel.virtual == 3
    assert not notes(made, "contradiction")
    change(files[2], "parallel-size 3", "parallel-size 2")
    assert "2, but pipeline_num_layers has 3 rows" in str(notes(import_run(*files), "contradiction"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("ulysses_cp_algo", ("ulysses", None)),
        ("megatron_cp_algo", ("ring", None)),
        ("adaptive_cp_algo", ("ring", None)),
        ("hybrid_cp_algo --ulysses-degree-in-cp 2", ("hybrid", 2)),
        ("hybrid_adaptive_cp_algo --ulysses-degree-in-cp 4", ("hybrid", 4)),
        ("hybrid_cp_algo", ("hybrid", None)),
        ("megatron_cp_algo --ulysses-degree-in-cp 2", ("ring", None)),
    ],
)
def test_context_parallelism(tmp_path, arguments, expected):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--context-parallel-algo ulysses_cp_algo", f"--context-parallel-algo {arguments}")
    made = import_run(*files, variables={"CP": "4"})
    parallel = recipe_of(made).parallel
    assert (parallel.cp, parallel.cp_algorithm, parallel.ulysses) == (4, *expected)
    changed = "--context-parallel-algo" in notes(made, "changed")
    assert changed == ("adaptive" in arguments)
    if "ulysses-degree" in arguments:
        assert "--ulysses-degree-in-cp" in notes(made, "used" if expected[1] else "not needed")


def test_a_degree_that_does_not_divide_context_parallelism(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "ulysses_cp_algo", "hybrid_cp_algo --ulysses-degree-in-cp 3")
    with pytest.raises(ConfigError, match=r"degree-in-cp 3 does not divide --context-parallel-size 4; .* 1, 2, 4$"):
        import_run(*files, variables={"CP": "4"})


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--calculate-per-token-loss", "train.loss=token"),
        ("--calculate-per-sample-loss", "train.loss=sample"),
        ("--sequence-parallel", "parallel.sequence=True"),
        ("--min-lr 1e-6", "optim.min_lr_ratio=0.1"),
        ("--lr-warmup-iters 50 --lr-warmup-fraction 0", "optim.warmup=50"),
        ("--clip-grad=1.5", "optim.clip=1.5"),
        ("--use-txt-dynamic-batching --max-seq-len 8192", "data.pack_tokens=8192"),
        ("--ai-framework mindspore", "backend.name=mindspore"),
        ("--wandb-project cats --wandb-exp-name one --moe-router-topk 2 3", "log.wandb=cats"),
        ("--optimizer-selection fused_torch_adamw", "optim.lr=1e-05"),
        ("--weight-decay-exclude-modules image_encoder", "optim.no_decay=('vision', 'projector')"),
        ("--lr-scale-modules text_decoder --lr-mult 0.5", "optim.lr_scale={'language': 0.5}"),
        (
            "--lora-target-modules linear_qkv --lora-apply-modules image_encoder",
            "lora.targets=('visual.blocks.*.attn.qkv',)",
        ),
        (
            "--lora-target-modules linear_fc2 q_proj",
            "lora.targets=('model.layers.*.mlp.down_proj', 'model.layers.*.self_attn.q_proj', "
            "'visual.blocks.*.mlp.down_proj', 'visual.merger.mlp.2')",
        ),
        ("--train-samples 1000", "train.steps=10000"),
        ("--micro-batch-size 4", "data.pack_tokens=4096"),
    ],
)  # fmt: skip
def test_arguments(tmp_path, argument, expected):
    files = runs.write(tmp_path, SMALL)
    for key in FREEZE.values():
        edit(files[1], key, False)
    change(files[2], "--distributed-timeout-minutes 20 ", f"--distributed-timeout-minutes 20 {argument} ")
    recipe = recipe_of(import_run(*files))
    path, _, value = expected.partition("=")
    section, _, field = path.partition(".")
    assert str(getattr(getattr(recipe, section), field)) == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("basic_parameters.train_on_prompt", True, "train_on_prompt=True"),
        ("basic_parameters.streaming", True, "streaming=True"),
        ("basic_parameters.val_rate", 0.1, "val_rate=0.1"),
        ("basic_parameters.max_samples", 7, "max_samples=7"),
        ("basic_parameters.max_samples", 0, "max_samples=None"),
        ("basic_parameters.dataset", "a.json, ./b/c.json", "train[0].path=a.json"),
        ("basic_parameters.dataset_dir", "./pictures", "image_root=None"),
        ("basic_parameters.cutoff_len", 512, "cutoff_len=512"),
        ("attr.formatting", "alpaca", "train[0].format=alpaca"),
        ("attr.images", "pictures", "train[0].columns={'images': 'pictures'}"),
        ("attr.assistant_tag", "bot", "train[0].tags={'assistant_tag': 'bot'}"),
        ("attr.messages", "conversations", "train[0].columns={}"),
        ("preprocess_parameters.image_min_pixels", 10000, "min_pixels=10000"),
        ("preprocess_parameters.video_max_pixels", None, "video_max_pixels=65536"),
    ],
)
def test_keys_of_the_data(tmp_path, key, value, expected):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], f"dataset_param.{key}", value)
    recipe = recipe_of(import_run(*files))
    path, _, wanted = expected.partition("=")
    found = recipe.data.train[0] if path.startswith("train[0]") else recipe.data
    assert str(getattr(found, path.rpartition(".")[2])) == wanted


@pytest.mark.parametrize(
    ("dataset", "directory", "same"),
    [("./data/a.json", "./data", True), ("data/a.json,./data/b.json", None, True), ("a.json", "./data", False),
     ("./data/a.json,/b.json", "data/.", False)],
)  # fmt: skip
def test_where_media_are_looked_for(tmp_path, dataset, directory, same):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], "dataset_param.basic_parameters.dataset", dataset)
    edit(files[0], "dataset_param.basic_parameters.dataset_dir", directory)
    told = notes(import_run(*files), "used" if same else "changed")["dataset_dir"]
    assert "media are looked for beside the data file and then in the working directory" in told
    assert ("data.image_root" in told) != same


@pytest.mark.parametrize(
    ("vision", "text", "argument", "expected"),
    [
        (None, None, "", "none"),
        (None, "full", "", "language"),
        ("full", None, "", "vision"),
        ("full", "full", "", "full"),
        (None, "selective", "", "selective"),
        (None, None, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", "full"),
        (None, "selective", "--recompute-granularity full", "full"),
        (None, None, "--recompute-activations", "selective"),
    ],
)
def test_recomputation(tmp_path, vision, text, argument, expected):
    files = runs.write(tmp_path, SMALL)
    edit(files[1], "image_encoder.vision_encoder.recompute_granularity", vision)
    edit(files[1], "text_decoder.recompute_granularity", text)
    change(files[2], "--use-flash-attn", f"--use-flash-attn {argument}")
    assert recipe_of(import_run(*files)).train.recompute == expected


def test_a_script_for_mindspore(tmp_path):
    files = runs.write(tmp_path, SMALL)
    workers = (
        "--local_worker_num $NPUS_PER_NODE --worker_num $WORLD_SIZE --log_dir=msrun_log --bind_core=True --join True"
    )
    change(files[2], "torchrun $DISTRIBUTED_ARGS", f"msrun {workers}")
    change(files[2], "--distributed-backend nccl", "--distributed-backend nccl --ai-framework mindspore")
    recipe = recipe_of(import_run(*files))
    assert recipe.backend.name == "mindspore" and recipe.parallel.dp == 4


def test_evaluation_needs_data_for_it(tmp_path):
    files = runs.write(tmp_path, SMALL)
    assert recipe_of(import_run(*files)).train.eval_every is None
    edit(files[0], "dataset_param.basic_parameters.val_dataset", "./data/val.json")
    recipe = recipe_of(import_run(*files))
    assert recipe.train.eval_every == 10000 and recipe.data.val[0].path == "./data/val.json"


@pytest.mark.parametrize(
    ("argument", "few", "expected"),
    [
        ("--eval-iters 5000", None, 5000 * 192), ("--eval-iters 2", None, 384), ("--eval-iters 2", 100, 100),
        ("--eval-iters 2", 1000, 384), ("", None, 100 * 192),
    ],
)  # fmt: skip
def test_an_evaluation_takes_no_more_batches_than_there(tmp_path, argument, few, expected):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], "dataset_param.basic_parameters.val_dataset", "./data/val.json")
    edit(files[0], "dataset_param.basic_parameters.val_max_samples", few)
    change(files[2], "--eval-iters 5000", argument or "--ckpt-format torch")
    made = import_run(*files)
    assert recipe_of(made).data.val_max_samples == expected
    assert (
        f"data.val_max_samples: {expected}, the most that an evaluation takes" in notes(made, "changed")["--eval-iters"]
    )


@pytest.mark.parametrize("key", ["val_dataset", "val_rate"])
def test_no_batches_are_no_evaluation(tmp_path, key):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], f"dataset_param.basic_parameters.{key}", "./val.json" if key == "val_dataset" else 0.1)
    change(files[2], "--eval-iters 5000", "--eval-iters 0")
    made = import_run(*files)
    recipe = recipe_of(made)
    assert not recipe.data.val and recipe.data.val_rate is None and recipe.train.eval_every is None
    assert "data.val and data.val_rate are left out" in notes(made, "changed")["--eval-iters"]


def test_what_megatron_takes_where_nothing_is_given(tmp_path):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], "dataset_param.basic_parameters.val_dataset", "./data/val.json")
    for argument in ("--seed 42", "--num-workers 8", "--log-interval 1", "--eval-interval 10000", "--clip-grad 0.0",
                     "--weight-decay 0", "--save-interval 10000"):  # fmt: skip
        change(files[2], f"    {argument} \\\n", "")
    made = import_run(*files)
    recipe = recipe_of(made)
    assert (recipe.data.seed, recipe.data.workers, recipe.log.every, recipe.train.eval_every) == (1234, 2, 100, 1000)
    assert (recipe.optim.clip, recipe.optim.weight_decay) == (1.0, 0.01)
    assert "every" not in parse_yaml(made.text, "made")["checkpoint"] and "checkpoint.every" in notes(made, "added")
    assert notes(made, "used")["--seed"] == "data.seed: 1234 (Megatron's default)"


def test_streams_have_no_bound_on_records(tmp_path):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], "dataset_param.basic_parameters.max_samples", 7)
    edit(files[0], "dataset_param.basic_parameters.streaming", True)
    made = import_run(*files)
    assert recipe_of(made).data.max_samples is None
    assert notes(made, "not needed")["max_samples"] == "is not read with streaming there either"


def test_a_vision_tower_is_frozen_where_nothing_is_said_of_it(tmp_path):
    files = runs.write(tmp_path, SMALL)
    values = json.loads(files[1].read_text())
    del values["image_encoder"]["vision_encoder"]["freeze"], values["image_encoder"]["vision_projector"]["freeze"]
    files[1].write_text(json.dumps(values))
    assert recipe_of(import_run(*files)).model.freeze == ("vision",)


# -- scripts of other releases ---------------------------------------------------------------------------------------


def test_fsdp2(tmp_path):
    """The guide of the 72B model gives its model.json, for eight stages, to one stage without tensor parallelism."""
    files = runs.write(tmp_path, runs.GUIDES["qwen2_5_vl_72b"])
    flags = "--use-torch-fsdp2 --fsdp2-config-path ./fsdp2.yaml --use-cpu-initialization --init-model-with-meta-device"
    change(files[2], "--use-flash-attn", f"--use-flash-attn --untie-embeddings-and-output-weights {flags}")
    change(files[2], "--ckpt-format torch", "--ckpt-format torch_dist")
    made = import_run(*files, variables={"PP": "1", "TP": "1"})
    recipe = recipe_of(made)
    assert recipe.parallel.mesh.size == recipe.parallel.dp == 16 and recipe.parallel.language_layers is None
    assert recipe.parallel.zero == 3 and recipe.train.recompute == "full"
    assert "parallel.zero: 3" in notes(made, "used")["--use-torch-fsdp2"]
    assert "./fsdp2.yaml is not read" in notes(made, "changed")["--fsdp2-config-path"]
    staged = import_run(*files, variables={"PP": "8", "TP": "1"})
    assert recipe_of(staged).parallel.zero == 1
    assert "parallel.pp 8" in notes(staged, "changed")["--use-torch-fsdp2"]
    assert "the script has one stage" in notes(made, "contradiction")["pipeline_num_layers"]


def test_attention_that_is_swapped_to_the_host(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--use-flash-attn", "--use-flash-attn --swap-attention --swap-modules input_norm,self_attention")
    made = import_run(*files)
    assert recipe_of(made) == recipe_of(import_run(*runs.write(tmp_path, SMALL)))
    assert "train.recompute" in notes(made, "not needed")["--swap-attention"]


def test_release_1_0(tmp_path):
    """Its data.json has the cut and sides of pictures, its model.json more names for the model's shape."""
    files = runs.write(tmp_path, runs.GUIDES["qwen2_vl_7b"])
    values = json.loads(files[0].read_text())
    pictures = values["dataset_param"]["preprocess_parameters"]
    for name in ("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"):
        del pictures[name]
    pictures |= {"image_resolution": 512, "video_resolution": 128}
    values["dataset_param"]["basic_parameters"] |= {"cutoff_len": 2048, "overwrite_cache": True}
    values["dataloader_param"] |= {"batch_size": 1, "num_workers": 4}
    files[0].write_text(json.dumps(values))
    model = json.loads(files[1].read_text())
    model |= {"ps_version": "v2", "params_dtype": "bf16"}
    model["text_decoder"] |= {"padded_vocab_size": 152064, "micro_batch_size": 1, "lr": 1e-5, "use_fused_rmsnorm": True}
    model["image_encoder"]["vision_projector"]["ckpt_path"] = "none.pt"
    files[1].write_text(json.dumps(model))
    more = "--initial-loss-scale 4096 --use-rotary-position-embeddings --enable-one-logger --num-layer-list 0,1"
    change(files[2], "--use-flash-attn", f"--use-flash-attn {more} --tokenizer-name-or-path ./Qwen2-VL-7B-Instruct")
    made = import_run(*files)
    data = recipe_of(made).data
    assert (data.cutoff_len, data.pack_tokens, data.max_pixels, data.video_max_pixels) == (2048, 2048, 512**2, 128**2)
    assert notes(made, "contradiction")["--seq-length"] == "1024, but data.json has cutoff_len 2048, which counts"
    assert "data.max_pixels: 262144" in notes(made, "changed")["image_resolution"]


@pytest.mark.parametrize(("name", "task"), [("inference", "inference"), ("evaluate", "evaluation")])
def test_files_of_inference_and_evaluation_are_answered_in_one_line(tmp_path, capsys, name, task):
    files = runs.write(tmp_path, SMALL)
    other = json.loads(files[1].read_text())
    marks = {"inference": {"pipeline_class": "Qwen2VlPipeline"}, "evaluate": {"evaluation_dataset": "chartqa_test"}}
    other |= {"generation_config": {"max_new_tokens": 256}, **marks[name]}
    path = tmp_path / f"{name}_qwen2_5_vl_7b.json"
    path.write_text(json.dumps(other))
    for given in ((files[0], path, files[2]), (path, files[1], files[2])):
        with pytest.raises(ConfigError, match=rf"{name}_qwen2_5_vl_7b\.json: describes {task}, which is not imported"):
            import_run(*given)
    assert main(["import-mindspeed", str(path)]) == 2
    assert f"{name}_qwen2_5_vl_7b.json: describes {task}, which is not imported" in capsys.readouterr().err
    change(files[2], "    pretrain_vlm.py", f"    {name}_vlm.py")
    with pytest.raises(ConfigError, match=rf"finetune\.sh: starts {task} \({name}_vlm\.py\), which is not imported"):
        import_run(*files)


def test_files_may_stand_on_both_sides_of_options_and_are_three_in_their_order(tmp_path, capsys):
    data, model, script = map(str, runs.write(tmp_path, SMALL))
    made = str(tmp_path / "run.yaml")
    assert main(["import-mindspeed", data, "-o", made, model, "MBS=2", script]) == 0
    capsys.readouterr()
    usage = "error: import-mindspeed takes data.json model.json script.sh -o RECIPE; found "
    for given in ([], [data, model, "-o", made], [data, model, script], [data, model, script, script, "-o", made]):
        assert main(["import-mindspeed", *given]) == 2
        assert capsys.readouterr().err == f"{usage}{' '.join(given) or 'nothing'}\n"
    assert main(["import-mindspeed", script, data, model, "-o", f"{made}2"]) == 2
    assert "finetune.sh: is a script, where data.json is expected; the order is" in capsys.readouterr().err


@pytest.mark.parametrize(("samples", "steps"), [(1920, 10), (1919, 9), (192, 1)])
def test_samples_are_whole_steps_as_in_megatron(tmp_path, samples, steps):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--train-iters 10000", f"--train-samples {samples}")
    assert recipe_of(import_run(*files)).train.steps == steps
    change(files[2], "--use-flash-attn", "--use-flash-attn --train-iters 7")
    made = import_run(*files)
    assert recipe_of(made).train.steps == 7
    assert notes(made, "contradiction")["--train-samples"].startswith(f"{samples}, but --train-iters is given")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--micro-batch-size 0", "script.sh: --micro-batch-size is 0, expected 1 or more"),
        ("--micro-batch-size -2", "script.sh: --micro-batch-size is -2, expected 1 or more"),
        ("--lr 0", "script.sh: --lr is 0, expected more than 0"),
        ("--lr-warmup-fraction 1.5", "script.sh: --lr-warmup-fraction is 1.5, expected a fraction of all steps"),
        ("--lr-warmup-fraction -0.1", "script.sh: --lr-warmup-fraction is -0.1, expected a fraction of all steps"),
        ("--fp16", "script.sh: --bf16 and --fp16 are both given; remove one of them"),
        (
            "--ai-framework tensorflow",
            "script.sh: --ai-framework tensorflow: there are pytorch and mindspore; --allow-",
        ),
    ],
)
def test_values_without_a_meaning_are_refused_under_their_own_name(tmp_path, argument, expected):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--use-flash-attn", f"--use-flash-attn {argument}")
    with pytest.raises(ConfigError) as caught:
        import_run(*files)
    assert str(caught.value).startswith(expected)


def test_a_warmup_of_all_steps_is_not_one_of_a_single_step(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--lr-warmup-fraction 0.1", "--lr-warmup-fraction 1.0")
    assert recipe_of(import_run(*files)).optim.warmup == 10000


def test_null_is_no_default_of_freeze(tmp_path):
    """There `freeze: null` trains the vision tower, whose default is to be frozen."""
    files = runs.write(tmp_path, SMALL)
    edit(files[1], "image_encoder.vision_encoder.freeze", None)
    with pytest.raises(ConfigError, match=r"vision_encoder\.freeze is null, expected true or false; leave it out for"):
        import_run(*files)


def test_arguments_of_lora_without_its_modules_are_told(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--use-flash-attn", "--use-flash-attn --lora-r 8 --lora-alpha 16")
    made = import_run(*files)
    assert recipe_of(made).lora is None
    said = notes(made, "contradiction")["--lora-r, --lora-alpha"]
    assert said == "given, but --lora-target-modules is not: no adapters, and all that is not frozen is trained"


def test_a_false_key_that_is_not_known_is_shown_where_a_known_one_may_be_meant(tmp_path):
    files = runs.write(tmp_path, SMALL)
    model = json.loads(files[1].read_text())
    model["image_encoder"] |= {"freeze": False, "quite_other": False}
    files[1].write_text(json.dumps(model))
    made = import_run(*files)
    meant = "is not known; did you mean 'image_encoder.vision_encoder.freeze'?"
    assert notes(made, "contradiction") == {"image_encoder.freeze": meant}
    assert "image_encoder.quite_other" in notes(made, "not needed")


def test_a_zero_is_reported_too(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[0], '"max_samples": null', '"max_samples": 0')
    made = import_run(*files)
    assert recipe_of(made).data.max_samples is None
    key = "dataset_param.basic_parameters.max_samples"
    assert notes(made, "not needed")[key] == "is 0, empty or off, nothing is asked for"


# -- conditions of the script ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ['[ "$WIDE" = 1 ] && TP=2', "if [ -d /wide ]; then TP=2; fi", "source wide.sh"])
def test_what_a_condition_decides_is_asked_for(tmp_path, line):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "MBS=1", f"{line}\nMBS=1")
    with pytest.raises(ConfigError, match=r"TP (depends on a condition|may be changed by).*; give it here: TP=\.\.\."):
        import_run(*files)
    given = {name: value for name, value in BEFORE_MBS.items() if line.startswith("source") or name == "TP"}
    assert recipe_of(import_run(*files, variables={**given, "TP": "2"})).parallel.tp == 2


BEFORE_MBS = {
    "NPUS_PER_NODE": "8", "NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
    "WORLD_SIZE": "8", "PP": "2", "CP": "1", "LOAD_PATH": "ckpt", "SAVE_PATH": "save_dir",
}  # fmt: skip


def test_a_condition_that_the_script_decides_is_followed(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "MBS=1", 'WIDE=1\n[ "$WIDE" = 1 ] && TP=2 || TP=4\nMBS=${MBS:-1}')
    made = import_run(*files)
    assert recipe_of(made).parallel.tp == 2
    assert notes(made, "assumed") == {"MBS": "1, which the script takes where it is not set"}


def test_a_script_that_trains_twice_is_refused(tmp_path):
    files = runs.write(tmp_path, SMALL)
    text = files[2].read_text()
    start = text[text.index("torchrun $DIST") : text.index("chmod 440")]
    files[2].write_text(text.replace(start, f'if [ "$STAGE" = 2 ]; then\n{start}else\n{start}fi\n'))
    with pytest.raises(ConfigError, match=r"starts a program 2 times \(line \d+, \d+\), and a recipe is one run"):
        import_run(*files)
    recipe_of(import_run(*files, variables={"STAGE": "2"}))
    files[2].write_text(text.replace(start, f"python prepare.py --out x\n{start}"))
    recipe_of(import_run(*files))


def test_how_many_processes_are_started(tmp_path):
    files = runs.write(tmp_path, runs.GUIDES["qwen2_5_vl_3b"])
    change(files[2], "torchrun $DISTRIBUTED_ARGS", "mpirun -n 8 python")
    change(files[2], "WORLD_SIZE", "COUNT")
    with pytest.raises(ConfigError, match="how many processes 'mpirun -n 8 python' starts is not read; start the"):
        import_run(*files)
    change(files[2], "mpirun -n 8 python", "python3")
    assert recipe_of(import_run(*files)).parallel.mesh.size == 1
    change(files[2], "python3", "python -m torch.distributed.run --nproc-per-node=4 --nnodes 2")
    assert recipe_of(import_run(*files)).parallel.dp == 8
    change(files[2], "--nproc-per-node=4", "--nproc-per-node=auto")
    with pytest.raises(ConfigError, match="--nproc_per_node: 'auto' is no number of processes; write it into a copy"):
        import_run(*files)


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--lr-warmup-fracton 0.1", "--lr-warmup-fracton is not known; did you mean '--lr-warmup-fraction'?"),
        ("--use-ema", "--use-ema: there is no moving average of the weights"),
        ("--rampup-batch-size 8 8 100", "--rampup-batch-size: every step has train.global_batch samples"),
        ("--lora-mixed-training", "--lora-mixed-training: with `lora` only adapters are trained"),
        ("--optimizer muon", "--optimizer muon: duetvl has AdamW (adam) alone"),
        ("--lr fast", "--lr is 'fast', expected a number"),
        ("--train-iters 10.5", "--train-iters is 10.5, expected a whole number"),
        ("--bf16 yes", "'yes' belongs to no option"),
        ("--bf16 \\ # faster", "belongs to no option after --bf16; # begins no comment within quotes"),
        ("--bf16 \\ ", "belongs to no option after --bf16; a backslash continues a line only where it is the last"),
        ("--lr 1 2", "'2' belongs to no option after --lr"),
        ("--zzz 1", "script.sh: --zzz is not known; --allow-unknown ignores it"),
        (
            "--lr-decay-style step",
            "--lr-decay-style step: there are cosine, linear, constant, inverse-square-root, WSD",
        ),
        ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters, 1 or more, found None"),
        ("--lora-target-modules linear_qvk", "--lora-target-modules linear_qvk; did you mean 'linear_qkv'?"),
        ("--lora-apply-modules vision --lora-target-modules linear_qkv", "--lora-apply-modules vision; did you mean"),
        ("--context-parallel-algo ulyses_cp_algo", "did you mean 'ulysses_cp_algo'?"),
        (
            "$EXTRA_ARGS",
            "EXTRA_ARGS is not set in the script, so what it adds is not known after",
        ),
        ("--save $(pwd)/out", "--save: the output of pwd is not known; write it into a copy of the script"),
        (
            "--tensor-model-parallel-size 3",
            "8 processes cannot be divided into tp 3 x pp 2 x cp 1 = 6; give NPUS_PER_NODE=6 here",
        ),
    ],
)
def test_arguments_that_cannot_be_taken(tmp_path, argument, expected):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--distributed-timeout-minutes 20 ", f"--distributed-timeout-minutes 20 {argument} ")
    with pytest.raises(ConfigError) as caught:
        import_run(*files)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "key", "value", "expected"),
    [
        (0, "dataset_param.basic_parameters.trian_on_prompt", True, "basic_parameters.train_on_prompt'?"),
        (0, "dataset_param.attr.formatting", "xml", "formatting is 'xml', expected sharegpt or alpaca"),
        (0, "dataset_param.basic_parameters.dataset", None, "basic_parameters.dataset is missing"),
        (0, "dataset_param.basic_parameters.mask_history", "no", "mask_history is 'no', expected true or false"),
        (1, "model_id", "internvl", "model_id is 'internvl'"),
        (1, "text_decoder.pipeline_num_layers", "12,16", "pipeline_num_layers (language_layers) is '12,16'"),
        (1, "video_encoder", {"model_id": "x"}, "video_encoder.model_id: no such part in these models; give null"),
        (1, "text_decoder.new_key", 1, "text_decoder.new_key is not known; --allow-unknown ignores it"),
        (1, "text_decoder.num_layer", 1, "num_layer is not known; did you mean 'text_decoder.num_layers'?"),
        (0, "dataset_param.max_samples", 1, "did you mean 'dataset_param.basic_parameters.max_samples'?"),
        (0, "dataset_param.attr.mask_history", True, "did you mean 'dataset_param.basic_parameters.mask_history'?"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be_taken(tmp_path, number, key, value, expected):
    files = runs.write(tmp_path, SMALL)
    edit(files[number], key, value)
    with pytest.raises(ConfigError) as caught:
        import_run(*files)
    assert expected in str(caught.value)


def test_one_can_go_on_without_what_is_not_known(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--use-flash-attn", "--use-flash-attn --brand-new 3 $EXTRA")
    edit(files[1], "text_decoder.new_key", 1)
    made = import_run(*files, allow_unknown=True)
    assert set(notes(made, "unknown")) >= {"--brand-new", "text_decoder.new_key"}
    assert recipe_of(made).train.steps == 10000


@pytest.mark.parametrize(
    ("argument", "key", "expected"),
    [
        ("--optimizer muon --muon-momentum 0.9", "--optimizer muon", ("optim", "lr", 1e-5)),
        ("--lr-decay-style step", "--lr-decay-style step", ("optim", "schedule", "linear")),
        ("--lora-mixed-training", "--lora-mixed-training", ("model", "dtype", "bfloat16")),
        ("--context-parallel-algo my_algo", "--context-parallel-algo my_algo", ("parallel", "cp_algorithm", "ulysses")),
        ("--weight-decay-exclude-modules x text_decoder", "--weight-decay-exclude-modules x",
         ("optim", "no_decay", ("language",))),
        ("--lora-target-modules linear_qkv router", "--lora-target-modules router",
         ("lora", "targets", tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv"))),
        ("--lora-apply-modules vit text_decoder --lora-target-modules linear_proj", "--lora-apply-modules vit",
         ("lora", "targets", ("model.layers.*.self_attn.o_proj",))),
    ],
)  # fmt: skip
def test_one_can_go_on_without_a_setting_that_is_not_there(tmp_path, argument, key, expected):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--use-flash-attn", f"--use-flash-attn {argument}")
    with pytest.raises(ConfigError, match="--allow-unknown ignores it"):
        import_run(*files)
    made = import_run(*files, allow_unknown=True)
    assert list(notes(made, "unknown")) == [key]
    section, field, value = expected
    assert getattr(getattr(recipe_of(made), section), field) == value


@pytest.mark.parametrize(
    ("arguments", "fields", "said"),
    [
        ("inverse-square-root", {"schedule": "inverse_sqrt", "min_lr_ratio": 0.0}, {"--min-lr"}),
        ("WSD --lr-wsd-decay-iters 100", {"schedule": "wsd", "decay": 100}, {"--lr-wsd-decay-style"}),
        ("WSD --lr-wsd-decay-iters 100 --lr-wsd-decay-style cosine", {"schedule": "wsd", "decay": 100}, set()),
    ],
)
def test_schedules_by_their_names_here(tmp_path, arguments, fields, said):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "--lr-decay-style cosine", f"--lr-decay-style {arguments} --min-lr 1e-7")
    made = import_run(*files)
    optim = recipe_of(made).optim
    assert {name: getattr(optim, name) for name in fields} == fields
    assert notes(made, "changed").keys() & {"--min-lr", "--lr-wsd-decay-style"} == said


def test_what_only_running_would_tell_is_asked_for(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "NNODES=1", "NNODES=$(wc -l < hosts)")
    with pytest.raises(
        ConfigError, match=r"--global-batch-size: NNODES is the output of a command \(line 8\); give it here: NNODES="
    ):
        import_run(*files)
    recipe = recipe_of(import_run(*files, variables={"NNODES": "2"}))
    assert recipe.parallel.dp == 8 and recipe.train.global_batch == 384


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_a_recipe_once(tmp_path, capsys, monkeypatch):
    files = [str(file) for file in runs.write(tmp_path, SMALL, lora=True)]
    target = tmp_path / "made.yaml"
    assert main(["import-mindspeed", *files, "-o", str(target), "NPUS_PER_NODE=4"]) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"{target}: sft with lora, pp 2 x dp 2 x cp 1 x tp 1 on 4 devices, 96 samples a step\n")
    assert load_recipe(target).lora is not None
    before = target.read_text()
    assert main(["import-mindspeed", *files, "-o", str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert target.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "finetune.sh", "made.yaml", "model.json"]


def test_a_variable_that_the_script_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match="has no variable 'NODES'; did you mean 'NNODES'"):
        import_run(*runs.write(tmp_path, SMALL), variables={"NODES": "2"})


def test_nothing_is_written_where_something_is_wrong(tmp_path, capsys):
    files = [str(file) for file in runs.write(tmp_path, SMALL)]
    assert main(["import-mindspeed", *files[:2], str(tmp_path / "none.sh"), "-o", str(tmp_path / "made.yaml")]) == 2
    assert main(["import-mindspeed", files[2], *files[1:], "-o", str(tmp_path / "made.yaml")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].endswith("none.sh: no such file") and "is a script, where" in errors[1]
    assert not (tmp_path / "made.yaml").exists()


def test_files_that_are_none(tmp_path):
    files = runs.write(tmp_path, SMALL)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.sh").write_bytes(b"# " + b"x" * (9 << 20))
    expected = {"pipe": "is not a file", ".": "is not a file", "large.sh": "is larger than 8 MiB", "no": "no such file"}
    for name, reason in expected.items():
        path = tmp_path / name
        for at in range(3):
            with pytest.raises(ConfigError, match=rf"{path.name}: {reason}"):
                import_run(*[path if place == at else file for place, file in enumerate(files)])


def test_a_key_that_is_given_twice(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[1], '"num_layers": 32', '"freeze": false, "num_layers": 32')
    with pytest.raises(
        ConfigError,
        match=r"model\.json: cannot be read as JSON: the key 'freeze' is given twice in one object; keep one of them",
    ):
        import_run(*files)


@pytest.mark.parametrize(
    "value", ["x" * 100_000, "a\nb", ["x"] * 50_000, {"k" * 100_000: 1}], ids=["long", "lines", "list", "key"]
)
@pytest.mark.parametrize("key", ["basic_parameters.mask_history", "attr.formatting", "basic_parameters.new"])
def test_what_is_told_of_a_value_is_one_short_line(tmp_path, key, value):
    files = runs.write(tmp_path, SMALL)
    edit(files[0], f"dataset_param.{key}", value)
    with pytest.raises(ConfigError) as caught:
        import_run(*files)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    lines = list(import_run(*files, allow_unknown=True).report.lines()) if key.endswith("new") else []
    assert all(len(line) < 1000 and "\n" not in line for line in lines)


def test_an_import_is_checked_on_one_machine(tmp_path, capsys):
    tiny_run.write_recipe(tmp_path)
    files = [str(file) for file in runs.write(tmp_path, runs.GUIDES["qwen2_5_vl_3b"])]
    made = str(tmp_path / "made.yaml")
    assert main(["import-mindspeed", *files, "-o", made]) == 0
    place = [f"model.path={tmp_path / 'model'}", f"data.train={tmp_path / 'data.jsonl'}"]
    capsys.readouterr()
    assert main(["check", made, *place, f"train.output_dir={tmp_path / 'out'}", "train.steps=2"]) == 0
    told = capsys.readouterr().out
    assert "layout: pp 1 x dp 8 x cp 1 x tp 1 needs 8 processes\n" in told


def test_a_script_is_never_run(tmp_path):
    files = runs.write(tmp_path, SMALL)
    change(files[2], "mkdir -p logs", f"touch {tmp_path}/run; X=$(touch {tmp_path}/run2); eval 'touch {tmp_path}/run3'")
    import_run(*files)
    assert not list(tmp_path.glob("run*"))


def test_windows_line_ends(tmp_path):
    files = runs.write(tmp_path, SMALL)
    files[2].write_bytes(files[2].read_bytes().replace(b"\n", b"\r\n"))
    assert recipe_of(import_run(*files)).train.global_batch == 192


def test_comments_in_another_encoding_are_no_matter_and_values_are(tmp_path):
    files = runs.write(tmp_path, SMALL)
    plain = files[2].read_bytes()
    files[2].write_bytes("# 根据实际情况修改\n".encode("gbk") + plain)
    assert recipe_of(import_run(*files)).train.global_batch == 192
    files[2].write_bytes(plain.replace(b"save_dir", "保存".encode("gbk")))
    with pytest.raises(ConfigError, match=r"train\.output_dir: found .*, which is not text in UTF-8"):
        import_run(*files)
    files[2].write_bytes(plain.decode().encode("utf-16"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(it may be UTF-16\); save it as UTF-8"):
        import_run(*files)


def test_the_table_of_keys_is_current():
    document = ROOT / "docs" / "migrating_keys.md"
    assert document.read_text(encoding="utf-8") == key_tables(), (
        "write it again: python -c 'from duetvl.migrate.key_tables import key_tables as t; "
        'open("docs/migrating_keys.md", "w").write(t())\''
    )


def test_a_key_is_in_one_table_alone():
    for table in TABLES:
        names = list(table.known())
        assert len(names) == len(set(names)), table.title
        assert table.switches | table.lists <= set(names)
