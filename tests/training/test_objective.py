"""Losses over tokens: equal to their formulas and to transformers, on both backends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from bag_model import BagModel

from duetvl.core.batch import IGNORE, Sample
from duetvl.data.loading.loader import Step
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.step import Trainer

MODES = ("token", "micro_batch", "sample")


def sample(first: int, length: int, trained: int) -> Sample:
    tokens = (first + np.arange(length)) * 3 % 11
    return Sample(tokens, np.where(np.arange(length) >= length - trained, tokens, IGNORE), id=f"s{first}")


# One has nothing trained, which is a micro-batch of its own in the first split.
SAMPLES = [sample(1, 4, 1), sample(2, 9, 7), sample(3, 5, 0), sample(4, 6, 3), sample(5, 12, 9)]
SPLITS = {"each": [[0], [1], [2], [3], [4]], "two": [[0, 2, 4], [1, 3]], "one": [[4, 3, 2, 1, 0]]}


def formula(losses: dict[int, list], split: list[list[int]], mode: str):
    """The mean of the losses of tokens (a list of them for each sample), as the definition has it."""
    if mode == "token":
        groups = [[one for ones in losses.values() for one in ones]]
    elif mode == "sample":
        groups = list(losses.values())
    else:
        groups = [[one for number in pack for one in losses[number]] for pack in split]
    means = [sum(group) / len(group) for group in groups if group]
    return sum(means) / len(means)


def token_losses(torch, w, given: Sample) -> list:
    word = w["embed.weight"][torch.tensor(given.input_ids)]
    x = word + word.mean(0, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w["norm.weight"]
    log_p = torch.log_softmax(x @ w["head.weight"].T, -1)
    return [-log_p[i, label] for i, label in enumerate(given.labels[1:]) if label != IGNORE]


def step_of(model, split: list[list[int]]) -> Step:
    return Step(tuple(model.pack([SAMPLES[n] for n in pack]) for pack in split), ("s",))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradient_are_the_formula(be, mode, split):
    torch = pytest.importorskip("torch")
    model = BagModel(be)
    start = {
        path: torch.tensor(be.to_numpy(p.tensor), dtype=torch.float64, requires_grad=True)
        for path, p in model.parameters.items()
    }
    expected = formula({n: token_losses(torch, start, s) for n, s in enumerate(SAMPLES)}, SPLITS[split], mode)
    expected.backward()
    norm = float(sum((w.grad**2).sum() for w in start.values())) ** 0.5
    trainer = Trainer(model, TokenLoss(be.ops, mode), be, OptimSection(clip=None))
    work = step_of(model, SPLITS[split])
    evaluated = trainer.evaluate(work.batches)
    found = trainer.step(work, 1e-3)
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)
    assert found.grad_norm == pytest.approx(norm, rel=1e-5)
    assert (evaluated.loss, evaluated.tokens) == (pytest.approx(found.loss, rel=1e-6), 20)


def test_only_micro_batch_depends_on_the_split(be):
    for mode in MODES:
        losses = []
        for split in SPLITS.values():
            model = BagModel(be)
            losses.append(
                Trainer(model, TokenLoss(be.ops, mode), be, OptimSection()).step(step_of(model, split), 0).loss
            )
        spread = max(losses) / min(losses) - 1
        assert spread > 1e-3 if mode == "micro_batch" else spread < 1e-6


def test_nothing_trained_is_no_step(be):
    for mode in MODES:
        model = BagModel(be)
        trainer = Trainer(model, TokenLoss(be.ops, mode), be, OptimSection())
        assert trainer.step(step_of(model, [[2], [2]]), 1.0) is None
        assert np.isnan(trainer.evaluate(step_of(model, [[2]]).batches).loss)


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2.5-tied"])
def test_micro_batches_as_transformers_accumulates_them(tiny, be, samples, name):
    """One sample a micro-batch; each loss is divided by the number of micro-batches before it is pulled back."""
    model, theirs = tiny.ours(name, be), tiny.theirs(name)
    chosen = [samples["text"], replace(samples["image"], labels=_few(samples["image"])), samples["video"]]
    theirs.zero_grad(set_to_none=True)
    expected = 0.0
    for given in chosen:
        loss = oracle.forward(theirs, given, labels=True).loss / len(chosen)
        loss.backward()
        expected += loss.item()
    norm = float(sum((w.grad.double() ** 2).sum() for w in theirs.parameters() if w.grad is not None)) ** 0.5
    theirs.zero_grad(set_to_none=True)
    trainer = Trainer(model, TokenLoss(be.ops, "micro_batch"), be, OptimSection(clip=None))
    batches = tuple(model.pack([given]) for given in chosen)
    before = {path: np.array(be.to_numpy(p.tensor)) for path, p in model.parameters.items()}
    found = trainer.step(Step(batches, ("s",)), 0.0)
    assert found.loss == pytest.approx(expected, rel=2e-6)
    assert found.grad_norm == pytest.approx(norm, rel=2e-5)
    assert all((before[path] == be.to_numpy(p.tensor)).all() for path, p in model.parameters.items())  # lr 0
    by_token = Trainer(model, TokenLoss(be.ops), be, OptimSection()).evaluate(batches).loss
    assert abs(by_token / found.loss - 1) > 1e-3  # the samples' lengths differ enough to tell


def _few(given: Sample) -> np.ndarray:
    """All labels but the last one ignored."""
    labels = np.full(len(given), IGNORE)
    labels[-1] = given.input_ids[-1]
    return labels
