"""What a policy is compared with in preference training: where the reference's weights come from, and when it runs.

Without `dpo.cache` the reference is held beside the policy and runs on every micro-batch: the model of
`dpo.reference`, with LoRA the policy's own weights without the adapter, else a second copy of `model.path`. It is
always that, also after a resume: never the weights of a checkpoint. With `dpo.cache` it runs once over all pairs
before the first step and is not held after that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from duetvl.convert.opening import open_merged
from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.core.errors import CheckpointError, ConfigError, DataError
from duetvl.core.ranks import Ranks
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.host import QwenVLFamily
from duetvl.models.qwen_vl.loading import load_model
from duetvl.models.qwen_vl.model import QwenVL
from duetvl.parallel.division import ALONE, Division
from duetvl.parallel.passes import Passes
from duetvl.parallel.pipeline import passes_of, placed
from duetvl.training.objective import Reference
from duetvl.training.preference.dpo import reference_of
from duetvl.training.preference.reference_cache import Add, ReferenceCache, reference_name, short_hash
from duetvl.training.recipe.sections import Recipe
from duetvl.training.watching.progress import Progress

Tensor = Any

# Fields of `data` that change neither which pairs there are nor how they are encoded.
_NOT_ENCODING: Final = (
    "pack", "pack_tokens", "pack_patches", "shuffle", "shuffle_buffer", "workers", "prefetch", "cache",
)  # fmt: skip
_AGAIN: Final = 1.0  # seconds until a file that another run fills is tried again


class PairData(Protocol):
    """All pairs that a run may meet, as a reference sees them that runs before it; `feed.Feed` is one."""

    @property
    def count(self) -> int:
        """Records, of which some may give no pair."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Where they are read."""
        ...

    def everything(self) -> Iterator[Sequence[Batch]]:
        """Micro-batches of all of them, with digests, in groups."""
        ...


def make_reference(recipe: Recipe, policy: QwenVL, backend: Backend, division: Division = ALONE) -> Reference:
    """The reference of a recipe with a section `dpo`; with `dpo.cache`, a `CachedReference` that is yet to be filled.

    `policy` has the weights of `model.path` here, before any checkpoint is read; the reference is divided over ranks
    in the same way.
    """
    assert recipe.dpo is not None
    if recipe.dpo.cache is not None:
        return CachedReference(recipe, policy, backend, division)
    model = _held(recipe, policy, backend, division)
    return reference_of(passes_of(model, backend, division.for_model(model.config)), backend.ops)


class CachedReference:
    """A reference that runs once, before the first step, and is looked up from then on."""

    def __init__(self, recipe: Recipe, policy: QwenVL, backend: Backend, division: Division):
        """Open the cache; what it holds may be incomplete until `prepare`."""
        assert recipe.dpo is not None and recipe.dpo.cache is not None
        self.recipe, self.policy, self.backend, self.division = recipe, policy, backend, division
        self.ranks, directory = Ranks(backend.collectives), recipe.dpo.cache
        name = reference_name(reference_model(recipe), recipe.model.dtype, self.ranks)
        self.cache = self.ranks.first(lambda: ReferenceCache(directory, name))

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The log-probabilities (S,) of each batch's answers. Raises DataError naming a pair that is not known."""
        return [self.backend.ops.from_numpy(self.cache.sums(batch)) for batch in batches]

    def prepare(self, data: PairData) -> None:
        """Compute what the cache lacks, while the policy still has the weights of `model.path`."""
        name = self.ranks.first(lambda: data_name(self.recipe, data.files))
        if not self.ranks.first(lambda: self.cache.is_complete(name)):
            model = _at_start(self.recipe, self.policy, self.backend, self.division)
            passes = passes_of(model, self.backend, self.division.for_model(model.config))
            fill(self.cache, data, passes, self.backend)
            self.ranks.first(lambda: self.cache.set_complete(name))


