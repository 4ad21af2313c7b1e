"""The estimate of memory against the tensors of a tiny run: their sizes, and what torch's allocator kept."""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import oracle
import pytest

import duetvl
from duetvl.models.lora import Adapters, Size
from duetvl.models.qwen_vl.adapters import add_adapters, layers
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.memory import Load
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import block_of, shard_of
from duetvl.parallel.inventory import own_entries
from duetvl.storage.checkpoint_format import Meta
from duetvl.training.checkpoints.checkpoint import take_snapshot
from duetvl.training.checkpoints.space import Space
from duetvl.training.dtype import with_dtype
from duetvl.training.lora import kept, plan_adapters
from duetvl.training.memory import (
    GIVES_BACK,
    IMPORTED,
    KEPT,
    MAPPED,
    RUNNING,
    Memory,
    disk_of,
    division_of,
    estimate,
    host_memory,
    largest_load,
)
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.reading import make_recipe
from duetvl.training.step import Trainer

SAMPLE = oracle.sample(400, oracle.Image((1, 32, 24)), 100, seed=6)


def recipe_of(**sections):
    recipe = make_recipe({"model": {"path": "m", "freeze": []}, "data": {"train": "d"}} | sections)
    return with_dtype(recipe, on_cpu=True)


def load_of(batch) -> Load:
    return Load(batch.tokens, batch.trained_tokens, len(batch.pixel_rows))


