"""Layouts of a number of devices, those that fit in order of their seconds a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from duetvl.core.errors import ConfigError
from duetvl.core.mesh import AXES
from duetvl.cost_model.devices import DeviceType
from duetvl.cost_model.step_time import CostModel, StepTime
from duetvl.models.lora import Adapters
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.memory import Load, Trained
from duetvl.models.recompute import RecomputeMode
from duetvl.parallel.division import Division
from duetvl.planning.placing import placed
from duetvl.training.expected import SampleSize, cost_model
from duetvl.training.lora import plan_adapters
from duetvl.training.memory import Memory, division_of, estimate, largest_load, stage_ranks
from duetvl.training.recipe.parallel_section import ParallelSection
from duetvl.training.recipe.sections import Recipe

_VIRTUAL: Final = (1, 2, 3, 4)  # stages on a rank that are tried, of the pipelines that are best with one
_VARIED: Final = 8  # of these pipelines, with smaller micro-batches too
_LEAST_TOKENS: Final = 1024  # of a micro-batch, and of one on a rank of `cp`: smaller products are slower
_MODES: Final[tuple[RecomputeMode, ...]] = ("none", "selective", "full")  # the fastest first, the smallest last


@dataclass(frozen=True, eq=False)
class Wish:
    """What a plan is made for. Fields of `base.parallel` that were given stay, `train.recompute` too."""

    base: Recipe
    config: ModelConfig
    devices: int
    device: DeviceType
    memory: int  # bytes of a device that tensors may take
    sizes: Sequence[SampleSize]

    @property
    def modes(self) -> tuple[RecomputeMode, ...]:
        """Of recomputation, those that may be chosen."""
        train = self.base.train
        return (train.recompute,) if "recompute" in train.model_fields_set else _MODES


@dataclass(frozen=True)
class Candidate:
    """A layout, and how many tokens a micro-batch has at most."""

    section: ParallelSection
    pack: int


@dataclass(frozen=True)
class Proposal:
    """A layout with what it takes."""

    recipe: Recipe
    memory: Memory
    step: StepTime
    remark: str = ""

    def fits(self, memory: int) -> bool:
        """Whether its tensors fit in this many bytes of a device."""
        return self.memory.on_device <= memory


@dataclass
class Search:
    """All layouts of a wish that the model can have."""

    wish: Wish
    _models: dict[tuple[int, int, RecomputeMode], CostModel] = field(default_factory=dict)

    @cached_property
    def adapters(self) -> Adapters | None:
        """Those of the recipe."""
        plan = plan_adapters(self.wish.base, self.wish.config)
        return plan.adapters if plan else None

    @cached_property
    def trained(self) -> Trained:
        """The parameters of the whole model."""
        base = self.wish.base
        return Trained.of(self.wish.config, base.model.dtype, base.model.freeze, self.adapters)

    def best(self, count: int) -> list[Proposal]:
        """The fastest that fit, at most `count` of them."""
        pack = self.wish.base.data.pack_tokens
        plain = sorted(self._timed(Candidate(section, pack) for section in self.sections()), key=lambda one: one[0])
        staged = [candidate.section for _, candidate in plain if candidate.section.pp > 1][:_VARIED]
        varied = self._timed(candidate for section in staged for candidate in self._variants(section))
        proposals: list[Proposal] = []
        for least, candidate in sorted([*plain, *varied], key=lambda one: one[0]):
            if len(proposals) >= count and least > proposals[count - 1].step.seconds:
                break
            proposal = self.proposal(candidate)
            if proposal is not None:
                proposals = sorted([*proposals, proposal], key=lambda one: (one.step.seconds, one.memory.peak))
        return proposals[:count]

    def smallest(self) -> Proposal:
        """The one whose tensors take least on the rank that has most."""
        mode = self.wish.modes[-1]
        pack = self.packs[-1]
        layouts = [self.recipe(Candidate(section, pack), mode) for section in self.sections()]
        least = min(layouts, key=lambda recipe: self.memory(recipe).on_device)
        return Proposal(least, self.memory(least), self.seconds(least))

    def proposal(self, candidate: Candidate) -> Proposal | None:
        """A layout with as little recomputation as fits; with the most of it where none does, layers moved to where
        there is room. None where it cannot fit."""
        if self._hopeless(candidate.section):
            return None
        modes = self.wish.modes if candidate.section.zero == 1 else self.wish.modes[-1:]
        for mode in modes:
            recipe = self.recipe(candidate, mode)
            memory = self.memory(recipe)
            if memory.on_device <= self.wish.memory:
                return Proposal(recipe, memory, self.seconds(recipe))
        recipe = self._relieved(recipe)
        memory = self.memory(recipe)
        return Proposal(recipe, memory, self.seconds(recipe)) if memory.on_device <= self.wish.memory else None

    def recipe(self, candidate: Candidate, mode: RecomputeMode) -> Recipe:
        """The base with a layout, its layers placed for this recomputation where they were not given."""
        base, section = self.wish.base, candidate.section
        if section.pp > 1 and not section.language_layers:
            section = self._staged(section, mode, 1)
        train = base.train.model_copy(update={"recompute": mode})
        data = base.data.model_copy(update={"pack_tokens": candidate.pack})
        return base.model_copy(update={"parallel": section, "train": train, "data": data})

    def seconds(self, recipe: Recipe) -> StepTime:
        """What a step takes."""
        return self._model(recipe).step(division_of(recipe, self.wish.config))

    def memory(self, recipe: Recipe) -> Memory:
        """Of the rank with most, by the estimate of `duetvl check`."""
        load, count = self._load(recipe)
        estimates = [
            estimate(self.wish.config, recipe, load, count, self.adapters, division)
            for division in self._different(recipe)
        ]
        return max(estimates, key=lambda memory: memory.peak)

    # -- layouts ------------------------------------------------------------------------------------------------------

    def sections(self) -> Iterator[ParallelSection]:
        """All divisions of the devices, without the layers of stages."""
        wish, pinned = self.wish, self.pinned
        for pp, dp, cp, tp in self._degrees():
            degrees = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
            if any(pinned.get(axis, degree) != degree for axis, degree in degrees.items()):
                continue
            heads = wish.config.text.num_heads // tp
            more = {"sequence": tp > 1, "cp_algorithm": "ulysses" if cp <= max(1, heads) else "hybrid"}
            for zero in (1, 3) if pp == 1 and dp * cp > 1 and "full" in wish.modes else (1,):
                if pinned.get("zero", zero) == zero:
                    yield ParallelSection(**{**more, "zero": zero, **pinned, **degrees})

    def _degrees(self) -> Iterator[tuple[int, int, int, int]]:
        """(pp, dp, cp, tp) whose product is the number of devices, as far as the model and the data can use them."""
        wish, pinned = self.wish, self.pinned
        text, packs = wish.config.text, self.step_packs
        most_tp = pinned.get("tp", min(text.num_heads, wish.device.node))
        most_cp = pinned.get("cp", max(1, wish.base.data.pack_tokens // _LEAST_TOKENS))
        for tp in _divisors(wish.devices, most_tp):
            for cp in _divisors(wish.devices // tp, most_cp):
                for pp in _divisors(wish.devices // tp // cp, text.num_layers):
                    dp = wish.devices // tp // cp // pp
                    if dp <= packs or pinned.get("dp") == dp:
                        yield pp, dp, cp, tp

    @cached_property
    def pinned(self) -> dict[str, Any]:
        """The fields of `parallel` that hold for all layouts."""
        parallel = self.wish.base.parallel
        fields = {name: getattr(parallel, name) for name in parallel.model_fields_set}
        return {name: value for name, value in fields.items() if value != "auto"}

    @cached_property
    def step_packs(self) -> int:
        """Micro-batches that a step has in all."""
        alone = self.wish.base.model_copy(update={"parallel": ParallelSection()})
        return self._load(alone)[1]

    @cached_property
    def packs(self) -> list[int]:
        """Most tokens of micro-batches: what was asked for, and halves of it that have room for each sample."""
        packs, longest = [self.wish.base.data.pack_tokens], max(one.tokens for one in self.wish.sizes)
        while packs[-1] // 2 >= max(longest, _LEAST_TOKENS):
            packs.append(packs[-1] // 2)
        return packs

    def _variants(self, section: ParallelSection) -> Iterator[Candidate]:
        """A pipeline with virtual stages and smaller micro-batches, of which a step has more: both wait less."""
        layers = self.wish.config.text.num_layers
        for virtual in (1,) if "language_layers" in self.pinned else _VIRTUAL:
            if section.pp * virtual <= layers:
                staged = section if virtual == 1 else self._staged(section, self.wish.modes[0], virtual)
                for pack in self.packs[virtual == 1 :]:
                    yield Candidate(staged, pack)

    def _staged(self, section: ParallelSection, mode: RecomputeMode, virtual: int) -> ParallelSection:
        """With layers on stages that take equally long."""
        wish = self.wish
        train = wish.base.train.model_copy(update={"recompute": mode})
        flat = section.model_copy(update={"pp": 1, "vision_layers": None, "language_layers": None})
        recipe = wish.base.model_copy(update={"parallel": flat, "train": train})
        division, passes = division_of(recipe, wish.config), self._model(recipe).passes
        tower, decoder = ([one.total for one in part] for part in (passes.tower(division), passes.decoder(division)))
        vision, language = placed(tower, decoder, section.pp, virtual)
        return section.model_copy(update={"vision_layers": vision, "language_layers": language})

    def _relieved(self, recipe: Recipe) -> Recipe:
        """With decoder layers moved, one by one, from the rank with most memory to the one with least."""
        parallel, ranks = recipe.parallel, stage_ranks(recipe)
        if parallel.pp == 1 or parallel.virtual > 1 or self.wish.base.parallel.language_layers:
            return recipe
        peaks = [self._peak(recipe, rank) for rank in ranks]
        while max(peaks) > self.wish.memory >= sum(peaks) / len(peaks):
            most, least = peaks.index(max(peaks)), peaks.index(min(peaks))
            moved = _moved(recipe, most, least)
            if moved is None:
                break
            changed = {place: self._peak(moved, ranks[place]) for place in (most, least)}
            if max(changed.values()) >= max(peaks):
                break
            recipe, peaks = moved, [changed.get(place, peak) for place, peak in enumerate(peaks)]
        return recipe

    def _peak(self, recipe: Recipe, rank: int) -> int:
        load, count = self._load(recipe)
        division = division_of(recipe, self.wish.config, rank)
        return estimate(self.wish.config, recipe, load, count, self.adapters, division).on_device

    def _hopeless(self, section: ParallelSection) -> bool:
        """Whether weights, gradients and the optimizer's state alone are too much, evenly divided."""
        mesh, optim = section.mesh, self.wish.base.optim
        state = 0 if optim.offload else self.trained.optimizer_state(optim.state_dtype) / mesh.dp / mesh.cp
        held: float = self.trained.stored(self.trained.shapes) + self.trained.gradients()
        if section.zero == 3:
            held = held / mesh.dp / mesh.cp
        return (held + state) / mesh.pp / mesh.tp > self.wish.memory

    # -- what they take -----------------------------------------------------------------------------------------------

    def _timed(self, candidates: Iterator[Candidate]) -> list[tuple[float, Candidate]]:
        """Each with the seconds that it takes at the least: with no more recomputation than it must have."""
        bounds = []
        for candidate in candidates:
            mode = self.wish.modes[0] if candidate.section.zero == 1 else self.wish.modes[-1]
            recipe = self.recipe(candidate, mode)
            least = self._model(recipe).at_least(division_of(recipe, self.wish.config))
            bounds.append((least, candidate))
        return bounds

    def _model(self, recipe: Recipe) -> CostModel:
        key = recipe.parallel.mesh.dp, recipe.data.pack_tokens, recipe.train.recompute
        if key not in self._models:
            wish = self.wish
            self._models[key] = cost_model(recipe, wish.config, self.adapters, wish.sizes, wish.device, self.trained)
        return self._models[key]

    def _load(self, recipe: Recipe) -> tuple[Load, int]:
        sizes = self.wish.sizes
        load, count = largest_load(recipe, [(one.tokens, one.trained, one.patches) for one in sizes])
        return replace(load, frame=max(one.frame for one in sizes)), count

    def _different(self, recipe: Recipe) -> list[Division]:
        """The ranks of a pipeline that differ in what they hold: of those alike the first has most in flight."""
        different: dict[tuple[object, ...], Division] = {}
        for rank in stage_ranks(recipe):
            division = division_of(recipe, self.wish.config, rank)
            stages, last = division.stages, division.stages.count - 1
            kind = (
                (stages.vision[stage], stages.language[stage], stage == 0, stage == last)
                for stage in division.own_stages
            )
            different.setdefault(tuple(kind), division)
        return list(different.values())


