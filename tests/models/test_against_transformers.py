"""Both families on both backends against transformers: logits, features and gradients of tiny random models.

Limits are four times the largest difference measured over all cases below (x86 CPU, torch 2.13, MindSpore 2.10,
transformers 4.57.6; logits have a standard deviation of 1). The differences are float32 rounding: transformers on
another matrix library moves as far from itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest

from duetvl.core.backend import Backend
from duetvl.core.batch import IGNORE, Batch
from duetvl.core.errors import ConfigError
from duetvl.data.loading.loader import Step
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.step import Trainer

LOGITS = 7e-5  # measured: 1.5e-5 on torch, 1.7e-5 on MindSpore
FEATURES = 3e-5  # 6.5e-6, 7.6e-6
GRADIENTS = 3.2e-5  # relative to the norm of each tensor; 7.9e-6, 5.4e-6
LOSS = 1.7e-6  # relative; 2.5e-7, 4.2e-7
REORDERED = 5e-6  # relative: the same sums in another order; 1.3e-6, 1.1e-6

KINDS = list(oracle.SAMPLES)
every_model = pytest.mark.parametrize("name", list(oracle.MODELS))
families = pytest.mark.parametrize("name", ["qwen2-tied", "qwen2.5-untied"])


def array(be: Backend, tensor) -> np.ndarray:
    return np.array(be.to_numpy(tensor), np.float32)


def assert_same_gradients(be: Backend, found, expected, limit: float) -> None:
    """Every tensor's difference within `limit` times its norm. Shapes may differ: numbers and their order may not."""
    assert found.keys() == expected.keys()
    wrong = {}
    for path, gradient in expected.items():
        ours, theirs = array(be, found[path]).ravel(), np.ravel(gradient)
        assert np.any(theirs), f"{path}: a gradient of zeros shows nothing"
        wrong[path] = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    worst = max(wrong, key=wrong.__getitem__)
    assert wrong[worst] <= limit, worst


# -- forward ----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("kind", KINDS)
def test_logits(tiny, be, samples, name, kind):
    expected = tiny.logits(name, kind)
    assert 0.8 < expected.std() < 1.2
    model = tiny.ours(name, be)
    np.testing.assert_allclose(array(be, model.logits(model.pack([samples[kind]]))), expected, rtol=0, atol=LOGITS)


@every_model
def test_logits_of_everything_in_one_batch(tiny, be, samples, name):
    model = tiny.ours(name, be)
    order = [*KINDS, *KINDS[:2]]
    found = array(be, model.logits(model.pack([samples[kind] for kind in order])))
    expected = np.concatenate([tiny.logits(name, kind) for kind in order])
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)


@every_model
def test_features_of_the_vision_tower(tiny, be, samples, name):
    model = tiny.ours(name, be)
    with_media = [samples[kind] for kind in KINDS if kind != "text"]
    found = array(be, model.features(model.pack(with_media)))
    expected = np.concatenate([oracle.features(tiny.theirs(name), given) for given in with_media])
    np.testing.assert_allclose(found, expected, rtol=0, atol=FEATURES)


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close(tiny, be, samples, name, dtype):
    if not be.device.supports(dtype):
        pytest.skip(f"{be.name} on {be.device.name} has no {dtype}")
    model = tiny.ours(name, be, dtype)
    batch = model.pack(list(samples.values()))
    expected = np.concatenate([tiny.logits(name, kind) for kind in KINDS])
    found = array(be, model.logits(batch))
    limit = {"bfloat16": 0.05, "float16": 0.01}[dtype]  # measured: 0.016, 0.0023
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)
    loss, gradients = model.loss_and_grads(batch)
    expected_loss, expected_gradients = oracle.loss_and_grads(tiny.theirs(name), list(samples.values()))
    assert loss == pytest.approx(expected_loss, rel=4e-3)
    assert gradients.keys() == expected_gradients.keys()
    assert {be.ops.dtype_of(gradient) for gradient in gradients.values()} == {"float32"}
    for path in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight", "visual.patch_embed.proj.weight"):
        ours, theirs = array(be, gradients[path]).ravel(), expected_gradients[path].ravel()
        assert np.dot(ours, theirs) > 0.997 * np.linalg.norm(ours) * np.linalg.norm(theirs), path


# -- backward ---------------------------------------------------------------------------------------------------------


@every_model
def test_gradients_of_every_parameter(tiny, be, samples, name):
    """One packed batch of everything against transformers, one sample at a time."""
    model = tiny.ours(name, be)
    loss, gradients = model.loss_and_grads(model.pack(list(samples.values())))
    expected_loss, expected = oracle.loss_and_grads(tiny.theirs(name), list(samples.values()))
    assert expected.keys() == model.parameters.keys()
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same_gradients(be, gradients, expected, GRADIENTS)
    for path, gradient in gradients.items():
        assert tuple(gradient.shape) == model.parameters[path].shape


@families
@pytest.mark.parametrize("kind", KINDS[1:])
def test_gradients_of_single_samples(tiny, be, samples, name, kind):
    model = tiny.ours(name, be)
    loss, gradients = model.loss_and_grads(model.pack([samples[kind]]))
    expected_loss, expected = oracle.loss_and_grads(tiny.theirs(name), [samples[kind]])
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same_gradients(be, gradients, expected, GRADIENTS)


