"""What a step costs: time, tokens a second, memory, and the share of the device's arithmetic that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.cost_model.devices import peak_flops
from duetvl.data.loading.loader import Step
from duetvl.training.recipe.sections import Recipe

Flops = Callable[[Batch], float]


class Meter:
    """Makes the part of a step's row that says what it took."""

    def __init__(self, recipe: Recipe, backend: Backend, flops: Flops | None):
        """`flops` counts what the model has to compute for a micro-batch, forward and backward, without recompute."""
        self.device, self.flops = backend.device, flops
        stated = recipe.log.peak_tflops
        known = peak_flops(backend.device.product, recipe.model.dtype)
        self.peak = stated * 1e12 if stated is not None else known

    def row(self, work: Step, seconds: float, waited: float, peak_memory: int = 0) -> dict[str, Any]:
        """`seconds` of the whole step, of which it `waited` for its data; `peak_memory` that of another rank."""
        found = {
            "tokens": work.tokens,
            "trained_tokens": work.trained_tokens,
            "micro_batches": work.totals.packs,
            "tokens_per_s": work.tokens / seconds,
            "tokens_per_sample": work.tokens / max(1, len(work.sample_ids)),
            "step_s": seconds,
            "data_wait": waited / seconds,
            "peak_memory": max(peak_memory, self.device.peak_memory()),
        }
        if self.flops is not None and self.peak is not None:
            found["mfu"] = sum(map(self.flops, work.batches)) / seconds / self.peak
        return found
