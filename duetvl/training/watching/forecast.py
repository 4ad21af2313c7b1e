"""What a step was expected to take beside what steps take, said once in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Final

_FIRST: Final = 2  # steps that are not looked at: kernels are chosen and caches filled in them
_LOOKED_AT: Final = 8
_LEAST: Final = 0.05  # seconds; starting each operation takes the most of shorter steps, and is not in the cost model


class Forecast:
    """Looks at the first steps of a start."""

    def __init__(self, expected: Callable[[Sequence[Any]], float | None] | None, drafts: Callable[[], Sequence[Any]]):
        """`expected` gives the seconds of a step from drafts of some samples, or None; both are called once, when
        enough steps were made."""
        self._expected, self._drafts = expected, drafts
        self._seconds: list[float] = []
        self._seen = 0

    def after(self, step: int, costs: Mapping[str, Any]) -> str | None:
        """The line to say, after the last of the steps that are looked at."""
        self._seen += 1
        if not _FIRST < self._seen <= _FIRST + _LOOKED_AT:
            return None
        self._seconds.append(costs["step_s"] * (1 - costs["data_wait"]))
        if len(self._seconds) < _LOOKED_AT or self._expected is None:
            return None
        expected = self._expected(self._drafts())
        if expected is None or expected < _LEAST:
            return None
        measured = median(self._seconds)
        steps = f"median of steps {step - _LOOKED_AT + 1} to {step}, data apart"
        times = f"{measured / expected:.2f} times as long"
        return f"a step was expected to take {expected:.3g} s and takes {measured:.3g} s, {times} ({steps})"