@families
def test_packing_and_order_change_nothing(tiny, be, samples, name):
    model = tiny.ours(name, be)
    everything = list(samples.values())
    loss, gradients = model.loss_and_grads(model.pack(everything))
    gradients = {path: array(be, gradient) for path, gradient in gradients.items()}
    other_loss, other = model.loss_and_grads(model.pack([everything[i] for i in (3, 0, 4, 2, 1)]))
    assert other_loss == pytest.approx(loss, rel=LOSS)
    assert_same_gradients(be, other, gradients, REORDERED)

    tokens = sum(model.pack([given]).trained_tokens for given in everything)
    total, summed = 0.0, {path: np.zeros_like(gradient) for path, gradient in gradients.items()}
    for given in everything:
        batch = model.pack([given])
        part, found = model.loss_and_grads(batch)
        total += part * batch.trained_tokens / tokens
        for path, gradient in found.items():
            summed[path] += array(be, gradient) * (batch.trained_tokens / tokens)
    assert total == pytest.approx(loss, rel=LOSS)
    worst = max(np.linalg.norm(summed[path] - x) / np.linalg.norm(x) for path, x in gradients.items())
    assert worst <= REORDERED


@families
def test_pictures_and_videos_swap_places(tiny, be, name):
    """Features follow their placeholders, not their order among the pixels: images come first there."""
    image, video = oracle.Image((1, 4, 8)), oracle.Video((2, 4, 8))
    model = tiny.ours(name, be)
    for parts in ((3, video, 2, image, 4), (3, image, 2, video, 4)):
        given = oracle.sample(*parts, seed=8)
        expected = oracle.logits(tiny.theirs(name), given)
        found = array(be, model.logits(model.pack([given])))
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)


@families
def test_a_shared_picture(tiny, be, name):
    """Two samples about one picture: the tower runs once, and the gradient is that of two copies."""
    picture = oracle.Image((1, 10, 12))
    one = oracle.sample(2, picture, 5, seed=9)
    other = replace(oracle.sample(4, picture, 7, seed=10), pixel_values=one.pixel_values)
    model = tiny.ours(name, be)
    batch = model.pack([one, other])
    rows = len(one.pixel_values)
    shared: Batch = replace(
        batch, pixel_rows=batch.pixel_rows[:rows], grids=batch.grids[:1], visual_src=batch.visual_src % (rows // 4)
    )
    assert len(set(shared.visual_src)) * 2 == len(shared.visual_src) == rows // 2
    np.testing.assert_allclose(array(be, model.logits(shared)), array(be, model.logits(batch)), rtol=0, atol=LOGITS)
    loss, gradients = model.loss_and_grads(shared)
    expected_loss, expected = oracle.loss_and_grads(tiny.theirs(name), [one, other])
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same_gradients(be, gradients, expected, GRADIENTS)


@families
def test_text_alone_leaves_the_vision_tower(tiny, be, samples, name):
    """It has no gradient, and a step moves the language model alone."""
    import duetvl

    model = duetvl.load_model(tiny.directory(name), backend=be)
    batch = model.pack([samples["text"]])
    loss, gradients = model.loss_and_grads(batch)
    assert gradients.keys() == {path for path in model.parameters if not path.startswith("visual.")}
    expected_loss, expected = oracle.loss_and_grads(tiny.theirs(name), [samples["text"]])
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same_gradients(be, gradients, expected, GRADIENTS)

    def weights():
        return {path: array(be, parameter.tensor) for path, parameter in model.parameters.items()}

    before = weights()
    trainer = Trainer(model, TokenLoss(be.ops), be, OptimSection(lr=1e-2, weight_decay=0.1))
    assert trainer.step(Step([batch], ("text",)), 1e-2).loss == pytest.approx(loss, rel=LOSS)
    after = weights()
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == gradients.keys()
    assert trainer.step(Step([batch], ("text",)), 1e-2).loss < loss
    media = model.pack([samples["image"], samples["text"]])
    trainer.step(Step([media], ("image", "text")), 1e-2)
    visual = {path for path, x in weights().items() if not np.array_equal(x, before[path]) and "visual" in path}
    assert visual == {path for path in model.parameters if path.startswith("visual.")}


@families
def test_frozen_parts_have_no_gradient_and_change_no_other(tiny, be, samples, name):
    import duetvl

    model = duetvl.load_model(tiny.directory(name), backend=be)
    _, everything = tiny.ours(name, be).loss_and_grads(model.pack([samples["image"]]))
    prefixes = {"vision": ("visual.patch_embed", "visual.blocks"), "projector": ("visual.merger",)}
    for part, frozen in prefixes.items():
        model.freeze([part])
        _, gradients = model.loss_and_grads(model.pack([samples["image"]]))
        expected = {path: array(be, x) for path, x in everything.items() if not path.startswith(frozen)}
        assert_same_gradients(be, gradients, expected, REORDERED)


def test_nothing_to_train_is_said(tiny, be, samples):
    model = tiny.ours("qwen2-tied", be)
    unlabelled = replace(samples["image"], labels=np.full(len(samples["image"]), IGNORE))
    with pytest.raises(ConfigError, match="no token of this batch is trained"):
        model.loss_and_grads(model.pack([unlabelled, replace(samples["text"], labels=None)]))
