"""Packs, single samples and ranks side by side: the same losses and gradients, from files to the weights."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_run
from meeting import together

from duetvl.api import load_model
from duetvl.core.mesh import Mesh
from duetvl.data.loading.loader import BatchMaker, Packing
from duetvl.data.loading.order import Mixture, RecordCursor
from duetvl.data.loading.samples import SampleMaker
from duetvl.data.loading.workers import InlinePool, make_pool
from duetvl.data.sources.catalog import Records
from duetvl.training.recipe.reading import load_recipe
from duetvl.training.sft import record_encoder

SPLITS = {
    "one pack": (Packing(100_000), 1),
    "packs": (Packing(250, 60), 1),
    "single samples": (Packing(1, several=False), 1),
    "three ranks": (Packing(250), 3),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return load_recipe(tiny_run.write_recipe(tmp_path_factory.mktemp("packed")))


def sums(model, batches) -> tuple[float, dict[str, np.ndarray]]:
    """The sum of all losses, and of their gradients."""
    one = model.backend.ops.from_numpy(np.ones((), np.float32))
    total = 0.0
    for number, batch in enumerate(batches, start=1):
        loss, tape = model.forward_loss(batch)
        model.backend.autograd.backward(tape, [one], last=number == len(batches))
        total += float(model.backend.to_numpy(loss))
    gradients = {path: np.array(model.backend.to_numpy(p.main_grad)) for path, p in model.parameters.items()}
    for p in model.parameters.values():
        p.main_grad = None
    return total, gradients


def test_every_split_of_a_step_gives_one_gradient(be, recipe):
    records, encoder = Records([source.path for source in recipe.data.train]), record_encoder(recipe)
    pool = InlinePool(SampleMaker(records.files, encoder))
    model = load_model(recipe.model.path, backend=be)
    found = {}
    for name, (packing, dp) in SPLITS.items():

        def own(peers, packing=packing):
            cursor = RecordCursor(records, Mixture(records.counts, seed=0))
            return BatchMaker(pool, encoder, packing, peers=peers).begin(cursor, 8).finish().batches

        batches = [batch for part in together(Mesh(dp=dp), own) for batch in part]
        found[name] = (len(batches), *sums(model, batches))
    assert found["one pack"][0] == 1 < found["packs"][0] < found["single samples"][0] == 8
    _, loss, gradients = found["one pack"]
    for _, other_loss, other in list(found.values())[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for path, expected in gradients.items():
            np.testing.assert_allclose(other[path], expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max() + 1e-6)


def test_worker_processes_make_the_same_batches(recipe):
    """With the encoder of training: pictures, tokenizer and all."""
    records, encoder = Records([source.path for source in recipe.data.train]), record_encoder(recipe)
    made = []
    for workers in (0, 2):
        pool = make_pool(SampleMaker(records.files, encoder), workers)
        try:
            cursor = RecordCursor(records, Mixture(records.counts, seed=0))
            made.append(BatchMaker(pool, encoder, Packing(250)).begin(cursor, 8).finish())
        finally:
            pool.close()
    assert made[0].sample_ids == made[1].sample_ids and made[0].end == made[1].end
    for one, other in zip(made[0].batches, made[1].batches, strict=True):
        for name in ("input_ids", "position_ids", "targets", "pixel_rows", "grids", "visual_dst", "visual_src"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert sum(len(batch.pixel_rows) for batch in made[1].batches) > 0
