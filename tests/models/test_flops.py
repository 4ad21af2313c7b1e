"""The count of operations, against torch's own counter over the products that really run."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.core.backend import load_backend
from duetvl.core.batch import Sample
from duetvl.models.qwen_vl.config import published_config
from duetvl.models.qwen_vl.flops import forward_flops, inference_flops, training_flops
from duetvl.models.qwen_vl.parameters import PARTS
from duetvl.models.qwen_vl.tables import vision_tables

FREEZES = [(), ("vision",), ("vision", "projector"), ("language",)]


def packed(model, *kinds):
    samples = [oracle.SAMPLES[kind] for kind in kinds]
    return model.pack([Sample(**{**vars(sample), "labels": sample.input_ids}) for sample in samples])


def counted_products(be, model, batch) -> int:
    """Operations of all matrix products of a pass forward and backward; torch's attention on a CPU is not one."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _, tape = model.forward_loss(batch)
        be.autograd.backward(tape, [torch.ones(())])
    for p in model.parameters.values():
        p.main_grad = None
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2.5-tied"])
def test_products_are_those_that_torch_counts(tiny, name):
    be = load_backend("torch_npu", "cpu")
    model = duetvl.load_model(tiny.directory(name), backend=be)
    for kinds in (("text",), ("image", "text"), ("three images", "video")):
        batch = packed(model, *kinds)
        cost = forward_flops(model.config, batch).values()
        expected = sum(3 * part.weights + 2 * part.pixels for part in cost)
        assert counted_products(be, model, batch) == expected
        attention = 3 * sum(part.attention for part in cost)
        assert training_flops(model.config, model.parameters, batch) == expected + attention


def test_a_pass_forward_alone(tiny):
    pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=load_backend("torch_npu", "cpu"))
    batch = packed(model, "image", "text")
    with FlopCounterMode(display=False) as counter:
        model.logprobs(batch)
    attention = sum(part.attention for part in forward_flops(model.config, batch).values())
    assert counter.get_total_flops() + attention == inference_flops(model.config, batch)


@pytest.mark.parametrize("frozen", FREEZES)
def test_what_is_frozen_asks_for_less(tiny, frozen):
    """Within a part, of what torch computes: at the edges it needs a gradient or two less than is counted."""
    be = load_backend("torch_npu", "cpu")
    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=be)
    model.freeze(frozen)
    batch = packed(model, "image", "text")
    attention = forward_flops(model.config, batch)
    flows = {"vision": "vision" not in frozen, "projector": frozen[:2] != ("vision", "projector"), "language": True}
    without = sum(attention[part].attention * (1 + 2 * flows[part]) for part in PARTS)
    counted = training_flops(model.config, model.parameters, batch) - without
    assert counted == pytest.approx(counted_products(be, model, batch), rel=0.06)


def test_windows_are_counted_as_they_are_cut(tiny):
    """Pairs of patches in the spans that the model hands to attention."""
    for name in ("qwen2-untied", "qwen2.5-tied"):
        model = tiny.ours(name, load_backend("torch_npu", "cpu"))
        vision = model.config.vision
        for kind in ("image", "three images", "image and video"):
            batch = packed(model, kind)
            tables = vision_tables(model.config.vision, batch.grids)
            pairs = sum(
                int((np.diff(spans.cu_seqlens).astype(np.int64) ** 2).sum())
                for layer in range(vision.depth)
                for spans in [tables.frame_spans if vision.sees_frame(layer) else tables.window_spans]
            )
            assert forward_flops(model.config, batch)["vision"].attention == 4 * vision.hidden_size * pairs


def test_a_published_model_costs_about_six_operations_a_token_and_parameter():
    """Kaplan et al. (arXiv:2001.08361): 2N forward, twice that backward; attention and the unused embedding apart."""
    config = published_config("Qwen2.5-VL-7B-Instruct")
    batch = text_batch(config, 2048)
    cost = forward_flops(config, batch)["language"]
    assert cost.weights / 2048 == pytest.approx(2 * 7.07e9, rel=0.01)  # 7.62e9 parameters without the embedding
    assert cost.attention / cost.weights == pytest.approx(0.029, abs=0.002)


def text_batch(config, length):
    from duetvl.models.qwen_vl.host import QwenVLFamily

    ids = np.full(length, 5)
    return QwenVLFamily(config).pack([Sample(ids, ids)])
