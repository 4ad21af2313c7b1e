"""Computing again instead of keeping: the same numbers, less memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.models.qwen_vl import language, vision

MODES = ("none", "full", "selective", "vision", "language")
FROZEN = {"all": (), "upper": ("vision", "embed_tokens", "model.layers.0")}


def gradients(model, samples):
    loss, found = model.loss_and_grads(model.pack(samples))
    return loss, {path: np.array(model.backend.to_numpy(x)) for path, x in found.items()}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2.5-tied"])
def test_values_do_not_change(tiny, be, samples, name, frozen):
    model = duetvl.load_model(tiny.directory(name), backend=be)
    model.freeze(FROZEN[frozen])
    chosen = [samples["image and video"], samples["text"]]
    loss, expected = gradients(model, chosen)
    for mode in MODES[1:]:
        model.recompute = mode
        found_loss, found = gradients(model, chosen)
        assert found.keys() == expected.keys()
        if be.capabilities.bitwise_repeatable:
            assert found_loss == loss
            assert all((found[path] == values).all() for path, values in expected.items())
        else:
            assert found_loss == pytest.approx(loss, rel=1e-6)
            for path, values in expected.items():
                np.testing.assert_allclose(found[path], values, rtol=0, atol=1e-5 * max(1.0, np.abs(values).max()))


@pytest.mark.parametrize("mode", MODES)
def test_what_runs_again(tiny, be, samples, monkeypatch, mode):
    """Blocks and MLPs of the towers: once forward, and once more on the way back where the mode says so."""
    calls = Counter()

    def count(module, name):
        plain, key = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"

        def counted(*args):
            calls[key] += 1
            return plain(*args)

        monkeypatch.setattr(module, name, counted)

    for module, name in [(vision, "vision_block"), (vision, "mlp"), (language, "decoder_layer"), (language, "mlp")]:
        count(module, name)
    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=be)
    model.recompute = mode
    model.loss_and_grads(model.pack([samples["image"]]))
    eyes, words = mode in ("full", "vision"), mode in ("full", "language")
    mlps = mode == "selective"
    assert calls == {
        "vision.vision_block": 3 * (1 + eyes),
        "vision.mlp": 3 * (1 + (eyes or mlps)),
        "language.decoder_layer": 2 * (1 + words),
        "language.mlp": 2 * (1 + (words or mlps)),
    }
    calls.clear()
    model.eval_loss(model.pack([samples["image"]]))
    assert calls["language.mlp"] == 2


def kept_bytes(model, batch) -> int:
    """What torch allocates during a forward pass and has not freed when it ends."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = model.forward_loss(batch)
    del kept
    return sum(event.self_cpu_memory_usage for event in trace.key_averages())


def test_less_is_kept(tiny):
    pytest.importorskip("torch")
    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=duetvl.load_backend("torch", "cpu"))
    batch = model.pack([oracle.sample(200, oracle.Image((1, 24, 24)), 100, seed=6)])
    kept = {}
    for mode in MODES:
        model.recompute = mode
        kept[mode] = kept_bytes(model, batch)
    assert kept["full"] < 0.4 * kept["none"], kept
    assert kept["full"] < kept["selective"] < 0.8 * kept["none"], kept
    saved = {mode: kept["none"] - kept[mode] for mode in MODES}
    assert saved["vision"] + saved["language"] == pytest.approx(saved["full"], rel=0.02)
    assert min(saved["vision"], saved["language"]) > 0.1 * kept["none"]
