"""What a step costs: time, tokens a second, memory, and the share of the device's arithmetic that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from duetvl.core.backend import Backend
from duetvl.core.batch import Batch
from duetvl.data.loading.loader import Step
from duetvl.training.recipe.sections import Recipe

Flops = Callable[[Batch], float]

# Dense matrix products, 1e12 operations a second, in the order in which names are looked for.
# NVIDIA: the data sheets of A100 (2020), H100 (PCIe and SXM, 2022), H200 (2023), L40S (2023), A10 and A30 (2021),
# V100 (2017), and the Ada whitepaper for the 4090 (float32 accumulation); figures "with sparsity" are halved. H800 and
# A800 differ from H100 and A100 in their links alone. float32 is without TF32. Ascend 910 (A): Huawei, Hot Chips 31.
# For the variants of Ascend 910B no data sheet is public: state log.peak_tflops.
_PEAKS: Final[tuple[tuple[str, dict[str, float]], ...]] = (
    ("H200", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("H800 PCIE", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.2}),
    ("H800", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("H100 PCIE", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.2}),
    ("H100", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("A100", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    ("A800", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    ("L40S", {"bfloat16": 362.05, "float16": 362.05, "float32": 91.6}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}),
    ("A10", {"bfloat16": 125.0, "float16": 125.0, "float32": 31.2}),
    ("A30", {"bfloat16": 165.0, "float16": 165.0, "float32": 10.3}),
    ("V100", {"float16": 125.0, "float32": 15.7}),
    ("910A", {"float16": 256.0}),
)


def peak_flops(product: str, dtype: str) -> float | None:
    """Operations a second that a device of this name can do in products of this dtype; None where it is not known."""
    name = product.upper().replace("-", " ")
    for part, peaks in _PEAKS:
        if set(part.split()) <= set(name.split()):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


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
