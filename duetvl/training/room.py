"""What to say before the first step where the disk or the memory of a rank will not do."""

from __future__ import annotations

import socket
from pathlib import Path

from duetvl.core.device import Device
from duetvl.core.ranks import Ranks
from duetvl.training.checkpoints.space import Space, exported_dtype
from duetvl.training.memory import Memory
from duetvl.training.state import RunState


def memory_estimate(state: RunState, ranks: Ranks) -> Memory | None:
    """What a step takes on a rank, from the first samples; None where nothing can be said of it. The same on all."""
    memory = state.job.memory
    return ranks.first(lambda: memory and memory(state.feed.first_drafts()))


def room_warnings(state: RunState, ranks: Ranks, steps: int, estimate: Memory | None) -> list[str]:
    """What a run with `steps` steps left has too little disk or memory for; the same on all ranks.

    The run directory is one for all, and rank 0 looks at its disk; memory is each rank's own, of which the estimate
    is. Raises ConfigError where not one checkpoint has room.
    """
    if steps <= 0:
        return []
    found = [ranks.first(lambda: _disk(state, steps)), memory_warning(estimate, state.backend.device, ranks)]
    return [*filter(None, found)]


def _disk(state: RunState, steps: int) -> str | None:
    recipe = state.recipe
    written = exported_dtype(state.job.model_config.get("torch_dtype"))
    space = Space.of(state.kept, state.trainer.everything, state.trainer.state.dtype, recipe, written)
    return space.warning(Path(recipe.train.output_dir), recipe.checkpoint, steps, refuse=True)


def memory_warning(estimate: Memory | None, device: Device, ranks: Ranks) -> str | None:
    """That of the first rank whose device has less: rank 0's says it for all, another's says where it is."""
    own = estimate.warning(device.total_memory(), device.name) if estimate else None
    told = ranks.each((socket.gethostname(), own))
    rank, host, text = next(((rank, host, text) for rank, (host, text) in enumerate(told) if text), (0, "", None))
    if not text or not rank:
        return text
    return f"warning: rank {rank} ({host}): {text.removeprefix('warning: ')}"
