"""Dynamic loss scaling: gradients that pass through float16 are kept within its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

START = 2.0**16  # with a window of 2000, GradScaler's of torch
WINDOW = 2000
LEAST = 2.0**-10  # what overflows below it is no matter of scale


class LossScale:
    """A factor of the loss that halves where gradients overflow, and doubles after `window` updates without.

    The factor is of the step's mean loss, whatever the number of its tokens. What overflows makes no update.
    """

    def __init__(self, start: float = START, window: int = WINDOW):
        self.scale, self.window = start, window
        self.good = 0  # updates since the last change

    def update(self, norm: float) -> str | None:
        """Take note of a gradient's norm. Where it is not finite and a smaller scale may help: what was done."""
        if math.isfinite(norm):
            self.good += 1
            if self.good >= self.window:
                self.scale, self.good = self.scale * 2, 0
            return None
        if self.scale <= LEAST:
            return None
        before, self.scale, self.good = self.scale, self.scale / 2, 0
        return f"the gradient overflowed float16 at loss scale {before:g}, which is {self.scale:g} from now on"

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good": self.good}

    def restore(self, stored: Mapping[str, Any]) -> None:
        """Go on from `to_json`."""
        self.scale, self.good = float(stored["scale"]), int(stored["good"])
