"""How far a backend may be from the float64 reference, and why: the one table of the suite.

A number is the largest absolute difference allowed, divided by the largest magnitude in the reference, for the
result and for every gradient. Entries are four times what was measured on both backends on CPU, rounded up; print
what is measured with `DUETVL_SHOW_ERRORS=1 pytest tests/conformance -k test_ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # half of the gap between neighbours


class Tolerance(NamedTuple):
    """float32: a number; the half precisions: roundings of the result that are allowed, see HALF."""

    float32: float
    roundings: float
    why: str

    def of(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.roundings * HALF[dtype]


EXACT = Tolerance(0.0, 0.0, "moves numbers and computes nothing")

FUNCTION = "one rounding, and the last bits of the framework's own approximation"
SUMS = "rounding in float32 sums; over the first axis MindSpore adds row after row"

TOLERANCES: dict[str, Tolerance] = {
    "exp": Tolerance(4.5e-6, 5, FUNCTION + "; MindSpore's vector exp is 10 units off at arguments of 6"),
    "log": Tolerance(1.5e-6, 4, FUNCTION),
    "rsqrt": Tolerance(8e-7, 15, FUNCTION + "; torch's gradient cubes a rounded result"),
    "sigmoid": Tolerance(3e-6, 18, FUNCTION + "; the gradient is s (1 - s) of a rounded s"),
    "silu": Tolerance(8e-7, 6, FUNCTION),
    "gelu": Tolerance(1.5e-6, 6, FUNCTION),
    "quick_gelu": Tolerance(1.2e-6, 10, "composed of two functions, each rounded"),
    "swiglu": Tolerance(6e-7, 7, "composed of two functions, each rounded"),
    "where": EXACT,
    "add": Tolerance(6e-7, 4, "one rounding; the gradient of a broadcast is a sum"),
    "subtract": Tolerance(6e-7, 4, "one rounding; the gradient of a broadcast is a sum"),
    "multiply": Tolerance(3e-7, 4, "one rounding; the gradient of a broadcast is a sum"),
    "divide": Tolerance(5e-7, 6, "one rounding; the gradient of a broadcast is a sum of quotients"),
    "negative": EXACT,
    "compare": EXACT,
    "slice": EXACT,
    "sum": Tolerance(3e-6, 4, SUMS),
    "mean": Tolerance(4e-7, 3, SUMS),
    "max": EXACT,
    "argmax": EXACT,
    "reshape": EXACT,
    "transpose": EXACT,
    "broadcast_to": Tolerance(3.5e-7, 3, "its gradient is a sum"),
    "concat": EXACT,
    "split": EXACT,
    "matmul": Tolerance(1.7e-6, 4, SUMS + "; up to 4096 terms"),
    "linear": Tolerance(6e-7, 4, SUMS),
    "take_rows": Tolerance(1.1e-6, 4, "its gradient is a sum over repeated rows"),
    "scatter_rows": EXACT,
    "gather_last": EXACT,
    "add_at_last": Tolerance(1e-7, 3, "one rounding"),
    "rms_norm": Tolerance(8e-7, 3, "computed in float32 and rounded once"),
    "layer_norm": Tolerance(7e-7, 6, "computed in float32 and rounded once; torch sums the scale's gradient in halves"),
    "rope": Tolerance(3e-7, 4, "computed in float32 and rounded once"),
    "dropout": Tolerance(2e-7, 1, "one division, rounded once"),
    "low_rank_row_norms": Tolerance(2e-6, 1, SUMS),
    "attention": Tolerance(8e-6, 9, "the gradient is built on the rounded output"),
    "linear_cross_entropy": Tolerance(4e-6, 0.5, "a share of the logits' size, which is where the rounding is"),
    "linear_logprobs": Tolerance(3.5e-6, 0.5, "a share of the logits' size, which is where the rounding is"),
    "linear_logprobs_grad": Tolerance(8.5e-6, 14, "gradients of logits are rounded before the products"),
}


def error(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the reference's largest magnitude; inf where ours is not finite."""
    assert ours.shape == expected.shape, f"shape {ours.shape}, not {expected.shape}"
    infinite = np.isinf(expected)
    if (ours[infinite] != expected[infinite]).any():
        return float("inf")
    ours, expected = ours[~infinite], expected[~infinite]
    if not expected.size:
        return 0.0
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(expected, np.float64)).max()
    return float(difference / (np.abs(expected).max() or 1.0)) if np.isfinite(difference) else float("inf")


MEASURED: dict[tuple[str, str, str], float] = {}


def complaint(
    op: str, dtype: str, backend: str, what: str, ours: np.ndarray, expected: np.ndarray, times: float
) -> str:
    """Empty where `ours` is within `times` the tolerance of `expected`."""
    found, allowed = error(ours, expected), TOLERANCES[op].of(dtype) * max(1.0, times)
    key = (op, dtype, backend)
    MEASURED[key] = max(MEASURED.get(key, 0.0), found / max(1.0, times))
    return "" if found <= allowed else f"{dtype} {what}: off by {found:.2e} of the largest, allowed {allowed:.2e}"
