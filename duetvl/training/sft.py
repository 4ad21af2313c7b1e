"""Supervised fine-tuning and DPO: which model is trained, to which end, and how a record becomes a sample of it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import Any

from duetvl.convert.opening import open_merged
from duetvl.core.backend import Backend
from duetvl.core.device import Device
from duetvl.core.errors import ConfigError
from duetvl.core.ranks import Ranks
from duetvl.cost_model.devices import device_of
from duetvl.data.encode import EncodeSettings, Processor, RecordEncoder
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.pairs import AnswerEncoder, PairEncoder
from duetvl.models.lora import Adapters
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.flops import inference_flops, training_flops
from duetvl.models.qwen_vl.loading import load_model
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.parallel.division import Division
from duetvl.parallel.inventory import Inventory, inventory
from duetvl.parallel.pipeline import placed
from duetvl.training.checkpoints.export import export_checkpoint
from duetvl.training.checkpoints.run_directory import wanted_kind
from duetvl.training.dtype import on_device
from duetvl.training.expected import expected_step, sizes_of
from duetvl.training.feed import FIRST, DataSets
from duetvl.training.job import Job
from duetvl.training.lora import AdapterPlan, adapt, base_of, kept, plan_adapters
from duetvl.training.media_bounds import media_settings
from duetvl.training.memory import division_of, memory_of
from duetvl.training.objective import Objective, TokenLoss
from duetvl.training.preference.dpo import PreferenceObjective
from duetvl.training.preference.reference import CachedReference, make_reference, reference_identity, reference_model
from duetvl.training.recipe.sections import Recipe
from duetvl.training.watching.costs import Flops


def prepare(asked: Recipe, backend: Backend) -> Job:
    """Load what the recipe names: first whatever may fail on one rank alone, then what ranks ask each other for."""
    ranks = Ranks(backend.collectives)
    recipe = ranks.together(lambda: on_device(asked, backend.device))
    source, encoder, plan, model = ranks.together(lambda: _loaded(recipe, backend))
    division = division_of(recipe, source.config, backend.collectives.rank)
    placed(model, division, backend)
    adapt(model, recipe, plan)
    model.recompute = recipe.train.recompute
    reference = None if recipe.dpo is None else make_reference(recipe, model, backend, division)
    adapters = plan.adapters if plan else None
    return Job(
        model,
        _objective(recipe, backend),
        encoder,
        partial(export_checkpoint, kind=wanted_kind(recipe), source=source, overwrite=True),
        model.config.to_dict(),
        keeps=kept(model),
        base=base_of(model),
        reference=reference_identity(recipe),
        flops=_flops(recipe, model, inventory(model.parameters.values(), backend, division), division),
        before=reference.prepare if isinstance(reference, CachedReference) else None,
        compared_with=reference,
        memory=partial(memory_of, recipe, model.config, adapters),
        seconds=partial(_seconds, recipe, model.config, adapters, backend.device),
        division=division,
    )


def _loaded(recipe: Recipe, backend: Backend) -> tuple[ModelDirectory, AnswerEncoder, AdapterPlan | None, QwenVL]:
    """The model on disk and as this rank holds it, what makes samples for it, and the adapters that it will get."""
    dtype = recipe.model.dtype
    if not backend.device.supports(dtype):
        raise ConfigError(f"model.dtype {dtype}: the device {backend.device.name} does not support it; use float32")
    if recipe.train.recompute != "none" and not backend.capabilities.recomputation:
        framework = backend.capabilities.framework
        raise ConfigError(f"train.recompute {recipe.train.recompute}: {framework} cannot recompute; set it to none")
    source = open_merged(recipe.model.path, base=recipe.model.base)
    encoder = record_encoder(recipe, recipe_processor(recipe, source))
    plan = plan_adapters(recipe, source.config)
    division = division_of(recipe, source.config, backend.collectives.rank)
    model: QwenVL = load_model(source, backend=backend, dtype=dtype, division=division)
    return source, encoder, plan, model


def _objective(recipe: Recipe, backend: Backend) -> Objective:
    """What is minimised."""
    if recipe.dpo is None:
        return TokenLoss(backend.ops, recipe.train.loss)
    return PreferenceObjective(recipe.dpo, backend)


def _seconds(
    recipe: Recipe, config: ModelConfig, adapters: Adapters | None, device: Device, drafts: Iterable[Any]
) -> float | None:
    """How long a step is expected to take on this device; None for a kind that is not in the table."""
    kind, sizes = device_of(device.product), sizes_of(drafts)
    if not sizes or (kind is None and device.name != "cpu") or (kind and recipe.model.dtype not in kind.peaks):
        return None
    return expected_step(recipe, config, adapters, sizes, kind).seconds


def _flops(recipe: Recipe, model: QwenVL, everything: Inventory, division: Division) -> Flops:
    """What a micro-batch asks for of each of the ranks that run it together: of the model, and of a reference that runs
    beside it."""
    together = division.mesh.size // division.mesh.dp
    policy = partial(training_flops, model.config, everything)
    if recipe.dpo is None or recipe.dpo.cache is not None:
        return lambda batch: policy(batch) / together
    reference = reference_model(recipe).config
    return lambda batch: (policy(batch) + inference_flops(reference, batch)) / together


def record_encoder(recipe: Recipe, processor: Processor | None = None) -> AnswerEncoder:
    """From records to samples, or to pairs with `dpo`, as the recipe says; `processor` where it is there already."""
    data = recipe.data
    settings = EncodeSettings(data.train_on_prompt, data.mask_history, data.longest, data.too_long, data.system)
    encoder = RecordEncoder(processor or recipe_processor(recipe), settings)
    return AnswerEncoder(encoder) if recipe.dpo is None else PairEncoder(encoder, digests=recipe.dpo.cache is not None)


def first_drafts(recipe: Recipe, source: ModelDirectory) -> list[Any]:
    """What a start drafts of the first records of `data.train`: drafts, and why there is none of a record."""
    sets = DataSets(recipe.data)
    maker = SampleMaker(sets.files, record_encoder(recipe, recipe_processor(recipe, source)))
    return list(maker.drafts(list(islice(sets.train_refs(), FIRST))))


def recipe_processor(recipe: Recipe, source: ModelDirectory | None = None) -> Processor:
    """The processor of the recipe's model with what the recipe says of pictures and videos."""
    source = source or open_merged(recipe.model.path, base=recipe.model.base, weights=False)
    processor = Processor.from_directory(source.path, source.family)
    processor.media = media_settings(processor.media, recipe.data)
    return processor
