"""The recipe's section `lora`: which adapters a run trains, what its checkpoints keep, what it exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from duetvl.models.lora import Adapters, Size, is_adapter
from duetvl.models.peft_files import StoredAdapter
from duetvl.models.qwen_vl.adapters import (
    add_adapters,
    layers,
    linear_shapes,
    load_adapter,
    open_adapter_for,
)
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.models.qwen_vl.names import canonical_name
from duetvl.models.qwen_vl.parameters import count_parameters
from duetvl.training.recipe.sections import Recipe


@dataclass(frozen=True)
class AdapterPlan:
    """The adapters of a run: new ones, or those of a directory."""

    adapters: Adapters
    start: StoredAdapter | None = None

    def describe(self, config: ModelConfig) -> str:
        """One line about them."""
        numbers = count_parameters(self.adapters.shapes(linear_shapes(config)))
        kind = "DoRA" if self.adapters.dora else "LoRA"
        origin = f" from {self.start.directory}" if self.start else ""
        count = len(self.adapters.sizes)
        return f"lora: {kind} of {count} linear layers{origin}, {numbers / 1e6:.2f} million parameters are trained"


def plan_adapters(recipe: Recipe, config: ModelConfig) -> AdapterPlan | None:
    """What the section asks for, checked against the model's layers; None without the section.

    ConfigError for a target that names nothing, CheckpointError for an adapter of another model.
    """
    lora = recipe.lora
    if lora is None:
        return None
    if lora.adapter is not None:
        stored = open_adapter_for(config, lora.adapter)
        return AdapterPlan(replace(stored.adapters, dropout=lora.dropout), stored)
    targets = [canonical_name(target, tied=False) or target for target in lora.targets]
    modules = layers(config).choose(targets, recipe.model.freeze)
    sizes = dict.fromkeys(modules, Size(lora.rank, lora.alpha))
    return AdapterPlan(Adapters(sizes, lora.dropout, lora.rslora, lora.dora))


def adapt(model: QwenVL, recipe: Recipe, plan: AdapterPlan | None) -> None:
    """Put the adapters on a model and say what is trained: they alone, or without them all but the frozen parts."""
    if plan is not None and plan.start is not None:
        load_adapter(model, replace(plan.start, adapters=plan.adapters))
    elif plan is not None:
        add_adapters(model, plan.adapters, recipe.data.seed)
    model.freeze(recipe.model.freeze)


def kept(model: QwenVL) -> Callable[[str], bool]:
    """Whether a checkpoint keeps a parameter: with adapters, those alone; else everything."""
    return is_adapter if model.adapters is not None else lambda path: True


def base_of(model: QwenVL) -> Mapping[str, Any]:
    """What a checkpoint says of its adapters and of the model that they belong to; nothing without adapters."""
    if model.adapters is None or model.source is None:
        return {}
    return {**model.source.identity(), "adapters": model.adapters.to_json()}
