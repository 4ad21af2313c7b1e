"""DPO against the papers' formulas in plain torch, float64, by its own differentiation."""

from __future__ import annotations

from functools import partial

import numpy as np
import oracle
import pytest
from oracle import PAIRS

from duetvl.core.batch import IGNORE, Batch
from duetvl.data.loading.loader import Step
from duetvl.models.qwen_vl.loading import load_model
from duetvl.parallel.passes import InOrder
from duetvl.training.preference.dpo import (
    LOGGED,
    PreferenceLoss,
    PreferenceObjective,
    pairs,
    reference_of,
    softplus,
    trained_counts,
)
from duetvl.training.recipe.sections import DpoSection, OptimSection
from duetvl.training.step import Trainer

COUNTS = (3, 5, 4, 1, 2, 6)  # trained tokens of three pairs' answers
SETTINGS = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.2},
    {"loss": "sigmoid", "pref_ftx": 0.7},
    {"loss": "hinge", "beta": 0.3},
    {"loss": "ipo"},
    {"loss": "ipo", "beta": 0.4, "pref_ftx": 0.3},
    {"loss": "ipo_sum", "beta": 0.2},
]


def batch_of(counts) -> Batch:
    """Sequences with a prompt of two tokens each, of which nothing is trained."""
    targets = np.concatenate([[IGNORE, *range(count), IGNORE] for count in counts]).astype(np.int32)
    nothing = np.zeros(0, np.int32)
    return Batch(
        input_ids=np.zeros(len(targets), np.int32),
        position_ids=np.zeros((3, len(targets)), np.int32),
        cu_seqlens=np.cumsum([0, *(count + 2 for count in counts)]).astype(np.int32),
        targets=targets,
        pixel_rows=np.zeros((0, 4), np.float32),
        grids=np.zeros((0, 3), np.int64),
        visual_dst=nothing,
        visual_src=nothing,
    )


