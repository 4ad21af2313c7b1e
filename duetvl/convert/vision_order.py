"""In which order the rows of the vision tower's fused qkv lie in a checkpoint of MindSpeed-MM.

Releases 2.1.0 to 2.3.0 wrote [q; k; v] as Hugging Face has them, others interleave them by heads, under the same names
and in the same shapes. Which it is shows where the model that training began with is at hand: a frozen tower has its
numbers, a trained one is nearer to them in the right order than in the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from duetvl.convert.layouts import Layout, Model
from duetvl.convert.mindspeed import MindSpeedDirectory
from duetvl.convert.names import INTERLEAVED, ORDERS, VisionOrder
from duetvl.convert.sources import open_source
from duetvl.convert.streaming import FragmentedTensors, row_chunks
from duetvl.core.boxes import Box
from duetvl.core.errors import CheckpointError, ConfigError, DuetvlError
from duetvl.core.half import widened

# Of squared distances. Two tensors that have nothing to do with each other are as far apart in either order; a tower
# would have to be trained until half of it is new to miss this.
_CLEARLY_NEARER: Final = 0.25
OLD_RELEASES: Final = "releases 2.1.0 to 2.3.0 (before 2025-12-24)"


def find_order(directory: MindSpeedDirectory, layout: Layout, model: Model, base: FragmentedTensors) -> VisionOrder:
    """The order in which the tower is that of `base`, frozen or trained. CheckpointError where neither is nearer.

    `directory.logical` must have accepted model and layout.
    """
    found = {order: directory.vision_qkv(model, replace(layout, vision_qkv=order)) for order in ORDERS}
    alike = True
    for name, spec in found["hf"].specs.items():
        if _distance(name, found["hf"], found["interleaved"]) == 0:
            continue
        alike = False
        if name not in base.specs:
            continue
        if base.specs[name].shape != spec.shape:
            raise CheckpointError(f"its {name} has another shape")
        distances = {order: _distance(name, tensors, base) for order, tensors in found.items()}
        near, far = sorted(ORDERS, key=lambda order: distances[order])
        if distances[near] < _CLEARLY_NEARER * distances[far]:
            return near
    if alike:  # one head, or nothing but zeros
        return INTERLEAVED
    raise CheckpointError("its vision tower is not the one that this checkpoint began with")


def _distance(name: str, a: FragmentedTensors, b: FragmentedTensors) -> float:
    """Sum of the squared differences; not a number where one of them is none."""
    total = 0.0
    for box in row_chunks(a.specs[name], Box.whole(a.specs[name].shape)):
        x, y = (tensors.read(name, box) for tensors in (a, b))
        if a.specs[name].dtype != b.specs[name].dtype or not np.array_equal(x, y):
            values = (widened(bits, tensors.specs[name].dtype) for bits, tensors in ((x, a), (y, b)))
            total += float(np.sum(np.square(np.subtract(*values), dtype=np.float64)))
        a.release(name)
        b.release(name)
    return total if math.isfinite(total) else math.nan


def read_order(
    directory: MindSpeedDirectory,
    layout: Layout,
    model: Model,
    hf_dir: Path | None,
    *,
    key: str,
    needed: bool,
    say: Callable[[str], None],
) -> VisionOrder | None:
    """The order that is stated, else the one that the weights in `hf_dir` show; what is found is said.

    None where it is neither, or ConfigError where it is `needed`: then the user is asked for `key`.
    """
    if layout.canonical or not directory.has("image_encoder.encoder.blocks."):
        return layout.vision_order
    found, why = _shown_by(directory, layout, model, hf_dir)
    stated = layout.vision_qkv
    if stated and found and stated != found:
        say(f"warning: --cfg.{key} says {stated}, but beside the weights in {hf_dir} the vision tower is {found}")
    if not stated and found == "hf":
        say(f"{directory.path}: its vision tower has the qkv order of {OLD_RELEASES}, and is read so")
    if needed and not stated and not found:
        raise ConfigError(
            f"{directory.path}: the order of the vision tower's qkv cannot be seen ({why}): add --cfg.{key} hf if it "
            f"goes back to a conversion by {OLD_RELEASES}, else --cfg.{key} interleaved"
        )
    return stated or found


def _shown_by(
    directory: MindSpeedDirectory, layout: Layout, model: Model, hf_dir: Path | None
) -> tuple[VisionOrder | None, str]:
    """The order that the weights in `hf_dir` show, or None and why they do not."""
    if hf_dir is None:
        return None, "hf_config.hf_dir is not given"
    try:
        return find_order(directory, layout, model, open_source(hf_dir).tensors), ""
    except DuetvlError as error:
        return None, f"the weights in {hf_dir} do not show it: {error}"
