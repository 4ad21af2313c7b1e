"""Choosing a token: the filters are those of transformers, the draws follow the chances, backends agree."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

from duetvl.core.errors import ConfigError
from duetvl.inference.sampling import Sampling, choose, penalised, truncated

RNG = np.random.default_rng(5)
NOTHING = np.zeros(0, np.int64)


def warped(scores: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Scores after the processors of transformers' generate, in its order and in float64."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)] if len(seen) else []
    steps.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(process.TopPLogitsWarper(sampling.top_p))
    ids, found = torch.from_numpy(seen)[None], torch.from_numpy(scores.astype(np.float64))[None]
    for step in steps:
        found = step(ids, found)
    return found[0].numpy()


def ours(scores: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    scaled = penalised(scores, seen, sampling.repetition_penalty) / sampling.temperature
    return truncated(scaled, sampling.top_k, sampling.top_p)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.9), (0, 0.05), (12, 0.8), (500, 0.999)]
)
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1.3)
    for size in (5, 40, 1000):
        scores, seen = RNG.standard_normal(size) * 3, RNG.integers(0, size, 9)
        expected, found = warped(scores, seen, sampling), ours(scores, seen, sampling)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty):
    """Repeated tokens are penalised once; positive scores are divided, negative ones multiplied."""
    scores, seen = RNG.standard_normal(30), np.array([3, 3, 7, 29, 0, 7])
    found = penalised(scores, seen, penalty)
    np.testing.assert_allclose(found, warped(scores, seen, Sampling(1.0, repetition_penalty=penalty)), rtol=1e-15)
    assert (found != scores).sum() == (0 if penalty == 1.0 else 4)
    assert scores.base is None and penalised(scores, NOTHING, penalty) is scores


def test_equal_scores_are_kept_by_their_place():
    """Exactly k of them: transformers keeps every token that ties with the last."""
    assert np.flatnonzero(np.isfinite(truncated(np.zeros(6), 2, 1.0))).tolist() == [0, 1]
    assert np.flatnonzero(np.isfinite(truncated(np.array([1.0, 2, 2, 1]), 3, 1.0))).tolist() == [0, 1, 2]
    assert np.flatnonzero(np.isfinite(truncated(np.array([0.0, 5, 1]), 0, 1e-9))).tolist() == [1]


def draws(scores: np.ndarray, sampling: Sampling, count: int = 4000) -> np.ndarray:
    found = [choose(scores, NOTHING, sampling, "sequence 0", step) for step in range(count)]
    return np.bincount(found, minlength=len(scores))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.7}],
)
def test_draws_follow_the_chances(options):
    """Chi-squared at a fixed seed, against the chances that transformers' filters leave."""
    scores = np.linspace(-1.5, 1.5, 8)[[3, 0, 7, 2, 5, 1, 6, 4]]
    kept = warped(scores, NOTHING, Sampling(**options))
    chances = np.exp(kept - kept.max())
    expected = chances / chances.sum()
    counts = draws(scores, Sampling(**options, seed=11))
    possible = expected > 0
    assert not counts[~possible].any()
    wanted = expected[possible] * counts.sum()
    statistic = ((counts[possible] - wanted) ** 2 / wanted).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_the_draw_is_fixed_by_seed_sequence_and_step():
    scores = RNG.standard_normal(50)

    def drawn(seed=0, name="sequence 0", steps=range(40)):
        return [choose(scores, NOTHING, Sampling(temperature=1.0, seed=seed), name, step) for step in steps]

    assert drawn() == drawn()
    assert drawn(steps=range(39, -1, -1))[::-1] == drawn()
    assert len({tuple(drawn(seed, name)) for seed in range(3) for name in ("sequence 0", "sequence 1")}) == 6


def test_greedy_is_the_largest_after_the_penalty():
    scores = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert choose(scores, NOTHING, Sampling(), "", 0) == 1
    assert choose(scores, np.array([1]), Sampling(repetition_penalty=1.5), "", 0) == 2
    assert choose(scores, np.array([0, 1, 2, 3]), Sampling(repetition_penalty=1.5), "", 0) == 1


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2.5-untied"])
def test_both_backends_draw_the_same(tiny, name):
    import duetvl

    pytest.importorskip("mindspore")
    prompts = [oracle.sample(9, seed=31), oracle.sample(3, oracle.Image((1, 10, 12)), 6, seed=32)]
    sampling = duetvl.Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=7)

    def drawn(backend: str, sampling, chosen=prompts):
        model = tiny.ours(name, duetvl.load_backend(backend, device="cpu"))
        return [answer.token_ids for answer in model.generate_many(chosen, max_new_tokens=12, sampling=sampling)]

    found = drawn("torch_npu", sampling)
    assert found == drawn("mindspore", sampling)
    assert found[0] == drawn("torch_npu", sampling, prompts[:1])[0]
    others = [duetvl.Sampling(temperature=0.9, seed=8), duetvl.Sampling()]
    assert all(drawn("torch_npu", other) != found for other in others)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": 1.1}, {"top_p": math.nan}, {"repetition_penalty": 0.0}, {"repetition_penalty": math.nan},
        {"seed": -1},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=r"temperature, top_k and seed are at least 0, top_p in \(0, 1\]"):
        Sampling(**wrong)
