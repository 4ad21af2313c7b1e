"""Whether the disk has room for what a run will save; looked at before its first step, and by `duetvl check`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from duetvl.core.errors import ConfigError
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.memory import BYTES
from duetvl.parallel.inventory import Entry, Inventory
from duetvl.storage.files import free_space
from duetvl.storage.finding import STEP, checkpoints_dir
from duetvl.storage.tensor_files import TensorSpec
from duetvl.training.recipe.sections import CheckpointSection, Recipe

_HEADERS: Final = 1 << 14  # of the files of tensors and the manifest, roughly


@dataclass(frozen=True)
class Space:
    """Bytes of one checkpoint of a run, and of its export (0 where there is none)."""

    checkpoint: int
    export: int = 0

    @classmethod
    def of(
        cls,
        stored: Inventory,
        everything: Inventory,
        state_dtype: str,
        recipe: Recipe,
        dtype: str | None = None,
    ) -> Space:
        """Of a run whose checkpoints keep the stored parameters, and whose model has all of these, adapters included.

        `dtype` is that of an exported model, None where it is exported as it is trained.
        What all ranks write, since it goes to one file system.
        """
        weights = sum(_bytes(entry, entry.dtype) for entry in stored.values())
        plain = [entry for path, entry in everything.items() if not is_adapter(path)]
        model = sum(_bytes(entry, dtype or entry.dtype) for entry in plain)
        updated = [entry for entry in stored.values() if entry.trainable]
        if recipe.checkpoint.save_only_model:
            return cls.with_export(weights, weights, model, recipe)
        moments = sum(2 * _bytes(entry, state_dtype) for entry in updated)
        masters = sum(_bytes(entry, "float32") for entry in updated if entry.dtype != "float32")
        return cls.with_export(weights + moments + masters, weights, model, recipe)

    @classmethod
    def with_export(cls, checkpoint: int, weights: int, model: int, recipe: Recipe) -> Space:
        """Of a recipe's run: `weights` are the bytes of a checkpoint that are weights, `model` those of all of it as
        it is exported."""
        export = recipe.checkpoint.export
        whole = export in ("merged", "mindspeed_mm") or recipe.lora is None
        return cls(checkpoint + _HEADERS, 0 if not export else model if whole else weights)

    def needed(self, section: CheckpointSection, steps: int, there: int) -> int:
        """What is written at most at one time, in `steps` steps, beside `there` checkpoints that are there already.

        How often `minutes` will have a checkpoint saved is not known: not counted.
        """
        saves = math.ceil(steps / section.every) if section.every else 1
        kept = saves + there if section.keep_last is None else min(saves + there, section.keep_last + 1)
        kept += 1 if section.keep_best else 0
        return self.checkpoint * max(kept - there, 1) + self.export

    def warning(self, run_dir: Path, section: CheckpointSection, steps: int, *, refuse: bool = False) -> str | None:
        """What to say where the disk has no room for what `steps` more steps will keep; None where it has.

        With `refuse` ConfigError is raised where it has not even room for one checkpoint.
        """
        free = free_space(checkpoints_dir(run_dir))
        needed = self.needed(section, steps, _there(run_dir))
        if free is None or needed <= free:
            return None
        found = f"train.output_dir {run_dir}: a checkpoint takes {in_words(self.checkpoint)}"
        found += f", the export {in_words(self.export)}" if self.export else ""
        have = f"its disk has {in_words(free)} free; make room, or choose a directory on another disk"
        if self.checkpoint > free and refuse:
            raise ConfigError(f"{found}, {have}")
        return f"warning: {found}, all at one time {in_words(needed)}, {have}"


def exported_dtype(named: str | None) -> str | None:
    """The dtype of an exported model whose `config.json` names this one; None where it is exported as it is trained."""
    return named if named in BYTES else None


def _bytes(entry: Entry, dtype: str) -> int:
    """Of all of a parameter in this dtype."""
    return TensorSpec(dtype, entry.shape).nbytes


def in_words(count: float) -> str:
    """`1.50 GB`."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _there(run_dir: Path) -> int:
    folder = checkpoints_dir(run_dir)
    return sum(bool(STEP.fullmatch(path.name)) for path in folder.iterdir()) if folder.is_dir() else 0
