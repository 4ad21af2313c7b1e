"""How much memory and disk a recipe needs on a rank: its settings in the counts of `models/qwen_vl/memory.py`.

benchmarks/results/memory_estimate.md compares with measured runs.
"""

from __future__ import annotations

import math
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from duetvl.core.stages import even_range
from duetvl.data.draft import Draft
from duetvl.models.lora import Adapters, is_adapter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import BYTES, Held, Load, Trained, activations
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.models.qwen_vl.sharding import Unit, block_of
from duetvl.parallel.context import shares_of
from duetvl.parallel.division import Division, owned_range
from duetvl.parallel.schedule import tapes_in_flight
from duetvl.parallel.zero import BUCKET
from duetvl.training.checkpoints.space import exported_dtype
from duetvl.training.recipe.placement import exchanging, stages_of
from duetvl.training.recipe.sections import Recipe

# What a process takes of a CPU's memory beside its tensors, measured: benchmarks/results/memory_estimate.md.
IMPORTED: Final = 250 * 2**20  # the interpreter, duetvl and the framework, before there is a model
RUNNING: Final = 80 * 2**20  # more of their code, read in as it is used, and what libraries work in
KEPT: Final = 0.75  # of what a pass makes, again: see `Memory.kept`
MAPPED: Final = 32 * 2**20  # glibc gives larger blocks back when they are freed
GIVES_BACK: Final = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The peak is less than the sum of all: activations go while gradients come.

    `activations` are kept from the forward pass for the backward pass; `passing` is the most that is made on top of
    what is kept: blocks of logits, the gradients of one block. `kept` is beside the tensors: on a CPU, what glibc's
    malloc holds of freed memory, as a hole that a tensor leaves is a little too small for an aligned one of its size.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    passing: int
    peak: int
    offload: bool = False  # the optimizer's part is in the host's memory
    kept: int = 0

    @property
    def process(self) -> int:
        """Bytes of a whole process on a CPU at the peak."""
        return self.peak + IMPORTED + RUNNING + (0 if gives_back() else self.kept)

    def describe_process(self) -> str:
        """One line on a process on a CPU."""
        program = f"{(IMPORTED + RUNNING) / 2**30:.2f} for the program and its libraries"
        if gives_back():
            kept = f"and no freed memory kept by malloc, because of {GIVES_BACK}"
        else:
            kept = f"and {self.kept / 2**30:.2f} of freed memory kept by glibc's malloc"
            kept += f" ({GIVES_BACK}=262144 in the environment returns it, at the cost of processor time)"
        return f"memory: about {self.process / 2**30:.2f} GiB for a process on a CPU: these tensors, {program}, {kept}"

    @property
    def on_device(self) -> int:
        """The peak without what is in the host's memory, where the device has its own."""
        return self.peak - (self.optimizer if self.offload else 0)

    def describe(self) -> str:
        """One line."""
        parts = ("weights", "gradients", "optimizer", "activations", "passing")
        unit, size, form = ("GiB", 2**30, ".2f") if self.peak >= 2**27 else ("MiB", 2**20, ".1f")
        listed = ", ".join(f"{name} {getattr(self, name) / size:{form}}" for name in parts)
        return f"memory: tensors of about {self.peak / size:{form}} {unit} at the peak per rank ({listed})"

    def warning(self, there: int, device: str) -> str | None:
        """What to say where that is beyond the bytes of memory of a device; None where it is not."""
        cpu = device.startswith("cpu")
        there = min(there, *memory_limits()) if cpu else there
        peak = self.process if cpu else self.on_device
        if peak <= there:
            return None
        return (
            f"warning: {'' if cpu else 'tensors of '}about {peak / 2**30:.2f} GiB are expected at the peak, {device} "
            f"has {there / 2**30:.2f} GiB of memory; lower data.pack_tokens, set train.recompute or optim.offload, or "
            f"train with lora"
        )


def gives_back() -> bool:
    """Whether the environment makes glibc's malloc give back what is freed, however small the tensors."""
    threshold = os.environ.get(GIVES_BACK, "")
    return threshold.isdecimal() and int(threshold) <= 2**20


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limits() -> Iterator[int]:
    """The limits that a container or `ulimit -v` sets to this process, and the machine's memory."""
    yield host_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            yield int(Path(file).read_text())
        except (OSError, ValueError):  # there is none, or it says "max"
            continue


def memory_of(recipe: Recipe, config: ModelConfig, adapters: Adapters | None, drafts: Iterable[Any]) -> Memory | None:
    """The estimate for a recipe from some of its samples; None where none of them can be used."""
    load = load_of(recipe, drafts)
    return None if load is None else estimate(config, recipe, *load, adapters)


