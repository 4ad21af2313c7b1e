"""How long a step of a recipe is expected to take: its settings in the terms of the cost model (docs/planning.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from duetvl.cost_model.devices import DeviceType
from duetvl.cost_model.measured import this_cpu
from duetvl.cost_model.step_time import CostModel, Optimizing, StepTime, Work
from duetvl.data.draft import Draft
from duetvl.models.lora import Adapters
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.flops import Amounts
from duetvl.models.qwen_vl.memory import Trained
from duetvl.training.memory import division_of, largest_load
from duetvl.training.recipe.sections import Recipe

_ROWS: Final = 1024  # of the product that is measured, at most
_COLUMNS: Final = 2048  # and columns, of both factors


@dataclass(frozen=True, eq=False)
class SampleSize:
    """A sample, or a pair, as far as its cost goes: `lengths` of its sequences, `grids` (N, 3) of its media."""

    trained: int
    lengths: tuple[int, ...]
    grids: np.ndarray

    @classmethod
    def of(cls, draft: Draft) -> SampleSize:
        """That of a draft."""
        lengths = len(draft.input_ids), *((len(draft.rejected[0]),) if draft.rejected else ())
        return cls(draft.trained_tokens, lengths, np.concatenate([draft.image_grid_thw, draft.video_grid_thw]))

    @property
    def tokens(self) -> int:
        """Of all its sequences."""
        return sum(self.lengths)

    @property
    def patches(self) -> int:
        """Of all its media."""
        return int(self.grids.prod(axis=1).sum())

    @property
    def frame(self) -> int:
        """Patches of the largest frame."""
        return int(self.grids[:, 1:].prod(axis=1).max(initial=0))


def sizes_of(drafts: Iterable[Any]) -> list[SampleSize]:
    """Of those that can be used."""
    return [SampleSize.of(draft) for draft in drafts if isinstance(draft, Draft)]


def work_of(recipe: Recipe, config: ModelConfig, sizes: Sequence[SampleSize]) -> Work:
    """What a replica does in a step on average, of samples of these sizes."""
    _, count = largest_load(recipe, [(one.tokens, one.trained, one.patches) for one in sizes])
    grids = np.concatenate([one.grids for one in sizes])
    lengths = [length for one in sizes for length in one.lengths]
    tokens, trained, patches = (sum(getattr(one, name) for one in sizes) for name in ("tokens", "trained", "patches"))
    share = recipe.train.global_batch / len(sizes) / recipe.parallel.mesh.dp / count
    amounts = Amounts.of_sizes(config, tokens, trained, patches, lengths, grids).scaled(share)
    reference = recipe.dpo is not None and recipe.dpo.cache is None
    return Work(amounts, count, max(one.frame for one in sizes), reference)


def cost_model(
    recipe: Recipe,
    config: ModelConfig,
    adapters: Adapters | None,
    sizes: Sequence[SampleSize],
    device: DeviceType,
    trained: Trained | None = None,
) -> CostModel:
    """The cost model of a recipe; `trained` where it is known already.

    Raises ConfigError where nothing is known of the device's products in `model.dtype`.
    """
    trained = trained or Trained.of(config, recipe.model.dtype, recipe.model.freeze, adapters)
    optim = recipe.optim
    optimizing = Optimizing(recipe.train.recompute, recipe.model.dtype, optim.state_dtype, optim.offload)
    return CostModel(config, trained, work_of(recipe, config, sizes), optimizing, device)


def expected_step(
    recipe: Recipe,
    config: ModelConfig,
    adapters: Adapters | None,
    sizes: Sequence[SampleSize],
    device: DeviceType | None = None,
) -> StepTime:
    """What a step of a recipe is expected to take on average, by the sizes of some samples.

    device: None for this machine's processor, which is measured. Raises ConfigError as `cost_model` does.
    """
    device = device or here(recipe, config, sizes)
    return cost_model(recipe, config, adapters, sizes, device).step(division_of(recipe, config))


def here(recipe: Recipe, config: ModelConfig, sizes: Sequence[SampleSize]) -> DeviceType:
    """This machine's processor, measured at the product of a micro-batch with a part of an MLP as a rank has it."""
    mesh, work = recipe.parallel.mesh, work_of(recipe, config, sizes)
    rows = max(1, min(_ROWS, round(work.amounts.tokens / mesh.cp)))
    columns = max(1, min(_COLUMNS, config.text.intermediate_size // mesh.tp))
    return this_cpu((rows, min(_COLUMNS, config.text.hidden_size), columns), mesh.size)


def describe_step(step: StepTime) -> str:
    """`about 12.0 s a step: computing 9.4 s, waiting for other stages 1.0 s, tp collectives 1.5 s`"""
    parts = {
        "computing": step.compute,
        "recomputation": step.again,
        "waiting for other stages": step.waiting,
        "tp collectives": step.sums,
        "cp exchanges": step.pieces,
        "ZeRO-3 gathers": step.blocks,
        "gradients and new weights": step.gradients,
        "the optimizer": step.update,
        "the reference": step.reference,
    }
    shown = [f"{name} {seconds:.3g} s" for name, seconds in parts.items() if seconds > 0.005 * step.seconds]
    return f"about {step.seconds:.3g} s a step: {', '.join(shown)}"
