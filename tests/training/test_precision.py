"""Half precision: scaled losses, what overflows, what is not finite, and what is computed in float32 in any case."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bag_model import BagModel
from test_loop import Interrupted, assert_same_run, interrupt, losses, recipe, run  # noqa: F401  # the fixture by its name

from duetvl.core.batch import Sample
from duetvl.core.spans import Spans
from duetvl.data.loading.loader import Step
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.scaling import LEAST, LossScale
from duetvl.training.step import NonFiniteError, Trainer
from duetvl.training.watching.metrics import read_metrics


def weights(model) -> dict[str, np.ndarray]:
    return {path: np.array(model.backend.to_numpy(p.tensor)) for path, p in model.parameters.items()}


def step_of(model) -> Step:
    samples = [Sample(np.arange(first, first + 6), np.arange(first, first + 6), id=f"s{first}") for first in (0, 3)]
    return Step(tuple(model.pack([sample]) for sample in samples), ("s0", "s3"))


# -- float16 ----------------------------------------------------------------------------------------------------------


def test_the_scale_halves_and_grows():
    scale = LossScale(8.0, window=2)
    assert "overflowed float16 at loss scale 8, which is 4 from now on" in scale.update(math.inf)
    assert [scale.update(1.0), scale.scale, scale.update(1.0), scale.scale] == [None, 4.0, None, 8.0]
    scale.update(1.0)
    assert scale.update(math.nan)
    assert (scale.scale, scale.good) == (4.0, 0)
    other = LossScale()
    other.restore(scale.to_json())
    assert (other.scale, other.good, other.window) == (4.0, 0, 2000)
    scale.scale = LEAST
    assert scale.update(math.inf) is None  # a smaller scale would not help


def test_float16_learns_as_float32_does(be):
    found = {}
    for dtype in ("float32", "float16"):
        model = BagModel(be, dtype)
        trainer, work = Trainer(model, TokenLoss(be.ops), be, OptimSection(loss_scale=1024.0)), step_of(model)
        found[dtype] = [trainer.step(work, 0.05) for _ in range(15)]
    for half, whole in zip(found["float16"], found["float32"], strict=True):
        assert half.loss == pytest.approx(whole.loss, rel=0.02, abs=2e-3)
        assert half.grad_norm == pytest.approx(whole.grad_norm, rel=0.05, abs=2e-3)
        assert half.values == {"loss_scale": 1024.0}
    assert found["float16"][-1].loss < 0.2 * found["float16"][0].loss
    assert trainer.state.master.keys() == model.parameters.keys()


def test_small_gradients_live_by_the_scale(be):
    """A gradient below float16's least number reaches the master weights with the scale, and not without."""
    moved = {}
    for start in (1.0, 65536.0):
        model = BagModel(be, "float16")

        class Faint(TokenLoss):
            def weight(self, batch):
                return super().weight(batch) * 2.0**26  # the step's mean, and its gradient, are smaller by this

        trainer = Trainer(model, Faint(be.ops), be, OptimSection(loss_scale=start))
        before = np.array(be.to_numpy(trainer.state.master["head.weight"]))
        trainer.step(step_of(model), 0.01)
        moved[start] = (before != be.to_numpy(trainer.state.master["head.weight"])).mean()
    assert moved[1.0] == 0
    assert moved[65536.0] > 0.5


def test_an_overflow_makes_no_update_and_halves_the_scale(be):
    model = BagModel(be, "float16")
    trainer, before = Trainer(model, TokenLoss(be.ops), be, OptimSection(loss_scale=2.0**22)), weights(model)
    result = trainer.step(step_of(model), 0.05)
    assert result.skipped == (
        "the gradient overflowed float16 at loss scale 4.1943e+06, which is 2.09715e+06 from now on"
    )
    assert math.isfinite(result.loss)
    assert not math.isfinite(result.grad_norm)
    assert all((before[path] == values).all() for path, values in weights(model).items())
    assert set(trainer.state.step.values()) == {0}
    assert all(p.main_grad is None for p in model.parameters.values())
    results = [trainer.step(step_of(model), 0.05) for _ in range(12)]
    assert results[-1].skipped is None
    assert trainer.loss_scale.scale == results[-1].values["loss_scale"] < 2.0**21
    assert set(trainer.state.step.values()) == {sum(one.skipped is None for one in results)}