def numbers(seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of all tokens under the policy and under the reference."""
    rng = np.random.default_rng(seed)
    return tuple((-scale * rng.exponential(size=sum(COUNTS))).astype(np.float32) for _ in range(2))


def formulas(torch, policy, reference, *, loss, beta=0.1, label_smoothing=0.0, pref_ftx=0.0):
    """Mean over pairs of the loss, and of what is logged; from lists of log-probabilities, one an answer."""
    average = (lambda x: x.mean()) if loss == "ipo" else (lambda x: x.sum())
    losses, logged = [], {name: [] for name in LOGGED}
    for (pi_c, pi_r), (ref_c, ref_r) in zip(policy, reference, strict=True):
        h = (average(pi_c) - average(pi_r)) - (average(ref_c) - average(ref_r))
        log_sigmoid = torch.nn.functional.logsigmoid
        value = {
            "sigmoid": -(1 - label_smoothing) * log_sigmoid(beta * h) - label_smoothing * log_sigmoid(-beta * h),
            "hinge": torch.relu(1 - beta * h),
            "ipo": (h - 1 / (2 * beta)) ** 2,
            "ipo_sum": (h - 1 / (2 * beta)) ** 2,
        }[loss]
        losses.append(value - pref_ftx * pi_c.mean())
        rewards = [beta * (average(pi) - average(ref)) for pi, ref in ((pi_c, ref_c), (pi_r, ref_r))]
        found = [*rewards, rewards[0] - rewards[1], (rewards[0] > rewards[1]).double(), average(pi_c), average(pi_r)]
        for name, number in zip(LOGGED, found, strict=True):
            logged[name].append(float(number.detach()))
    return torch.stack(losses).mean(), {name: np.mean(values) for name, values in logged.items()}


def by_pair(torch, x):
    parts = torch.split(x, COUNTS)
    return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("scale", [1.0, 40.0], ids=["near", "far"])
def test_losses_gradients_and_rewards_are_those_of_the_formulas(be, settings, scale):
    torch = pytest.importorskip("torch")
    policy, reference = numbers(3, scale)
    leaf = torch.tensor(policy.astype(np.float64), requires_grad=True)
    wide = torch.tensor(reference.astype(np.float64))
    expected, expected_logged = formulas(torch, by_pair(torch, leaf), by_pair(torch, wide), **settings)
    expected.backward()

    ops, batch, logged = be.ops, batch_of(COUNTS), {}
    loss = PreferenceLoss(DpoSection(**settings), be)
    sums = ops.from_numpy(np.array([part.sum() for part in np.split(reference, np.cumsum(COUNTS)[:-1])], np.float32))

    def total(logprobs):
        value, found = loss(batch, logprobs, sums)
        logged.update(found)
        return value

    value, (gradient,) = be.autograd.value_and_grad(total, [ops.from_numpy(policy)])
    assert pairs(batch) == 3
    assert float(be.to_numpy(value)) / 3 == pytest.approx(float(expected.detach()), rel=3e-6)
    largest = float(leaf.grad.abs().max())
    np.testing.assert_allclose(be.to_numpy(gradient) / 3, leaf.grad.numpy(), rtol=1e-5, atol=1e-6 * largest)
    assert logged.keys() == expected_logged.keys()
    for name, number in expected_logged.items():
        assert float(be.to_numpy(logged[name])) / 3 == pytest.approx(number, rel=1e-5, abs=1e-6 * scale), name


def test_at_the_reference_itself(be):
    """Where training starts: log 2, and half of beta as the gradient, up for chosen tokens and down for the others."""
    ops, batch = be.ops, batch_of(COUNTS)
    policy, _ = numbers(1)
    sums = ops.from_numpy(np.array([part.sum() for part in np.split(policy, np.cumsum(COUNTS)[:-1])], np.float32))
    loss = PreferenceLoss(DpoSection(), be)
    value, (gradient,) = be.autograd.value_and_grad(lambda x: loss(batch, x, sums)[0], [ops.from_numpy(policy)])
    assert float(be.to_numpy(value)) == pytest.approx(3 * np.log(2), rel=1e-6)
    signs = np.repeat([-1.0, 1.0] * 3, COUNTS)
    np.testing.assert_allclose(be.to_numpy(gradient), 0.05 * signs, rtol=1e-5)


def test_softplus_is_safe(be):
    """Far out the naive log(1 + exp(x)) is infinite, and its gradient not a number."""
    x = np.array([-200.0, -30.0, -1.0, 0.0, 1.0, 30.0, 200.0], np.float32)
    value, (gradient,) = be.autograd.value_and_grad(lambda t: be.ops.sum(softplus(be.ops, t)), [be.ops.from_numpy(x)])
    wide = x.astype(np.float64)
    assert float(be.to_numpy(value)) == pytest.approx(np.logaddexp(0, wide).sum(), rel=1e-6)
    # Measured on x86: 8e-6 off on MindSpore, whose exp is that much off, and 1e-7 on torch.
    np.testing.assert_allclose(be.to_numpy(gradient), 1 / (1 + np.exp(-wide)), rtol=1e-5, atol=1e-37)


def test_an_answer_without_a_trained_token_counts_as_nothing(be):
    batch = batch_of((2, 0))
    assert trained_counts(batch).tolist() == [2, 0]
    loss = PreferenceLoss(DpoSection(loss="ipo", beta=0.5), be)
    ops = be.ops
    value, logged = loss(batch, ops.from_numpy(np.float32([-1, -3])), ops.from_numpy(np.float32([-4, 0])))
    assert float(be.to_numpy(value)) == pytest.approx((-2 + 2 - 1) ** 2)
    assert float(be.to_numpy(logged["logps/rejected"])) == 0.0


# -- a model and its reference ----------------------------------------------------------------------------------------

OPTIM = OptimSection(lr=3e-3, clip=None)


def steps_of(tiny, be, name, batches, count, **settings) -> tuple[list, dict[str, np.ndarray]]:
    """Results of some steps from the model's weights against those as the reference, and the weights after them."""
    model = load_model(tiny.directory(name), backend=be)
    objective, reference = (
        PreferenceObjective(DpoSection(**settings), be),
        reference_of(InOrder(tiny.ours(name, be), be), be.ops),
    )
    trainer = Trainer(model, objective, be, OPTIM, reference=reference)
    work = Step(tuple(model.pack(given) for given in batches), ())
    results = [trainer.step(work, 3e-3) for _ in range(count)]
    return results, {path: np.array(be.to_numpy(p.tensor)) for path, p in model.parameters.items()}


def test_the_split_into_micro_batches_changes_nothing(tiny, be):
    """Three steps of four pairs in one, two and four micro-batches."""
    given = [*PAIRS.values(), oracle.pair(5, oracle.Image((1, 8, 4)), 2, seed=31, name="another")]
    settings = {"loss": "sigmoid", "beta": 0.3, "pref_ftx": 0.2}
    found = [
        steps_of(tiny, be, "qwen2.5-tied", batches, 3, **settings)
        for batches in ([given], [given[:1], given[1:]], [[one] for one in given])
    ]
    whole, weights = found[0]
    for results, after in found[1:]:
        for ours, expected in zip(results, whole, strict=True):
            assert ours.loss == pytest.approx(expected.loss, rel=2e-5)
            assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            for key in LOGGED:
                assert ours.values[key] == pytest.approx(expected.values[key], rel=1e-4, abs=1e-4), key
        worst = max(np.abs(after[path] - values).max() for path, values in weights.items())
        assert worst < 0.02 * 3 * OPTIM.lr  # AdamW's first steps are signs: a gradient that is rounding may turn


@pytest.mark.parametrize("settings", [{"loss": loss} for loss in ("sigmoid", "hinge", "ipo", "ipo_sum")], ids=str)
def test_training_widens_the_margin(tiny, be, settings):
    results, _ = steps_of(tiny, be, "qwen2-tied", [list(PAIRS.values())], 8, **settings)
    first, last = results[0], results[-1]
    assert first.values["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert last.loss < first.loss
    assert last.values["rewards/margins"] > 0.05
    assert last.values["rewards/accuracies"] == 1.0
    assert last.values["logps/chosen"] - last.values["logps/rejected"] > (
        first.values["logps/chosen"] - first.values["logps/rejected"]
    )
    assert first.grad_norm > 0


def test_loss_of_a_step_is_that_of_transformers_log_probabilities(tiny, be):
    """The whole chain: pairs, the tower once, answer tokens alone, sums, the papers' formula; policy and reference
    are two different models."""
    torch = pytest.importorskip("torch")
    given = list(PAIRS.values())
    policy, reference = "qwen2.5-tied", "qwen2.5-untied"

    def answers(name):
        rows = []
        for sample in (sample for one in given for sample in oracle.copies(one)):
            logps = torch.log_softmax(torch.tensor(oracle.logits(tiny.theirs(name), sample)).double(), -1)
            at = np.flatnonzero(sample.labels[1:] != IGNORE)
            rows.append(logps[at, sample.labels[1:][at]])
        return list(zip(rows[::2], rows[1::2], strict=True))

    settings = {"loss": "sigmoid", "beta": 0.2, "label_smoothing": 0.1, "pref_ftx": 0.5}
    expected, logged = formulas(torch, answers(policy), answers(reference), **settings)
    model = tiny.ours(policy, be)
    objective = PreferenceObjective(DpoSection(**settings), be)
    batch = model.pack(given)
    (sums,) = reference_of(InOrder(tiny.ours(reference, be), be), be.ops)([batch])
    last = partial(objective.loss, prepared=objective.prepare(batch, sums))
    assert objective.weight(batch) == 3
    assert objective.logged == LOGGED
    for outputs in (model.evaluate(batch, last), model.forward(batch, last)[0]):
        loss, *values = (float(be.to_numpy(x)) / 3 for x in outputs)
        assert loss == pytest.approx(float(expected), rel=1e-5)
        for name, number in logged.items():
            assert values[LOGGED.index(name)] == pytest.approx(number, rel=1e-5, abs=2e-4), name