def load_of(recipe: Recipe, drafts: Iterable[Any]) -> tuple[Load, int] | None:
    """See `largest_load`, from drafts of some samples; None where none of them can be used."""
    drafts = [draft for draft in drafts if isinstance(draft, Draft)]
    if not drafts:
        return None
    load, count = largest_load(recipe, [(d.tokens, d.trained_tokens, d.patches) for d in drafts])
    return replace(load, frame=max(d.largest_frame for d in drafts)), count


def largest_load(recipe: Recipe, sizes: Sequence[tuple[int, int, int]]) -> tuple[Load, int]:
    """The largest micro-batch of a step, and how many a rank has of them, of samples of these sizes.

    Sizes are tokens, trained tokens and patches. A full pack where a step has that many tokens, in the proportions of
    all samples; or the longest sample.
    """
    data, group = recipe.data, recipe.train.global_batch
    longest = max(sizes)
    tokens, trained, patches = (sum(numbers) for numbers in zip(*sizes, strict=True))
    in_step = tokens / len(sizes) * group
    full = min(data.pack_tokens, math.ceil(in_step)) if data.pack else 0
    if full <= longest[0]:
        number = group if not data.pack else math.ceil(in_step / longest[0])
        return Load(*longest), math.ceil(number / recipe.parallel.mesh.dp)
    share, number = full / tokens, math.ceil(in_step / full)
    return Load(full, math.ceil(share * trained), math.ceil(share * patches)), math.ceil(
        number / recipe.parallel.mesh.dp
    )


def estimate(
    config: ModelConfig,
    recipe: Recipe,
    load: Load,
    micro_batches: int = 1,
    adapters: Adapters | None = None,
    division: Division | None = None,
) -> Memory:
    """Memory of a training step on one rank, of micro-batches of this load; by default on the one that has most.

    A DPO run that holds a reference model has its weights beside its own. A rank of a pipeline has its stages' layers,
    and tapes of as many micro-batches as the schedule allows.
    """
    if division is None:
        of_stages = (division_of(recipe, config, rank) for rank in stage_ranks(recipe))
        found = (estimate(config, recipe, load, micro_batches, adapters, one) for one in of_stages)
        return max(found, key=lambda memory: memory.peak)
    every = _trained(config, recipe, adapters)
    whole = every.only(division.holds)
    trained = whole.cut(lambda path, shape: division.part(path, shape).shape)
    weights = trained.stored(trained.shapes)
    if recipe.dpo is not None and recipe.dpo.cache is None and (adapters is None or recipe.dpo.reference is not None):
        weights += trained.stored(filter(division.holds, parameter_shapes(config)))
    owned, copied = _owned(whole, division)
    weights += owned.stored(copied)
    gradients, state = trained.gradients(), owned.optimizer_state(recipe.optim.state_dtype)
    cp = division.mesh.cp
    own = replace(load, tokens=math.ceil(load.tokens / cp), trained=math.ceil(load.trained / cp))
    work = activations(config, every, own, recipe.train.recompute, held_sizes(config, division))
    kept = math.ceil(work.kept * _tapes(division, micro_batches))
    before = gradients if micro_batches > 1 else 0
    bucket, gathered, summed = _bucket(whole, division), *largest_block(whole, division)
    if division.zero == 3:  # buckets go after the passes
        backward = max(work.backward + gathered, summed)
        most = max(before + kept + max(work.forward, backward), gradients + max(bucket, work.end))
    else:
        backward = work.backward + bucket
        most = max(before + kept + max(work.forward, backward), gradients + work.end)
    passing = max(work.forward, backward, work.end)
    row = trained.narrow * own.tokens * config.text.hidden_size  # most tensors of a pass are of this size
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=kept,
        passing=passing,
        peak=weights + state + most,
        offload=recipe.optim.offload,
        kept=round(KEPT * (kept + passing)) if row < MAPPED else 0,
    )


