"""The arithmetic of one step, on both backends, against a few lines of numpy-fed torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bag_model import BagModel, encode, write_records

from duetvl.core.batch import IGNORE, Sample
from duetvl.data.loading.loader import Step
from duetvl.data.loading.packing import pack
from duetvl.data.sources.catalog import Records
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.step import NonFiniteError, Trainer

OPTIM = OptimSection(lr=0.05, weight_decay=0.1, clip=0.5, betas=(0.9, 0.95))


def step_of(model, tmp_path, pack_tokens: int) -> Step:
    records = Records([write_records(tmp_path / "a.jsonl", 12)])
    samples = [encode(record) for record in records]
    packs = pack([len(sample) for sample in samples], pack_tokens)
    batches = tuple(model.pack([samples[i] for i in members]) for members in packs)
    return Step(batches, tuple(sample.id for sample in samples), {})


def weights(model) -> dict[str, np.ndarray]:
    return {path: np.array(model.backend.to_numpy(p.tensor)) for path, p in model.parameters.items()}


def test_the_split_into_micro_batches_changes_nothing(be, tmp_path):
    found = []
    for pack_tokens in (12, 50, 1000):
        model = BagModel(be)
        trainer, work = Trainer(model, TokenLoss(be.ops), be, OPTIM), step_of(model, tmp_path, pack_tokens)
        results = [trainer.step(work, 0.05) for _ in range(3)]
        found.append((len(work.batches), results, weights(model)))
    assert [count for count, _, _ in found][-1] == 1 < found[1][0] < found[0][0]
    for _, results, after in found[:2]:
        for ours, whole in zip(results, found[2][1], strict=True):
            assert ours.loss == pytest.approx(whole.loss, rel=1e-6)
            assert ours.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        for path, values in after.items():
            np.testing.assert_allclose(values, found[2][2][path], atol=2e-6)


def test_same_as_plain_torch(be, tmp_path):
    """Token-mean loss, clipping by the global norm, AdamW, decay of matrices only."""
    torch = pytest.importorskip("torch")
    model = BagModel(be)
    work = step_of(model, tmp_path, 40)
    start = {path: torch.tensor(values, requires_grad=True) for path, values in weights(model).items()}
    samples = [encode(record) for record in Records([tmp_path / "a.jsonl"])]
    groups = [
        {"params": [start["embed.weight"], start["head.weight"]], "weight_decay": 0.1},
        {"params": [start["norm.weight"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95))
    trainer = Trainer(model, TokenLoss(be.ops), be, OPTIM)
    for _ in range(4):
        optimizer.zero_grad()
        losses = [token for sample in samples for token in plain_losses(torch, start, sample)]
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(start.values()), 0.5)
        optimizer.step()
        result = trainer.step(work, 0.05)
        assert result.loss == pytest.approx(float(loss.detach()), rel=2e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=2e-4)
        assert float(norm) > 0.5, "clipping must have been at work"
    for path, values in weights(model).items():
        np.testing.assert_allclose(values, start[path].detach().numpy(), atol=3e-5)


def plain_losses(torch, w, sample):
    word = w["embed.weight"][torch.tensor(sample.input_ids)]
    x = word + word.mean(0, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w["norm.weight"]
    log_p = torch.log_softmax(x @ w["head.weight"].T, -1)
    return [-log_p[i, label] for i, label in enumerate(sample.labels[1:]) if label != IGNORE]


def test_frozen_parameters_stay(be, tmp_path):
    model = BagModel(be)
    model.parameters["embed.weight"].trainable = False
    before = weights(model)
    Trainer(model, TokenLoss(be.ops), be, OPTIM).step(step_of(model, tmp_path, 100), 0.05)
    after = weights(model)
    assert (before["embed.weight"] == after["embed.weight"]).all()
    assert (before["head.weight"] != after["head.weight"]).any()


def test_evaluation_is_the_mean_over_tokens(be, tmp_path):
    model = BagModel(be)
    trainer = Trainer(model, TokenLoss(be.ops), be, OPTIM)
    small, large = step_of(model, tmp_path, 12), step_of(model, tmp_path, 1000)
    found = trainer.evaluate(small.batches)
    assert found.tokens == large.trained_tokens
    assert found.loss == pytest.approx(trainer.evaluate(large.batches).loss, rel=1e-6)
    assert found.loss == pytest.approx(trainer.step(large, 0.0).loss, rel=1e-6)
    assert math.isnan(trainer.evaluate([]).loss)


def test_a_step_without_a_trained_token_changes_nothing(be):
    model = BagModel(be)
    before = weights(model)
    batch = model.pack([Sample(np.array([1, 2]), np.array([IGNORE, IGNORE]), id="s")])
    trainer = Trainer(model, TokenLoss(be.ops), be, OPTIM)
    assert trainer.step(Step((batch,), ("s",)), 0.1) is None
    assert all((before[path] == values).all() for path, values in weights(model).items())
    assert trainer.state.step["head.weight"] == 0


def test_what_is_not_finite_is_named_and_leaves_the_weights(be):
    model = BagModel(be)
    bad = np.array(be.to_numpy(model.parameters["embed.weight"].tensor))
    bad[7] = np.inf
    be.ops.assign(model.parameters["embed.weight"].tensor, be.ops.from_numpy(bad))
    samples = [Sample(np.full(3, token), np.full(3, token), id=f"s{token}") for token in (3, 7)]
    batches = tuple(model.pack([sample]) for sample in samples)
    trainer, before = Trainer(model, TokenLoss(be.ops), be, OPTIM), weights(model)
    with pytest.raises(
        NonFiniteError, match=r"^step 1: the loss is not finite; samples of the step: s7; .*on_nonfinite=skip$"
    ):
        trainer.step(Step(batches, ("s3", "s7")), 0.1)
    assert (before["head.weight"] == weights(model)["head.weight"]).all()
    assert all(p.main_grad is None for p in model.parameters.values())


class Doubled(TokenLoss):
    """Any objective: the loss of each token twice, weighed by samples, with values to be seen."""

    logged = ("single", "triple")

    def __init__(self, ops):
        super().__init__(ops)
        self.unit = "samples"

    def loss(self, hidden, w, prepared):
        (loss,) = super().loss(hidden, w, prepared)
        return loss + loss, loss, loss * 3.0

    def weight(self, batch):
        return len(batch.sample_ids)


def test_an_objective_says_what_is_minimised_and_logged(be, tmp_path):
    ours, plain = BagModel(be), BagModel(be)
    work = step_of(ours, tmp_path, 50)
    keys = keys_of_passes(ours)
    trainer = Trainer(ours, Doubled(be.ops), be, OPTIM, seed=5)
    evaluated = trainer.evaluate(work.batches)
    found = trainer.step(work, 0.05, 7)
    expected = Trainer(plain, TokenLoss(be.ops), be, OPTIM).step(work, 0.05)
    ratio = work.trained_tokens / 12
    assert found.loss == pytest.approx(2 * ratio * expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(2 * ratio * expected.grad_norm, rel=1e-5)
    assert found.values == pytest.approx({"single": found.loss / 2, "triple": found.loss * 1.5}, rel=1e-6)
    assert (evaluated.loss, evaluated.values["single"]) == pytest.approx((found.loss, found.loss / 2), rel=1e-6)
    assert evaluated.weight == 12
    assert keys == [(5, 7, pack) for pack in range(len(work.batches))]


def keys_of_passes(model) -> list[tuple[int, ...]]:
    """The keys that the model will be run with."""
    plain, keys = model.forward, []

    def forward(batch, last, *, key=()):
        keys.append(key)
        return plain(batch, last, key=key)

    model.forward = forward
    return keys


def test_random_numbers_are_named_by_the_packs_number_in_the_step(be, tmp_path):
    """Not by a rank's count of its own: a rank that holds packs 1 and 3 draws what one process draws for them."""
    model = BagModel(be)
    keys = keys_of_passes(model)
    work = step_of(model, tmp_path, 12)
    own = Step(work.batches[1:4:2], work.sample_ids, numbers=(1, 3))
    Trainer(model, TokenLoss(be.ops), be, OPTIM, seed=2).step(own, 0.05, 9)
    assert keys == [(2, 9, 1), (2, 9, 3)]
