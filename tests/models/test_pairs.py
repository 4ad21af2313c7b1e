"""Two answers to one prompt in a batch: their pictures are encoded once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
from oracle import PAIRS, copies, pair
from test_against_transformers import LOGITS, LOSS, REORDERED, array, assert_same_gradients, families

from duetvl.core.batch import IGNORE, Pair
from duetvl.core.errors import DataError
from duetvl.models import vocabulary


@families
def test_a_pair_is_two_samples_over_one_copy_of_the_pictures(tiny, be, name):
    model, given = tiny.ours(name, be), list(PAIRS.values())
    batch = model.pack(given)
    apart = model.pack([sample for one in given for sample in copies(one)])
    for same in ("input_ids", "position_ids", "cu_seqlens", "targets", "visual_dst"):
        np.testing.assert_array_equal(getattr(batch, same), getattr(apart, same))
    assert 2 * len(batch.pixel_rows) == len(apart.pixel_rows) > 0
    assert 2 * len(batch.grids) == len(apart.grids)
    assert batch.sample_ids == tuple(PAIRS)
    assert len(np.unique(batch.visual_src)) * 2 == len(batch.visual_src)

    np.testing.assert_allclose(array(be, model.logits(batch)), array(be, model.logits(apart)), rtol=0, atol=LOGITS)
    loss, gradients = model.loss_and_grads(batch)
    gradients = {path: array(be, gradient) for path, gradient in gradients.items()}
    expected_loss, expected = model.loss_and_grads(apart)
    assert loss == pytest.approx(expected_loss, rel=LOSS)
    assert_same_gradients(be, expected, gradients, REORDERED)


@families
def test_pairs_and_samples_lie_in_one_batch(tiny, be, samples, name):
    """Features after a pair are counted from where the pair's end, once."""
    model, given = tiny.ours(name, be), list(PAIRS.values())
    mixed = [given[1], samples["image and video"], given[2], samples["image"]]
    plain = [*copies(given[1]), samples["image and video"], *copies(given[2]), samples["image"]]
    found, expected = (array(be, model.logits(model.pack(x))) for x in (mixed, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)


@families
def test_log_probabilities_are_those_of_transformers(tiny, be, name):
    """Of answer tokens alone, in the order of the batch; recorded as unrecorded."""
    model, given = tiny.ours(name, be), list(PAIRS.values())
    expected = []
    for sample in (sample for one in given for sample in copies(one)):
        logits = oracle.logits(tiny.theirs(name), sample).astype(np.float64)
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        trained = np.flatnonzero(sample.labels[1:] != IGNORE)
        expected.append(logps[trained, sample.labels[1:][trained]])
    batch = model.pack(given)
    found = array(be, model.logprobs(batch))
    assert found.shape == (5 + 9 + 5 + 9 + 8 + 4,)
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=2 * LOGITS)
    seen = []

    labels = be.ops.from_numpy(batch.targets[batch.targets != IGNORE])

    def total(hidden, w):
        logprobs = vocabulary.logprobs(be.ops, w, hidden, labels)
        seen.append(array(be, logprobs))
        return (be.ops.sum(logprobs),)

    (value,), _ = model.forward(batch, total)
    assert float(array(be, value)) == pytest.approx(found.sum(), rel=1e-6)
    np.testing.assert_allclose(seen[0], found, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": np.zeros((144, oracle.PATCH_ROW), np.float32)}, "'p': the rejected answer has pixels"),
        ({"image_grid_thw": np.array([[1, 4, 4]])}, r"image_grid_thw of the chosen answer is \[\[1, 10, 12\]\]"),
        ({"input_ids": np.zeros(0, np.int64)}, "'p': has no tokens"),
    ],
)
def test_a_pair_that_cannot_be(tiny, be, change, message):
    good = pair(2, oracle.Image((1, 10, 12)), 3, name="p")
    with pytest.raises(DataError, match=message):
        tiny.ours("qwen2-tied", be).pack([Pair(good.chosen, replace(good.rejected, **change))])