def _moved(recipe: Recipe, source: int, target: int) -> Recipe | None:
    """With a decoder layer of one stage on another; None where that cannot be."""
    parallel = recipe.parallel
    assert parallel.language_layers is not None, "stages were placed"
    counts = list(parallel.language_layers[0])
    last_vision = max((n for n, layers in enumerate((parallel.vision_layers or ((),))[0]) if layers), default=0)
    if source == target or counts[source] <= (source == len(counts) - 1) or target < last_vision:
        return None
    counts[source] = counts[source] - 1
    counts[target] = counts[target] + 1
    return recipe.model_copy(update={"parallel": parallel.model_copy(update={"language_layers": (tuple(counts),)})})


def degrees(section: ParallelSection) -> str:
    """`pp 2 x dp 1 x cp 1 x tp 8`"""
    return " x ".join(f"{axis} {getattr(section, axis)}" for axis in AXES)


def _divisors(number: int, most: int) -> list[int]:
    return [one for one in range(1, min(number, most) + 1) if number % one == 0]


def check_wish(wish: Wish) -> None:
    """Raise ConfigError where no layout can be: for degrees that were given and do not fit devices or model."""
    parallel = wish.base.parallel
    degrees = [getattr(parallel, axis) for axis in AXES if axis in parallel.model_fields_set]
    product = math.prod(int(degree) for degree in degrees if degree != "auto")
    if wish.devices % product:
        raise ConfigError(
            f"--devices {wish.devices}: the degrees that are set take {product} devices, which does not divide it; "
            f"give a multiple of {product}, or other degrees"
        )
    division_of(wish.base, wish.config)
