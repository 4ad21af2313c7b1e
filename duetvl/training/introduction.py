"""What a run says of itself before its first step: a block of lines for a terminal of 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import Final

from duetvl.core.backend import Backend
from duetvl.core.mesh import AXES
from duetvl.core.patterns import Parts
from duetvl.models.lora import is_adapter
from duetvl.parallel.inventory import Inventory
from duetvl.training.memory import Memory
from duetvl.training.recipe.sections import Recipe
from duetvl.training.state import RunState

WIDTH: Final = 79  # a line of 80 wraps on some terminals
_INDENT: Final = 9


def introduction(state: RunState, total: int, memory: Memory | None) -> Iterator[str]:
    """Backend, model, what is trained, data, steps, layout, memory and directory of a run of `total` steps.

    `memory` is the estimate for a step, None where there is none. Only a name may make a line wider than `WIDTH`.
    """
    recipe, everything = state.recipe, state.trainer.everything
    yield from _wrapped("backend", _backend(state.backend))
    if state.backend.passed_over:
        yield from _wrapped("device", f"auto took the CPU: found {state.backend.passed_over}")
    yield from _wrapped("model", _model(state))
    yield from (
        line for name, words in _parameters(everything, state.job.model.parts) for line in _wrapped(name, words)
    )
    yield from _wrapped("data", _data(state))
    yield from _wrapped("steps", _steps(state, total))
    yield from _wrapped("layout", _layout(recipe))
    if memory is not None:
        yield from _wrapped("memory", memory.describe().removeprefix("memory: "))
    yield from _wrapped("run", recipe.train.output_dir)


def _wrapped(name: str, words: str) -> list[str]:
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=f"{name}:".ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _backend(backend: Backend) -> str:
    device = backend.device
    product = f" ({device.product})" if device.product else ""
    return f"{backend.name} ({backend.capabilities.framework}) on {device.name}{product}"


def _model(state: RunState) -> str:
    dtypes = dict.fromkeys(entry.dtype for path, entry in state.trainer.everything.items() if not is_adapter(path))
    family = state.job.model_config.get("model_type")
    return ", ".join(filter(None, (state.recipe.model.path, family, f"weights in {' and '.join(dtypes)}")))


def _parameters(everything: Inventory, parts: Parts) -> Iterator[tuple[str, str]]:
    """The lines `trained` and `frozen`: numbers in all, and by part."""
    sizes = {path: math.prod(entry.shape) for path, entry in everything.items()}
    whole = sum(sizes.values())
    for name, trainable in (("trained", True), ("frozen", False)):
        members = {path: size for path, size in sizes.items() if everything[path].trainable is trainable}
        count = sum(members.values())
        by_part = {part: sum(members[p] for p in members if p.startswith(starts)) for part, starts in parts.items()}
        listed = ", ".join(f"{part} {_short(size)}" for part, size in by_part.items() if size)
        adapters = ", adapters alone" if trainable and any(map(is_adapter, members)) else ""
        share = "all" if count == whole else f"{count / whole:.2%}"
        said = f"{_short(count)} parameters, {share}{adapters}: {listed}"
        yield name, said if count else "nothing"


def _data(state: RunState) -> str:
    sets, kind = state.feed.sets, "preference pairs" if state.recipe.dpo is not None else "records"
    counted = f"{sets.train_count} {kind}" if sets.train_count is not None else f"a stream of {kind}"
    return counted + (f", {sets.val_count} for evaluation" if sets.val_count else "")


def _steps(state: RunState, total: int) -> str:
    group, per_epoch = state.recipe.train.global_batch, state.feed.sets.per_epoch
    epochs = "" if per_epoch is None else f" ({float(total * group / per_epoch):.3g} epochs)"
    done = f"; {state.step} are done" if state.step else ""
    return f"{total} of {group} {'pairs' if state.recipe.dpo is not None else 'samples'} each{epochs}{done}"


def _layout(recipe: Recipe) -> str:
    mesh = recipe.parallel.mesh
    degrees = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES if getattr(mesh, axis) > 1)
    return f"{mesh.size} ranks: {degrees}" if mesh.size > 1 else "1 process"


def _short(count: int) -> str:
    """Three digits: 8.29B, 665M, 29.4k."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
