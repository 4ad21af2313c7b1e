"""Choosing a token: the filters are those of transformers, the draws follow the chances, backends agree."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest

from duetvl.core.errors import ConfigError
from duetvl.inference.sampling import Chooser, Sampling, best, choose, choose_rows, filtered, logprob_of, penalised

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
    if sampling.min_p:
        steps.append(process.MinPLogitsWarper(sampling.min_p))
    ids, found = torch.from_numpy(seen)[None], torch.from_numpy(scores.astype(np.float64))[None]
    for step in steps:
        found = step(ids, found)
    return found[0].numpy()


def ours(scores: np.ndarray, seen: np.ndarray, sampling: Sampling) -> np.ndarray:
    scaled = penalised(scores, seen, sampling.repetition_penalty) / sampling.temperature
    return spread(scaled, sampling)


def spread(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Scores with what the filters take away at minus infinity."""
    ids, kept = filtered(scores, sampling)
    if ids is None:
        return kept
    assert (np.diff(ids) > 0).all()
    whole = np.full_like(scores, -np.inf)
    whole[ids] = kept
    return whole


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.05, 0.0), (12, 0.8, 0.0), (500, 0.999, 0.0),
        (0, 0.9999, 0.0), (0, 1.0, 0.05), (20, 0.95, 0.2), (0, 0.7, 1.0),
    ],
)  # fmt: skip
def test_filters_are_those_of_transformers(temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=1.3)
    for size in (5, 40, 3000):  # of the last several parts are sorted
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
    assert best(np.zeros(6), 2).tolist() == [0, 1]
    assert best(np.array([1.0, 2, 2, 1]), 3).tolist() == [0, 1, 2]
    assert best(np.array([1.0, 2]), 9).tolist() == [0, 1]
    ids, _ = filtered(np.array([0.0, 5, 1]), Sampling(temperature=1.0, top_p=1e-9))
    assert ids.tolist() == [1]


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
    ("name", "wrong", "expected"),
    [
        ("temperature", -0.1, "a number at least 0"), ("temperature", math.nan, "a number"),
        ("temperature", math.inf, "a number"), ("temperature", "hot", "a number"), ("top_k", -1, "a whole number"),
        ("top_k", 2.5, "a whole number"), ("top_p", 0.0, "above 0 and at most 1"), ("top_p", 1.1, "at most 1"),
        ("top_p", math.nan, "at most 1"), ("min_p", -0.1, "at least 0 and at most 1"), ("min_p", 1.5, "at most 1"),
        ("repetition_penalty", 0.0, "above 0"), ("repetition_penalty", math.nan, "above 0"),
        ("presence_penalty", 2.1, "at least -2 and at most 2"), ("frequency_penalty", -3, "at least -2"),
        ("seed", -1, "a whole number"), ("seed", 2**64, "a whole number"), ("seed", True, "a whole number"),
        ("logit_bias", {-1: 1.0}, "is not a token id"), ("logit_bias", {3: 101.0}, "of token 3 is 101.0"),
        ("logit_bias", {3: math.nan}, "of token 3"), ("logit_bias", [3], "numbers by token id"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(name, wrong, expected):
    with pytest.raises(ConfigError, match=f"^{name}.*{expected}"):
        Sampling(**{name: wrong})


def test_a_bias_on_a_token_that_is_none():
    Sampling(logit_bias={9: 1.0}).check_tokens(10)
    with pytest.raises(ConfigError, match="token 10 is not one of the model's 10"):
        Sampling(logit_bias={10: 1.0}).check_tokens(10)


# -- one answer after its request -------------------------------------------------------------------------------------


def answer(logits: np.ndarray, steps: int, sampling: Sampling, prompt=NOTHING, **options) -> list[int]:
    chooser = Chooser(sampling, prompt, **options)
    return [chooser.choose(logits).token for _ in range(steps)]


def test_which_tokens_penalties_count():
    """Repetition: of prompt and answer. Presence and frequency: of the answer alone, once, or for each time."""
    scores = np.array([1.0, 0.9, 0.8, 0.0])
    prompt = np.array([0, 0, 1])
    assert answer(scores, 4, Sampling(repetition_penalty=1.2), prompt) == [0, 0, 0, 0]  # 0.833, 0.75, 0.8 -> 0.667
    assert answer(scores, 3, Sampling(repetition_penalty=1.3), prompt) == [2, 0, 0]
    assert answer(scores, 4, Sampling(presence_penalty=0.15), prompt) == [0, 1, 0, 0]
    assert answer(scores, 4, Sampling(frequency_penalty=0.15), prompt) == [0, 1, 0, 2]
    assert answer(scores, 2, Sampling(presence_penalty=-2.0), prompt) == [0, 0]


def test_bias_comes_before_the_repetition_penalty():
    scores = np.array([2.0, 1.0])
    assert answer(scores, 1, Sampling(logit_bias={1: 1.5})) == [1]
    assert answer(scores, 1, Sampling(logit_bias={1: 1.5}, repetition_penalty=1.3), np.array([1])) == [0]  # 2.5 / 1.3
    assert answer(scores, 3, Sampling(temperature=1.0, logit_bias={0: -100.0})) == [1, 1, 1]


def test_an_end_waits_for_min_tokens():
    scores = np.array([1.0, 3.0, 2.0])
    chooser = Chooser(Sampling(), NOTHING, ends=[1, 2], min_tokens=2)
    assert not chooser.takes_the_largest
    assert [chooser.choose(scores).token for _ in range(2)] == [0, 0]
    assert chooser.takes_the_largest and chooser.choose(scores).token == 1
    alone = Chooser(Sampling(), NOTHING, ends=[1], min_tokens=2)  # a grammar that is complete allows its end alone
    assert alone.choose(scores, np.array([False, True, False])).token == 1


def test_logprobs_are_of_the_model_s_own_distribution():
    """Before temperature, penalties and bias; the alternatives best first, equal ones by their place."""
    scores = np.array([0.5, 2.0, 2.0, -1.0])
    expected = scores - np.log(np.exp(scores).sum())
    sampling = Sampling(temperature=0.1, logit_bias={3: 100.0}, repetition_penalty=2.0)
    chosen = Chooser(sampling, np.array([1, 3]), logprobs=3).choose(scores)
    assert chosen.token == 3 and chosen.logprob is not None
    assert chosen.logprob.token == 3 and chosen.logprob.logprob == pytest.approx(expected[3], rel=1e-12)
    assert [token for token, _ in chosen.logprob.top] == [1, 2, 0]
    np.testing.assert_allclose([value for _, value in chosen.logprob.top], expected[[1, 2, 0]], rtol=1e-12)
    assert logprob_of(scores, 0, 0).top == ()
    with pytest.raises(ConfigError, match="logprobs is 21, expected a whole number from 0 to 20"):
        Chooser(Sampling(), NOTHING, logprobs=21)
    assert answer(scores, 1, Sampling(temperature=0.1, logit_bias={3: 100.0}, repetition_penalty=2.0)) == [3]


def test_choices_of_one_request_draw_apart():
    scores = RNG.standard_normal(50)
    sampling = Sampling(temperature=1.0, seed=3)
    found = [answer(scores, 20, sampling, choice=choice) for choice in range(4)]
    assert len(set(map(tuple, found))) == 4
    assert found[0] == [choose(scores, NOTHING, sampling, "sequence 0", step) for step in range(20)]


def test_a_very_small_temperature_is_greedy():
    scores = np.array([3.0, 3.0 + 1e-9, -700.0])
    assert answer(scores, 5, Sampling(temperature=1e-300)) == [1] * 5
    assert answer(scores, 5, Sampling(temperature=1e-300, top_k=2, top_p=0.5, min_p=0.1)) == [1] * 5


def test_a_pass_of_many_sequences(be):
    """Each row as alone, in any mixture and order; those that are not finite are None, and no other row is touched."""
    kinds = [
        Sampling(),
        Sampling(temperature=0.8, seed=1),
        Sampling(),
        Sampling(repetition_penalty=1.4),
        *[Sampling()] * 2,
    ]
    logits = RNG.standard_normal((6, 40)).astype(np.float32)
    logits[2, 7] = np.nan

    def made() -> list[Chooser]:
        return [
            Chooser(kind, np.arange(5), ends=[int(row.argmax())], min_tokens=least, logprobs=logprobs)
            for kind, row, least, logprobs in zip(
                kinds, logits, [0, 0, 0, 0, 3, 0], [None, None, None, 2, None, None], strict=True
            )
        ]

    mask = np.arange(40) % 2 == 0
    masks = [None, None, None, None, None, mask]
    alone = [
        None if number == 2 else chooser.choose(logits[number], masks[number]) for number, chooser in enumerate(made())
    ]
    tensor = be.ops.from_numpy(logits)
    assert choose_rows(be.ops, tensor, made(), masks) == alone
    order = [5, 2, 0, 4, 1, 3]
    mixed = [made()[i] for i in order]
    assert choose_rows(be.ops, be.ops.from_numpy(logits[order]), mixed, [masks[i] for i in order]) == [
        alone[i] for i in order
    ]
    assert [chooser.step for chooser in mixed] == [1, 0, 1, 1, 1, 1]
    plain = [Chooser(Sampling(), NOTHING) for _ in range(2)]
    found = choose_rows(be.ops, be.ops.from_numpy(logits[:2]), plain)
    assert [chosen.token for chosen in found] == logits[:2].argmax(axis=1).tolist()