def test_float16_resumes_exactly(be, recipe, tmp_path, capsys):  # noqa: F811
    """The scale and what it has seen are in the checkpoint: halved at the start, grown again on the way."""
    options = "model.dtype=float16", "optim.loss_scale=16777216.0", "optim.loss_scale_window=4"
    run(be, recipe, *options)
    out = capsys.readouterr().out
    assert "warning: step 1 makes no update (1 so far): the gradient overflowed float16 at loss scale" in out
    other = f"train.output_dir={tmp_path}/other"
    with pytest.raises(Interrupted):
        run(be, recipe, *options, other, "checkpoint.every=7", at=40, what=interrupt)
    run(be, recipe, *options, other, "checkpoint.every=7")
    assert_same_run(be, tmp_path / "run", tmp_path / "other")
    rows = [
        [(row["loss_scale"], row["total_skipped"]) for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("run", "other")
    ]
    assert rows[0] == rows[1]
    assert len({scale for scale, _ in rows[0]}) > 3
    assert rows[0][-1][1] >= 4


# -- what is not finite -----------------------------------------------------------------------------------------------


def poisoned(be) -> BagModel:
    """Token 7 has an infinite embedding."""
    model = BagModel(be)
    bad = np.array(be.to_numpy(model.parameters["embed.weight"].tensor))
    bad[7] = np.inf
    be.ops.assign(model.parameters["embed.weight"].tensor, be.ops.from_numpy(bad))
    return model


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_skipping_leaves_everything_as_it_was(be):
    model = poisoned(be)
    trainer = Trainer(model, TokenLoss(be.ops), be, OptimSection(), on_nonfinite="skip")
    before = weights(model)
    result = trainer.step(step_of(model), 0.05)
    assert result.skipped == "the loss is not finite; samples of the step: s3"
    assert math.isnan(result.loss)
    assert all(np.array_equal(before[path], values, equal_nan=True) for path, values in weights(model).items())
    assert all(p.main_grad is None for p in model.parameters.values())
    assert set(trainer.state.step.values()) == {0}
    work = step_of(model)
    assert trainer.step(Step(work.batches[:1], ("s0",)), 0.05).skipped is None
    assert set(trainer.state.step.values()) == {1}


def test_a_gradient_alone_may_be_what_is_not_finite(be):
    model = BagModel(be)

    class Steep(TokenLoss):
        def weight(self, batch):
            return 1e-320  # a number that no finite norm survives the division by

    trainer = Trainer(model, Steep(be.ops), be, OptimSection())
    with pytest.raises(NonFiniteError, match=r"^step 1: the gradient is not finite; samples of the step: s0, s3; "):
        trainer.step(step_of(model), 0.05)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_skips_goes_on_and_tells(recipe, tmp_path, capsys):  # noqa: F811
    from duetvl.core.backend import load_backend

    be = load_backend("torch_npu", "cpu")
    result = run(be, recipe, "optim.lr=1e30", "optim.clip=null", "train.on_nonfinite=skip")
    rows = [row for row in read_metrics(tmp_path / "run") if "total_skipped" in row]
    assert (result.step, len(rows)) == (20, 20)
    assert rows[-1]["total_skipped"] > 10
    out = capsys.readouterr().out
    assert "makes no update (1 so far): the gradient is not finite; samples of the step: train.jsonl:" in out


# -- float32 inside ---------------------------------------------------------------------------------------------------

HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_are_taken_in_float32(be, dtype):
    """The squares of these overflow float16, and their sum loses most of bfloat16's digits."""
    x = np.tile(np.array([600.0, 100.0], np.float32), (3, 128))
    one, zero = np.ones(256, np.float32), np.zeros(256, np.float32)
    given, scale, shift = (be.ops.from_numpy(values, dtype) for values in (x, one, zero))
    rms = np.asarray(be.to_numpy(be.ops.rms_norm(given, scale, eps=1e-6)), np.float32)
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=2.0**-8)
    layer = np.asarray(be.to_numpy(be.ops.layer_norm(given, scale, shift, eps=1e-6)), np.float32)
    np.testing.assert_allclose(layer, np.where(x > 350, 1.0, -1.0), rtol=2.0**-8)


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_logits_and_softmax_are_float32(be, dtype):
    """Scores of 80000 are beyond float16; those of 1000 keys with one weight each would sum to 256 in bfloat16."""
    big = np.full((2, 1, 64), 100.0, np.float32)
    values = np.stack([np.full((1, 64), n, np.float32) for n in (1.0, 3.0)])
    spans = Spans.of_lengths(np.array([2]), causal=False)
    q, v = be.ops.from_numpy(big, dtype), be.ops.from_numpy(values, dtype)
    out, lse = be.ops.attention(q, q, v, spans)
    np.testing.assert_allclose(np.asarray(be.to_numpy(out), np.float32), np.full((2, 1, 64), 2.0))
    np.testing.assert_allclose(be.to_numpy(lse), np.full((1, 2), 80000 + math.log(2)), rtol=1e-6)
    many = be.ops.from_numpy(np.zeros((1000, 1, 64), np.float32), dtype)
    _, lse = be.ops.attention(many, many, many, Spans.of_lengths(np.array([1000]), causal=False))
    np.testing.assert_allclose(be.to_numpy(lse), np.full((1, 1000), math.log(1000)), rtol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_loss_is_summed_in_float32(be, dtype):
    """3000 equal losses of log 512: in half precision the sum would stop growing, or come in steps of 128."""
    hidden, vocabulary = np.zeros((3000, 8), np.float32), np.ones((512, 8), np.float32)
    labels = be.ops.from_numpy(np.zeros(3000, np.int32))
    loss = be.ops.linear_cross_entropy(be.ops.from_numpy(hidden, dtype), be.ops.from_numpy(vocabulary, dtype), labels)
    assert be.ops.dtype_of(loss) == "float32"
    assert float(be.to_numpy(loss)) == pytest.approx(3000 * math.log(512), rel=1e-5)
