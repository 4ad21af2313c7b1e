"""Published scores of the models, and how far ours may be from them.

The numbers are those of the models' own cards (accessed in November 2026), but for those that are marked as unchecked:
they come from other publications that were not read here. For Video-Bench none is published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_NAME: Final = re.compile(r"qwen(2(?:\.5)?)[-_]vl[-_](\d+b)(?:[-_]instruct)?", re.IGNORECASE)


@dataclass(frozen=True)
class Published:
    """A published score, in percent, of `model` on `split`.

    group: which of our scores it stands beside, as (field, value) of `Question.groups`; None for the whole. warning:
    why the two must not be compared without a word; empty where the split is the same. expect: what difference is to
    be expected, and why. checked: whether it was read at its source.
    """

    model: str
    score: float
    split: str
    checked: bool
    group: tuple[str, str] | None = None
    warning: str = ""
    expect: str = ""


@dataclass(frozen=True)
class _Benchmark:
    """A benchmark's published scores, one a model of `_MODELS`, and what is said of them; `~`: unchecked, `-`: none."""

    split: str
    scores: str
    group: tuple[str, str] | None = None
    warning: str = ""
    expect: str = ""


_MODELS: Final = (
    "Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2-VL-72B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen2.5-VL-32B", "Qwen2.5-VL-72B",
)  # fmt: skip
_A_BUG: Final = "A score more than 2 points below it points to an error in prompts, pixels or weights."
_BENCHMARKS: Final = {
    "mmmu_dev_val": _Benchmark(
        split="validation",
        scores="41.1 54.1 64.5 53.1 58.6 70.0 70.2",
        group=("split", "validation"),
        expect="Others are 2 to 10 points below: 50.6 and 51.2 for the 54.1 of Qwen2-VL-7B, 48 to 51.3 for the 58.6 of "
        "Qwen2.5-VL-7B, 50.7 for the 53.1 of Qwen2.5-VL-3B. How answers are read alone moves it by points: one model's "
        "answers were worth 50.7 by one tool and 54.8 by another, which has a judge.",
    ),
    "docvqa_val": _Benchmark(
        split="test",
        scores="90.1 94.5 96.5 93.9 95.7 ~94.8 96.4",
        warning="published is the score of DocVQA's test, whose answers are on a server; this is its validation",
        expect="Test and validation are a few tenths of a point apart.",
    ),
    "chartqa_test": _Benchmark(
        split="test",
        scores="73.5 83.0 88.3 ~84.0 87.3 - ~89.5",
        expect=f"{_A_BUG} Others have seen 8.7 from a wrong prompt and padding.",
    ),
    "textvqa_val": _Benchmark(split="val", scores="79.7 84.3 85.5 79.3 84.9 - ~83.5", expect=_A_BUG),
    "ai2d_test": _Benchmark(
        split="test",
        scores="~74.7 ~83.0 ~88.1 81.6 83.9 - ~88.7",
        expect=f"{_A_BUG} Others have measured 80.5 for the 81.6 of Qwen2.5-VL-3B.",
    ),
}


def published(model: str, task: str) -> Published | None:
    """The published score of a task for a model, by its name or the path of its directory; None where there is none.

    A name that says more than the model's size (`...-7B-Instruct-receipts`) is that of another model.
    """
    name, benchmark = _NAME.fullmatch(re.split(r"[/\\:]", model.rstrip("/\\"))[-1]), _BENCHMARKS.get(task)
    if name is None or benchmark is None:
        return None
    model = f"Qwen{name[1]}-VL-{name[2].upper()}"
    score = dict(zip(_MODELS, benchmark.scores.split(), strict=True)).get(model, "-")
    if score == "-":
        return None
    return Published(
        model=model,
        score=float(score.lstrip("~")),
        split=benchmark.split,
        checked=not score.startswith("~"),
        group=benchmark.group,
        warning=benchmark.warning,
        expect=benchmark.expect,
    )
