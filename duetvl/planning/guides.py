"""The layouts that MindSpeed-MM's guides ship for each size, as the recipes have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.training.recipe.parallel_section import ParallelSection


@dataclass(frozen=True)
class Guide:
    """A layout of one size; the replicas are as many as the devices allow."""

    pp: int = 1
    tp: int = 1
    language: tuple[int, ...] | None = None
    layers: int = 32  # of the vision tower, all on the first stage

    def section(self, devices: int) -> ParallelSection:
        """For a number of devices. Raises ConfigError where that is no multiple of what it takes."""
        replicas, left = divmod(devices, self.pp * self.tp)
        if left or not replicas:
            raise ConfigError(f"it takes {self.pp * self.tp} devices, or a multiple of them")
        if self.language is None:
            return ParallelSection(dp=replicas)
        vision = ((self.layers, *[0] * (self.pp - 1)),)
        return ParallelSection(
            pp=self.pp,
            dp=replicas,
            tp=self.tp,
            sequence=self.tp > 1,
            vision_layers=vision,
            language_layers=(self.language,),
        )


_72B_DPO: Final = Guide(4, 2, (17, 21, 22, 20))
_SIZES: Final[dict[str, tuple[Guide, Guide]]] = {  # supervised fine-tuning, DPO
    "Qwen2-VL-2B": (Guide(), Guide()),
    "Qwen2-VL-7B": (Guide(4, 1, (1, 10, 10, 7)), Guide(4, 1, (1, 10, 10, 7))),
    "Qwen2-VL-72B": (Guide(8, 2, (5, 11, 11, 11, 11, 11, 11, 9)), _72B_DPO),
    "Qwen2.5-VL-3B": (Guide(), Guide()),
    "Qwen2.5-VL-7B": (Guide(2, 1, (12, 16)), Guide(2, 1, (12, 16))),
    "Qwen2.5-VL-32B": (Guide(8, 2, (1, 9, 9, 9, 9, 9, 9, 9)), Guide(4, 2, (13, 17, 17, 17))),
    "Qwen2.5-VL-72B": (Guide(8, 2, (6, 11, 11, 11, 11, 11, 11, 8)), _72B_DPO),
}
_ALONE: Final = frozenset(("Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"))  # adapters on one device


def guide_for(model: str, *, lora: bool, dpo: bool) -> Guide | None:
    """That of a published size by its name or id; None where the guides have none."""
    name = model.rsplit("/", 1)[-1].removesuffix("-Instruct")
    if lora and name in _ALONE:
        return Guide()
    return _SIZES[name][dpo] if name in _SIZES else None
