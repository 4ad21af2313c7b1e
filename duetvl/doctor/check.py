"""A line of the full examination, and how far a number may be from the one it should be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

HALF_GAP = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half of the gap between neighbours, as a share
FLOAT32 = 2e-5


@dataclass(frozen=True)
class Check:
    """difference and allowed: of the largest number of the reference. figure: a measurement, which cannot fail."""

    part: str
    name: str
    passed: bool
    difference: float | None = None
    allowed: float | None = None
    figure: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is written into the report; numbers that JSON has no word for are left out."""
        entry = asdict(self)
        if self.difference is not None and not np.isfinite(self.difference):
            entry["difference"] = None
        return entry

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Check:
        """What `to_json` gave."""
        lost = entry["difference"] is None and entry["allowed"] is not None
        return cls(**{**entry, "difference": float("inf") if lost else entry["difference"]})

    def line(self) -> str:
        """A row of the table."""
        if self.difference is not None and self.allowed is not None:
            middle = f"{self.difference:.1e} of {self.allowed:.1e}"
        else:
            middle = self.figure
        verdict = ("" if self.figure else "ok") if self.passed else "FAILED"
        return f"  {self.part:12}{self.name:44}{middle:22}{verdict:8}{self.detail}".rstrip()


def compared(
    part: str, name: str, pairs: list[tuple[np.ndarray, np.ndarray]], allowed: float, detail: str = ""
) -> Check:
    """The worst of some results against their references."""
    worst = max(difference(ours, expected) for ours, expected in pairs)
    return Check(part, name, bool(worst <= allowed), worst, allowed, detail=detail)


def difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the reference's largest magnitude.

    inf where the shapes differ, or where a number is not finite and the reference's is.
    """
    if ours.shape != expected.shape:
        return float("inf")
    infinite = np.isinf(expected)
    if (ours[infinite] != expected[infinite]).any():
        return float("inf")
    ours, expected = (np.asarray(x, np.float64)[~infinite] for x in (ours, expected))
    if not expected.size:
        return 0.0
    share = float(np.abs(ours - expected).max() / (np.abs(expected).max() or 1.0))
    return share if np.isfinite(share) else float("inf")


def tolerance(dtype: str, roundings: float) -> float:
    """Allowed in a dtype where a half type rounds so often."""
    return FLOAT32 if dtype == "float32" else roundings * HALF_GAP[dtype]
