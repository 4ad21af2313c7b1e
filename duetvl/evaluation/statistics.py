"""How far a score can be trusted: 95% intervals, and two runs on the same questions.

Questions that share a picture or a video are right and wrong together, so it is clusters that are drawn again, not
questions (arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

RESAMPLES: Final = 10_000
SEED: Final = 20240918
FEW: Final = 30  # clusters, below which resampling says too little
_Z: Final = 1.959963984540054  # 97.5% of the normal distribution
_CHUNK: Final = 2**22  # numbers that are held at once


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, all on the scale of the values. `method`: how the interval was found."""

    mean: float
    low: float
    high: float
    method: Literal["bootstrap", "wilson"]


@dataclass(frozen=True)
class Difference:
    """B less A on the same questions, with its 95% interval, and on how many questions B is better, worse, equal.

    chance: how probable clusters as uneven as these are, or more, were both equally good (two-sided sign test).
    """

    mean: float
    low: float
    high: float
    better: int
    worse: int
    equal: int
    chance: float


def interval(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The mean of `values` (each 0 to 1) with its 95% interval; `clusters` names for each what it shares with others.

    10,000 resamples of clusters with a fixed seed. Where there are fewer than 30 clusters, or all values are 0 or all
    are 1, it is Wilson's for as many values as there are clusters. ValueError for no values.
    """
    sums, counts = _by_cluster(values, clusters)
    mean = float(np.mean(values))
    if len(sums) < FEW or mean in (0.0, 1.0):
        return Interval(mean, *wilson(mean, len(sums)), "wilson")
    low, high = _percentiles(sums, counts)
    return Interval(mean, max(0.0, low), min(1.0, high), "bootstrap")


def difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> Difference:
    """B less A of the same questions in the same order. ValueError for none."""
    gains = np.asarray(b, float) - np.asarray(a, float)
    sums, counts = _by_cluster(gains, clusters)
    low, high = _percentiles(sums, counts)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    chance = _sign_test(int((sums > 0).sum()), int((sums < 0).sum()))
    return Difference(float(gains.mean()), low, high, better, worse, len(gains) - better - worse, chance)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` independent values."""
    spread = _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)


def _by_cluster(values: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster."""
    if not len(values):
        raise ValueError("there is no mean of no values")
    places: dict[Hashable, int] = {}
    which = [places.setdefault(cluster, len(places)) for cluster in clusters]
    return np.bincount(which, np.asarray(values, float)), np.bincount(which)


def _percentiles(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """2.5% and 97.5% of the means of resampled clusters.

    Clusters of the same sum and number cannot be told apart, so it is drawn how many of each kind there are: the same
    distribution as drawing clusters one by one, with far fewer numbers.
    """
    kinds, many = np.unique(np.stack([sums.round(12), counts], axis=1), axis=0, return_counts=True)
    total, generator = len(sums), np.random.Generator(np.random.PCG64(SEED))
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // len(kinds))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = generator.multinomial(total, many / total, size=size) @ kinds
        means[start : start + size] = drawn[:, 0] / drawn[:, 1]
    # Resampled means vary too little by a factor of (n - 1) / n, as a sample's variance does.
    centre = sums.sum() / counts.sum()
    wider = centre + (means - centre) * math.sqrt(total / max(total - 1, 1))
    low, high = np.percentile(wider, (2.5, 97.5))
    return float(low), float(high)


def _sign_test(better: int, worse: int) -> float:
    """Probability of a split at least as uneven of fair coins."""
    count, fewer = better + worse, min(better, worse)
    log_half = -count * math.log(2)
    tail = sum(
        math.exp(log_half + math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)
