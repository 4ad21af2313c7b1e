"""What a policy is compared with in preference training: where the reference's weights come from, and when it runs.

Without `dpo.cache` the reference is held beside the policy and runs on every micro-batch: the model of
`dpo.reference`, with LoRA the policy's own weights without the adapter, else a second copy of `model.path`. It is
always that, also after a resume: never the weights of a checkpoint. With `dpo.cache` it runs once over all pairs
before the first step and is not held after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.core.errors import ConfigError
from duetvl.models.qwen_vl.loading import load_model
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.training.dpo import Reference, reference_of
from duetvl.training.metrics import Progress
from duetvl.training.reference_cache import ReferenceCache, reference_name
from duetvl.training.sections import Recipe


@dataclass(frozen=True)
class PairData:
    """All pairs that a run may meet, for a reference that runs before it.

    name: 32 letters that change when the data or their encoding do. batches: micro-batches of all of them, with
    digests.
    """

    name: str
    count: int
    batches: Callable[[], Iterator[Batch]]


def make_reference(recipe: Recipe, policy: QwenVL, backend: Backend, data: Callable[[], PairData]) -> Reference:
    """The reference of a recipe with a section `dpo`.

    `policy` has the weights of `model.path` here, before any checkpoint is read. `data` is asked for where there is a
    cache to fill.
    """
    assert recipe.dpo is not None
    if recipe.dpo.cache is None:
        return reference_of(_held(recipe, policy, backend), backend.ops)
    directory = recipe.dpo.reference or recipe.model.path
    cache = ReferenceCache(recipe.dpo.cache, reference_name(directory, recipe.model.dtype))
    given = data()
    if not cache.is_complete(given.name):
        fill(cache, given, _at_start(recipe, policy, backend), backend)
    return lambda batch: backend.ops.from_numpy(cache.sums(batch))


def fill(cache: ReferenceCache, data: PairData, model: QwenVL, backend: Backend) -> None:
    """Run the model on every pair that the cache lacks. What is done is kept if this is interrupted."""
    reference = reference_of(model, backend.ops)
    seen = 0
    progress = Progress(data.count, unit="reference: pair", every=max(1, data.count // 20))
    try:
        with cache.filling() as add:
            for batch in data.batches():
                if cache.lacks(batch.digests):
                    add(batch.digests, backend.to_numpy(reference(batch)))
                seen += len(batch.digests)
                progress.step({"step": seen})
    finally:
        progress.close()
    cache.set_complete(data.name)


def _at_start(recipe: Recipe, policy: QwenVL, backend: Backend) -> QwenVL:
    """The reference for use before the first step, when the policy itself still has the weights of `model.path`."""
    assert recipe.dpo is not None
    own = recipe.dpo.reference is None and recipe.lora is None
    return policy if own else _held(recipe, policy, backend)


def _held(recipe: Recipe, policy: QwenVL, backend: Backend) -> QwenVL:
    """The reference for use at any time."""
    assert recipe.dpo is not None
    if recipe.dpo.reference is None and recipe.lora is not None:
        return policy.without_adapters()
    directory = recipe.dpo.reference or recipe.model.path
    model: QwenVL = load_model(directory, backend=backend, dtype=recipe.model.dtype)
    check_same_inputs(policy, model, directory)
    return model


def check_same_inputs(policy: QwenVL, reference: QwenVL, directory: str) -> None:
    """Raise ConfigError where a batch for the policy is none for the reference."""
    clocks = [model.config.vision.tokens_per_second for model in (policy, reference)]
    differences = {
        "other ids for pictures and videos": policy.family.special != reference.family.special,
        "other patches": policy.family.geometry != reference.family.geometry,
        "another clock for videos": clocks[0] != clocks[1],
        "fewer tokens in its vocabulary": reference.config.text.vocab_size < policy.config.text.vocab_size,
    }
    found = [name for name, differs in differences.items() if differs]
    if found:
        raise ConfigError(
            f"dpo.reference {directory} has {' and '.join(found)} compared with model.path; give a model of the same "
            f"family"
        )