def stage_ranks(recipe: Recipe) -> range:
    """The first rank at each place of the pipeline."""
    mesh = recipe.parallel.mesh
    return range(0, mesh.size, mesh.size // mesh.pp)


def _tapes(division: Division, micro_batches: int) -> float:
    """How many micro-batches' tapes of all of its stages a rank has at once."""
    virtual = division.virtual
    if division.mesh.pp == 1 and virtual == 1:
        return 1.0
    most = tapes_in_flight(division.place("pp"), division.mesh.pp, virtual)
    return min(most, micro_batches * virtual) / virtual


def division_of(recipe: Recipe, config: ModelConfig, rank: int = 0) -> Division:
    """How a rank sees a recipe's model divided.

    Raises ConfigError for degrees that the model cannot have, and for stages that its layers do not fit.
    """
    parallel = recipe.parallel
    return Division.of(
        config,
        parallel.mesh,
        rank,
        sequence=parallel.sequence,
        vision=parallel.vision,
        stages=stages_of(parallel, config),
        ulysses=exchanging(parallel, config),
        zero=parallel.zero,
    )


def held_sizes(config: ModelConfig, division: Division) -> Held:
    """What a rank has of the sizes inside a model's blocks."""
    tp, place, heads, whole = division.mesh.tp, division.place("tp"), division.heads, Held.all_of(config)
    ulysses, cp = division.ulysses, division.mesh.cp
    share = shares_of(division)[division.place("cp") % ulysses]  # on the rows of all ranks that exchange heads
    kv_heads = share.kv_heads if ulysses == cp else len(share.keys)  # a ring keeps no copies

    def held(unit: Unit, size: int) -> int:
        units = heads.held(unit, place, tp)
        return len(even_range(size, place, tp) if units is None else units[0])

    language = (
        ulysses * len(share.queries),
        ulysses * kv_heads,
        held("number", whole.inner),
        held("number", whole.vocabulary),
    )
    rows = 1 / tp if division.sequence else 1.0
    layers = (_layers(division, "vision"), _layers(division, "language"))
    if division.vision == "divide":
        return Held(*language, whole.vision_heads, whole.vision_inner, rows, 1 / (tp * cp), *layers)
    vision = held("vision_head", heads.vision), held("number", whole.vision_inner)
    return Held(*language, *vision, rows, 1 / cp, *layers)


def _layers(division: Division, tower: Literal["vision", "language"]) -> frozenset[int] | None:
    if division.stages.count == 1:
        return None
    return frozenset(layer for stage in division.own_stages for layer in division.stages.of(tower, stage))


def _owned(trained: Trained, division: Division) -> tuple[Trained, list[str]]:
    """The rows of trained parameters that a rank updates, and the paths of those that it has a copy of for that."""
    shapes, copied = dict(trained.shapes), []
    order = [path for path in trained.shapes if path in trained.paths]
    for path in order:
        sharing = division.sharing(path, trained.shapes[path])
        team = division.team(sharing.axes)
        unit = sharing.unit.shape
        if len(team) > 1 and unit:
            rows = owned_range(unit[0], len(team), path, team.index(division.rank))
            shapes[path] = (len(rows), *unit[1:])
            copied.append(path)
        else:
            shapes[path] = unit
    return replace(trained, shapes=shapes), copied


def _bucket(trained: Trained, division: Division) -> int:
    """Bytes of the largest bucket of gradients that travels together (parallel/zero.py)."""
    numbers: Counter[tuple[str, ...]] = Counter()
    largest = 0  # a parameter of more numbers than a bucket travels alone
    for path in trained.paths:
        sharing = division.sharing(path, trained.shapes[path])
        if len(division.team(sharing.axes)) > 1:
            unit = math.prod(sharing.unit.shape)
            numbers[sharing.axes] += unit
            largest = max(largest, unit)
    return 4 * max(largest, min(BUCKET, max(numbers.values(), default=0)))


def largest_block(trained: Trained, division: Division) -> tuple[int, int]:
    """Bytes of the weights of the largest block that is gathered, and of its gradients while they are summed: as the
    backward pass leaves them, and in float32 by rank (parallel/gathering.py)."""
    gathered: Counter[str] = Counter()
    summed: Counter[str] = Counter()
    for path, shape in trained.shapes.items():
        if division.is_sharded(path, shape):
            block, numbers = str(block_of(path)), math.prod(division.used(path, shape).shape)
            gathered[block] += trained.narrow * numbers
            unit = math.prod(division.sharing_used(path, shape).unit.shape)
            half = trained.narrow if trained.narrow < 4 else 0
            summed[block] += (trained.narrow * numbers + (4 + half) * unit) * (path in trained.paths)
    return max(gathered.values(), default=0), max(summed.values(), default=0)


def disk_of(config: ModelConfig, recipe: Recipe, adapters: Adapters | None = None) -> tuple[int, int, int]:
    """Bytes of a checkpoint, those of the weights in it (of a LoRA run the adapters'), and those of the whole model as
    it is exported."""
    trained, shapes = _trained(config, recipe, adapters), parameter_shapes(config)
    model = trained.stored(shapes)
    written = exported_dtype(config.dtype)
    whole = model if written is None else BYTES[written] * sum(map(math.prod, shapes.values()))
    weights = model if adapters is None else trained.stored(filter(is_adapter, trained.shapes))
    beside = 0 if recipe.checkpoint.save_only_model else trained.optimizer_state(recipe.optim.state_dtype)
    return weights + beside, weights, whole


def _trained(config: ModelConfig, recipe: Recipe, adapters: Adapters | None) -> Trained:
    return Trained.of(config, recipe.model.dtype, recipe.model.freeze, adapters)