def kept_bytes(model, batch) -> int:
    """What torch has allocated during a forward pass and not freed when it ends; weight gradients are made in it."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        tape = model.forward_loss(batch)
    del tape
    return sum(event.self_cpu_memory_usage for event in trace.key_averages())


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2.5-tied"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"path": "m", "dtype": "bfloat16"}},
        {"model": {"path": "m", "dtype": "bfloat16", "freeze": []}},
        {"train": {"recompute": "full"}},
        {"train": {"recompute": "selective"}},
        {"model": {"path": "m", "freeze": ["vision"]}},
        {"model": {"path": "m", "freeze": ["visual", "embed_tokens", "model.layers.0"]}},
        {"model": {"path": "m", "freeze": ["language"]}},
    ],
    ids=str,
)
def test_parts_are_the_sizes_of_tensors(tiny, name, sections):
    pytest.importorskip("torch")
    be, recipe = duetvl.load_backend("torch", "cpu"), recipe_of(**sections)
    model = duetvl.load_model(tiny.directory(name), backend=be, dtype=recipe.model.dtype)
    model.freeze(recipe.model.freeze)
    model.recompute = recipe.train.recompute
    trainer = Trainer(model, TokenLoss(be.ops), be, recipe.optim)
    batch = model.pack([SAMPLE])
    found = estimate(model.config, recipe, load_of(batch))

    def size(tensors):
        return sum(x.nbytes for x in tensors)

    assert found.weights == size(p.tensor for p in model.parameters.values())
    assert found.optimizer == size(x for slot in trainer.state.slots().values() for x in slot.values())
    assert found.gradients == 4 * sum(math.prod(p.shape) for p in trainer.trained)
    head = model.parameters["model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"]
    text = model.config.text
    made = 4 * batch.trained_tokens * text.hidden_size + (4 * math.prod(head.shape) if head.trainable else 0)
    pixels = 4 * batch.pixel_rows.size  # the host's own
    kept = kept_bytes(model, batch) - made + pixels
    assert found.activations == pytest.approx(kept, rel=0.06)


@pytest.mark.parametrize("targets", [("language",), ("language", "vision", "projector"), ("q_proj",)])
def test_adapters_keep_less(tiny, targets):
    pytest.importorskip("torch")
    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=duetvl.load_backend("torch", "cpu"))
    adapters = Adapters(dict.fromkeys(layers(model.config).choose(targets), Size(2, 4.0)))
    add_adapters(model, adapters, 0)
    batch, recipe = model.pack([SAMPLE]), recipe_of(lora={})
    found = estimate(model.config, recipe, load_of(batch), adapters=adapters)
    assert found.gradients == 4 * sum(math.prod(p.shape) for p in model.parameters.values() if p.trainable)
    assert found.weights == sum(p.tensor.nbytes for p in model.parameters.values())
    kept = (
        kept_bytes(model, batch) - 4 * batch.trained_tokens * model.config.text.hidden_size + 4 * batch.pixel_rows.size
    )
    assert found.activations == pytest.approx(kept, rel=0.1)
    assert found.activations <= estimate(model.config, recipe_of(), load_of(batch)).activations


def test_options_that_save_memory_save_it(tiny):
    config = load_config(tiny.directory("qwen2.5-tied"))
    load = Load(4096, 2048, 4096)
    base = estimate(config, recipe_of(), load, 4)
    for sections in (
        {"train": {"recompute": "full"}},
        {"train": {"recompute": "selective"}},
        {"optim": {"state_dtype": "bfloat16"}},
        {"model": {"path": "m", "freeze": ["vision"]}},
        {"model": {"path": "m", "freeze": ["language"]}},
    ):
        assert estimate(config, recipe_of(**sections), load, 4).peak < base.peak, sections
    assert estimate(config, recipe_of(dpo={}), load, 4).weights == 2 * base.weights
    assert estimate(config, recipe_of(dpo={"cache": "c"}), load, 4).weights == base.weights
    assert base.peak <= sum(
        getattr(base, part) for part in ("weights", "gradients", "optimizer", "activations", "passing")
    )


@pytest.mark.parametrize("model", ["qwen2.5-tied", "qwen2-untied"])
def test_stages_hold_their_layers(tiny, model):
    """All ranks together: the moments once; of one micro-batch the activations once, beside the rotary tables."""
    config, load = load_config(tiny.directory(model)), Load(400, 200, 96)
    recipe = recipe_of(parallel={"pp": 2})
    whole = estimate(config, recipe_of(), load)
    ranks = [estimate(config, recipe, load, division=division_of(recipe, config, rank)) for rank in range(2)]
    assert sum(rank.optimizer for rank in ranks) == whole.optimizer
    tables = 4 * load.tokens * config.text.head_dim
    assert sum(rank.activations for rank in ranks) == whole.activations + tables
    embedding = 4 * math.prod(parameter_shapes(config)["model.embed_tokens.weight"])
    twice = 2 if config.tie_word_embeddings else 0  # on both ends, and each the half that it updates
    assert sum(rank.weights for rank in ranks) == whole.weights + twice * embedding
    several = [estimate(config, recipe, load, 4, division=division_of(recipe, config, rank)) for rank in range(2)]
    assert several[0].activations == 2 * ranks[0].activations and several[1].activations == ranks[1].activations
    assert estimate(config, recipe, load, 4) == max(several, key=lambda memory: memory.peak)


def test_ranks_of_a_sequence_hold_their_rows(tiny):
    """A quarter; of heads that are exchanged for rows, the keys and values that several ranks need are there more
    often."""
    config, load = load_config(tiny.directory("qwen2.5-tied")), Load(400, 200, 96)
    whole = estimate(config, recipe_of(), load)
    ring = recipe_of(parallel={"cp": 4, "cp_algorithm": "ring"})
    divided, with_picture = (estimate(config, ring, Load(400, 200, 96, frame)) for frame in (0, 96))
    assert with_picture.activations > divided.activations, "one rank has the whole picture"
    exchanged = estimate(config, recipe_of(parallel={"cp": 4, "cp_algorithm": "ulysses"}), load)
    assert divided.activations == pytest.approx(whole.activations / 4, rel=0.01)
    assert divided.gradients == whole.gradients
    assert divided.optimizer == pytest.approx(whole.optimizer / 4, rel=0.05)
    text = config.text
    assert (text.num_heads, text.num_kv_heads) == (4, 2), "each of four ranks needs one of two"
    row = 2 * 4 * text.head_dim * text.num_layers
    assert exchanged.activations - divided.activations == (4 * 1 - 2) * row * load.tokens // 4


@pytest.mark.parametrize("sequence", [False, True])
def test_ranks_hold_their_parts(tiny, sequence):
    """All ranks together: the weights once for each that holds them, the moments once in all."""
    config, load = load_config(tiny.directory("qwen2.5-tied")), Load(400, 200, 96)
    layout = {"dp": 2, "tp": 2, "sequence": sequence}
    recipe = recipe_of(parallel=layout)
    whole = estimate(config, recipe_of(), load)
    ranks = [estimate(config, recipe, load, division=division_of(recipe, config, rank)) for rank in range(4)]
    assert sum(rank.optimizer for rank in ranks) == whole.optimizer
    numbers = {path: math.prod(shape) for path, shape in parameter_shapes(config).items()}
    everywhere = sum(n for path, n in numbers.items() if path.startswith("visual.") or shard_of(path).axis is None)
    divided = sum(numbers.values()) - everywhere
    owned = sum(numbers.values()) * 4  # rows of their own, which ranks that share a parameter update
    assert sum(rank.gradients for rank in ranks) == 4 * (2 * divided + 4 * everywhere)
    assert sum(rank.weights for rank in ranks) == 4 * (2 * divided + 4 * everywhere) + owned
    assert all(rank.activations < whole.activations for rank in ranks)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_ranks_that_gather_blocks_hold_their_rows(tiny, lora):
    """All ranks together: weights and gradients of blocks once, of the rest as in every replica; moments once."""
    config, load = load_config(tiny.directory("qwen2.5-tied")), Load(400, 200, 96)
    sections = {"train": {"recompute": "full"}, **({"lora": lora} if lora else {})}
    adapters = (plan := plan_adapters(recipe_of(**sections), config)) and plan.adapters
    whole = estimate(config, recipe_of(**sections), load, 1, adapters)
    recipe = recipe_of(parallel={"dp": 3, "zero": 3}, **sections)
    ranks = [estimate(config, recipe, load, 1, adapters, division_of(recipe, config, rank)) for rank in range(3)]
    assert sum(rank.optimizer for rank in ranks) == whole.optimizer
    shapes = parameter_shapes(config)
    outside = 4 * sum(math.prod(shape) for path, shape in shapes.items() if block_of(path) is None)
    blocks = 4 * sum(map(math.prod, shapes.values())) - outside
    trained = whole.gradients if lora else outside  # is whole on every rank, with the rows that each updates
    assert sum(rank.weights for rank in ranks) == blocks + 3 * outside + (4 if lora else 1) * trained
    assert sum(rank.gradients for rank in ranks) == 3 * trained + (0 if lora else blocks)
    assert all(rank.peak < whole.peak for rank in ranks)


def test_a_sequence_divided_keeps_less(tiny):
    config, load = load_config(tiny.directory("qwen2.5-tied")), Load(4096, 200)
    kept = [estimate(config, recipe_of(parallel={"tp": 2, "sequence": on}), load).activations for on in (False, True)]
    assert kept[1] < kept[0]


def test_packs_of_a_recipe():
    sizes = [(100, 40, 0), (300, 60, 80)]
    assert largest_load(recipe_of(data={"train": "d", "pack_tokens": 1000}), sizes) == (Load(1000, 250, 200), 2)
    assert largest_load(recipe_of(data={"train": "d", "pack_tokens": 9000}), sizes) == (Load(1600, 400, 320), 1)
    assert largest_load(recipe_of(data={"train": "d", "pack": False}), sizes) == (Load(300, 60, 80), 8)
    assert largest_load(recipe_of(data={"train": "d", "pack_tokens": 200, "cutoff_len": 500}), sizes) == (
        Load(300, 60, 80),
        6,
    )


def test_small_models_are_told_in_small_units():
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "passing"), 3 * 2**20)
    assert "about 12.0 MiB at the peak per rank (weights 3.0, " in Memory(**parts, peak=12 * 2**20).describe()
    assert "about 2.00 GiB at the peak per rank (weights 0.00, " in Memory(**parts, peak=2**31).describe()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, ("language", "vision")])
def test_a_checkpoint_takes_what_is_told_before_it(tiny, dtype, targets):
    pytest.importorskip("torch")
    be = duetvl.load_backend("torch", "cpu")
    model = duetvl.load_model(tiny.directory("qwen2-untied"), backend=be, dtype=dtype)
    adapters = Adapters(dict.fromkeys(layers(model.config).choose(targets), Size(2, 4.0))) if targets else None
    sections = {"model": {"path": "m", "dtype": dtype, "freeze": [] if targets else ["vision"]}}
    recipe = recipe_of(**sections, checkpoint={"export": True}, **({"lora": {}} if targets else {}))
    plain = 4 * sum(math.prod(p.shape) for p in model.parameters.values())
    if adapters:
        add_adapters(model, adapters, 0)
    model.freeze(recipe.model.freeze)
    trainer = Trainer(model, TokenLoss(be.ops), be, recipe.optim)
    stored = [p for path, p in model.parameters.items() if kept(model)(path)]
    taken = take_snapshot(step=1, parameters=stored, optimizer_state=trainer.state, meta=Meta(), backend=be, copy=False)
    checkpoint, weights, whole = disk_of(model.config, recipe, adapters)
    assert checkpoint == sum(piece.spec.nbytes for piece in taken.pieces)
    assert weights == sum(p.tensor.nbytes for p in stored)
    assert whole == plain  # in the dtype of config.json, which an export has
    found = Space.of(own_entries(stored, be), trainer.everything, trainer.state.dtype, recipe, model.config.dtype)
    assert found == Space.with_export(checkpoint, weights, whole, recipe)


def test_what_is_beyond_the_memory_is_said():
    parts = dict.fromkeys(("weights", "gradients", "activations", "passing"), 0)
    memory = Memory(**parts, optimizer=3 * 2**40, peak=4 * 2**40, offload=True)
    assert memory.warning(2**50, "cuda:0") is None
    assert memory.warning(2**40, "cuda:0") is None  # three quarters of it are in the host's memory
    told = memory.warning(1023 * 2**30, "cuda:0")
    assert "about 1024.00 GiB are expected at the peak, cuda:0 has 1023.00 GiB" in told
    told = memory.warning(2**50, "cpu")  # no machine of today has 4 TiB for a test
    assert "warning: about 4096.32 GiB are expected at the peak, cpu has " in told


def test_a_process_on_a_cpu_takes_more_than_its_tensors(tiny, monkeypatch):
    monkeypatch.delenv(GIVES_BACK, raising=False)
    config, mib = load_config(tiny.directory("qwen2.5-tied")), 2**20
    memory = estimate(config, recipe_of(), Load(200, 100, 96))
    assert memory.kept == round(KEPT * (memory.activations + memory.passing)) > 0
    assert memory.process == memory.peak + memory.kept + IMPORTED + RUNNING
    long = estimate(config, recipe_of(), Load(MAPPED // (4 * config.text.hidden_size), 100))
    assert long.kept == 0, "large blocks go back to the system when they are freed"
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "passing"), 0)
    shown = Memory(**parts, peak=1024 * mib, kept=512 * mib)
    assert "about 1.82 GiB for a process on a CPU: these tensors, 0.32 for the program" in shown.describe_process()
    assert "and 0.50 of freed memory kept by glibc's malloc" in shown.describe_process()
    monkeypatch.setenv(GIVES_BACK, "262144")
    assert (
        shown.process == 1024 * mib + IMPORTED + RUNNING
        and "no freed memory kept by malloc" in shown.describe_process()
    )
    monkeypatch.setenv(GIVES_BACK, str(2**25))
    assert shown.process == (1024 + 512) * mib + IMPORTED + RUNNING


def test_a_limit_of_the_process_counts_as_its_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    memory = Memory(**dict.fromkeys(("weights", "gradients", "optimizer", "activations", "passing"), 0), peak=2**30)
    assert host_memory() < 2**30 or memory.warning(host_memory(), "cpu") is None
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29));"
    script += "from duetvl.training.memory import memory_limits; print(min(memory_limits()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2**29
    assert resource.getrlimit(resource.RLIMIT_AS) == before