def fill(cache: ReferenceCache, data: PairData, passes: Passes, backend: Backend) -> None:
    """Run a model on every pair that the cache lacks, each rank on its share; rank 0 writes.

    What is done is kept if this is interrupted.
    """
    reference, ranks = reference_of(passes, backend.ops), Ranks(backend.collectives)
    progress = Progress(data.count, unit="reference: pair", every=max(1, data.count // 20)) if ranks.writes else None
    with ExitStack() as open_things, ranks.telling(DataError, CheckpointError):
        if progress is not None:
            open_things.callback(progress.close)
        opened = _opened_in_turn(cache, open_things, ranks, progress)
        cache.learn_from(ranks.agree(cache))
        seen: set[bytes] = set()
        for batches in data.everything():
            found = ranks.each(_answers(cache, batches, reference, backend))
            ranks.first(partial(_add, found, opened[0] if opened else cache.learn))
            if not ranks.writes:
                _add(found, cache.learn)
            seen.update(digest for digests, _, _ in found for digest in digests)
            if progress is not None:
                progress.step({"step": len(seen)})
        if progress is not None and len(seen) < data.count:  # some are equal, or gave no sample
            progress.step({"step": data.count})


def _opened_in_turn(
    cache: ReferenceCache, open_things: ExitStack, ranks: Ranks, progress: Progress | None
) -> list[Add]:
    """What adds to the file, on rank 0, once no other run fills it: that may take hours, so all ranks look again."""
    opened = list[Add]()

    def is_open() -> bool:
        with suppress(BlockingIOError):
            opened.append(open_things.enter_context(cache.filling()))
        return bool(opened)

    told = False
    while not ranks.first(is_open):
        if progress is not None and not told:
            progress.say(f"reference: waiting for another run, which is filling {cache.path}")
        told = True
        time.sleep(_AGAIN)
    if progress is not None:
        progress.started = time.monotonic()  # for the time left
    return opened


Found = tuple[list[bytes], list[bytes], np.ndarray]


def _add(found: Sequence[Found], add: Callable[[Sequence[bytes], np.ndarray], Any]) -> None:
    for _, missing, sums in found:
        add(missing, sums)


def _answers(cache: ReferenceCache, batches: Sequence[Batch], reference: Reference, backend: Backend) -> Found:
    """The pairs of some micro-batches; those of micro-batches that hold one which the cache lacks, and their sums."""
    lacking = [batch for batch in batches if cache.lacks(batch.digests)]
    found = reference(lacking)
    if len(found) < len(lacking):  # the ranks with the last stage know them
        return [digest for batch in batches for digest in batch.digests], [], np.zeros(0, np.float32)
    sums = [_checked(batch, backend.to_numpy(own)) for batch, own in zip(lacking, found, strict=True)]
    every, missing = ([digest for batch in some for digest in batch.digests] for some in (batches, lacking))
    return every, missing, np.concatenate([np.zeros(0, np.float32), *sums])


def _checked(batch: Batch, sums: np.ndarray) -> np.ndarray:
    """The sums (S,), none of which may be kept that is not a number."""
    wrong = np.flatnonzero(~np.isfinite(sums))
    if len(wrong):
        raise CheckpointError(
            f"the reference's log-probability of sample {batch.sample_ids[int(wrong[0]) // 2]} is not finite: its "
            f"weights are damaged, or too large for the dtype; try model.dtype bfloat16 or float32"
        )
    return sums


def data_name(recipe: Recipe, files: Iterable[Path]) -> str:
    """32 letters that change when a data file does, or what of the recipe and of the model directory encodes it.

    Files are told apart by path, size and time, which does not cost a look into them. Media are not looked at.
    """
    settings = recipe.data.model_dump(mode="json", exclude=set(_NOT_ENCODING))
    source = open_merged(recipe.model.path, base=recipe.model.base, weights=False)
    beside = [source.path / file for file in (Path("config.json"), *source.settings())]
    return short_hash([settings, [_identity(file) for file in (*files, *beside)]])


def _identity(file: Path) -> list[Any]:
    found = file.stat()
    return [str(file.absolute()), found.st_size, found.st_mtime_ns]


def _at_start(recipe: Recipe, policy: QwenVL, backend: Backend, division: Division) -> QwenVL:
    """The reference for use before the first step, when the policy itself still has the weights of `model.path`."""
    assert recipe.dpo is not None
    own = recipe.dpo.reference is None and recipe.lora is None
    return policy if own else _held(recipe, policy, backend, division)


def _held(recipe: Recipe, policy: QwenVL, backend: Backend, division: Division) -> QwenVL:
    """The reference for use at any time."""
    assert recipe.dpo is not None
    if recipe.dpo.reference is None and recipe.lora is not None:
        return policy.without_adapters()
    source = reference_model(recipe)
    check_same_inputs(policy.config, source.config, source.name)
    own = division.for_model(source.config)
    loaded = partial(load_model, source, backend=backend, dtype=recipe.model.dtype, division=own)
    model: QwenVL = Ranks(backend.collectives).together(loaded)
    return placed(model, own, backend)


def reference_identity(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint says of the reference's weights; nothing without a section `dpo`."""
    if recipe.dpo is None:
        return {}
    return reference_model(recipe).identity()


def reference_model(recipe: Recipe, *, weights: bool = True) -> ModelDirectory:
    """The model that a recipe with a section `dpo` compares with."""
    assert recipe.dpo is not None
    if recipe.dpo.reference is None:
        return open_merged(recipe.model.path, base=recipe.model.base, weights=weights)
    return open_merged(recipe.dpo.reference, base=recipe.dpo.reference_base, weights=weights)


def check_same_inputs(policy: ModelConfig, reference: ModelConfig, name: str) -> None:
    """Raise ConfigError where a batch for the policy is none for the reference."""
    one, other = QwenVLFamily(policy), QwenVLFamily(reference)
    differences = {
        "other ids for pictures and videos": one.special != other.special,
        "other patches": one.geometry != other.geometry,
        "another clock for videos": policy.vision.tokens_per_second != reference.vision.tokens_per_second,
        "fewer tokens in its vocabulary": reference.text.vocab_size < policy.text.vocab_size,
    }
    found = [name for name, differs in differences.items() if differs]
    if found:
        raise ConfigError(
            f"dpo.reference {name} has {' and '.join(found)} compared with model.path; give a model of the same family"
        )


def describe(recipe: Recipe, policy: ModelConfig) -> str:
    """One line about the section `dpo`. Raises ConfigError or CheckpointError for a reference that cannot serve."""
    assert recipe.dpo is not None
    unchecked = ""
    where = "a second copy of model.path" if recipe.lora is None else "the model without its adapter"
    if recipe.dpo.reference is not None:
        where = recipe.dpo.reference
        source = reference_model(recipe, weights=False)
        check_same_inputs(policy, source.config, where)
        if source.has_weights:
            _ = source.weights  # opened, and so checked
        else:
            unchecked = "; its weights are not here, and so not checked"
    if recipe.dpo.cache is not None:
        where = f"{where.replace('a second copy of ', '')}, run once and kept in {recipe.dpo.cache}"
    return f"dpo: loss {recipe.dpo.loss}, beta {recipe.dpo.beta:g}; reference: {where}{unchecked}"
