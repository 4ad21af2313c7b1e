"""What is trained, and how fast: groups of parameters, and parts that are frozen."""

from __future__ import annotations

import numpy as np
import pytest
from bag_model import BagModel

import duetvl
from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError
from duetvl.data.loading.loader import Step
from duetvl.models.qwen_vl import language, stage, vision
from duetvl.models.qwen_vl.parameters import PARTS
from duetvl.parallel.inventory import own_entries
from duetvl.training.groups import check_patterns, parameter_groups
from duetvl.training.objective import TokenLoss
from duetvl.training.recipe.optim_section import OptimSection
from duetvl.training.step import Trainer


def groups_of(model, **settings):
    everything = own_entries(model.parameters.values(), model.backend)
    found = parameter_groups(model.parameters, everything, OptimSection(**settings), model.parts)
    return {tuple(p.path for p in group.parameters): (group.lr_scale, group.weight_decay) for group in found}


def test_matrices_decay(be):
    groups = groups_of(BagModel(be), weight_decay=0.3)
    assert groups == {("embed.weight", "head.weight"): (1.0, 0.3), ("norm.weight",): (1.0, 0.0)}


def test_scales_and_decay_by_pattern(be):
    groups = groups_of(BagModel(be), weight_decay=0.3, no_decay=("head",), lr_scale={"words": 0.5, "head": 2.0})
    assert groups == {("embed.weight",): (0.5, 0.3), ("norm.weight",): (1.0, 0.0), ("head.weight",): (2.0, 0.0)}


def test_mistakes_in_patterns(be):
    model = BagModel(be)
    with pytest.raises(ConfigError, match=r"^optim.lr_scale: 'word' matches no parameter; did you mean words"):
        groups_of(model, lr_scale={"word": 2.0})
    with pytest.raises(ConfigError, match=r"^optim.no_decay: 'nrm' matches no parameter; did you mean norm"):
        groups_of(model, no_decay=("nrm",))
    for parameter in model.parameters.values():
        parameter.trainable = False
    with pytest.raises(ConfigError, match="nothing would be trained: every parameter is frozen"):
        Trainer(model, TokenLoss(be.ops), be, OptimSection())


def test_a_recipe_is_checked_by_names_alone():
    paths = ["visual.blocks.0.mlp.weight", "visual.merger.ln_q.weight", "model.norm.weight"]
    check_patterns(paths, ("vision", "model"), OptimSection(lr_scale={"projector": 0.1}), PARTS)
    with pytest.raises(ConfigError, match=r"model.freeze vision, \*norm, mer\*: every parameter is frozen"):
        check_patterns(paths, ("vision", "*norm", "mer*"), OptimSection(), PARTS)
    with pytest.raises(ConfigError, match=r"model.freeze: 'visin' matches no"):
        check_patterns(paths, ("visin",), OptimSection(), PARTS)


def test_rates_are_scaled(be):
    """AdamW's first update is the learning rate itself, in each number that has a gradient."""
    model = BagModel(be)
    before = {path: np.array(be.to_numpy(p.tensor)) for path, p in model.parameters.items()}
    samples = [Sample(np.arange(11), np.arange(11), id="s")]
    trainer = Trainer(model, TokenLoss(be.ops), be, OptimSection(lr_scale={"head": 0.25}))
    trainer.step(Step((model.pack(samples),), ("s",)), 0.01)
    moved = {path: np.abs(be.to_numpy(p.tensor) - before[path]).max() for path, p in model.parameters.items()}
    assert moved == pytest.approx({"embed.weight": 0.01, "norm.weight": 0.01, "head.weight": 0.0025}, rel=1e-3)


# -- what is frozen is not recorded ----------------------------------------------------------------------------------


class Recorded:
    """Asks after each block whether differentiation goes through its output."""

    def __init__(self, be, monkeypatch):
        self.be, self.found = be, {"vision": [], "projector": [], "language": []}
        self._wrap(monkeypatch, vision, "vision_block", "vision")
        self._wrap(monkeypatch, stage, "merger", "projector")
        self._wrap(monkeypatch, language, "decoder_layer", "language")

    def _wrap(self, monkeypatch, module, name, part):
        plain = getattr(module, name)

        def probed(*args, **options):
            def forward(needs, x):
                self.found[part].append(needs[0])
                return self.be.ops.reshape(x, x.shape), ()

            def backward(needs, residuals, d):
                return (d,)

            return self.be.autograd.custom_vjp(forward, backward)(plain(*args, **options))

        monkeypatch.setattr(module, name, probed)


@pytest.mark.parametrize(
    ("freeze", "recorded", "trained"),
    [
        ((), (True, True, [True, True]), ("visual.blocks", "visual.merger", "model.layers")),
        (("vision",), (False, True, [True, True]), ("visual.merger", "model.layers")),
        (
            ("vision", "projector", "model.embed_tokens", "model.layers.0"),
            (False, False, [False, True]),
            ("model.layers.1",),
        ),
        (("language",), (True, True, [True, True]), ("visual.blocks", "visual.merger")),
        (("visual", "model"), (False, False, [False, False]), ("lm_head",)),
    ],
)
def test_what_is_frozen_with_nothing_trained_before_it_is_not_recorded(
    tiny, be, samples, monkeypatch, freeze, recorded, trained
):
    model = duetvl.load_model(tiny.directory("qwen2.5-untied"), backend=be)
    model.freeze(freeze)
    seen = Recorded(be, monkeypatch).found
    trainer = Trainer(model, TokenLoss(be.ops), be, OptimSection(lr=1e-2))
    before = {path: np.array(be.to_numpy(p.tensor)) for path, p in model.parameters.items()}
    trainer.step(Step((model.pack([samples["image"]]),), ("s",)), 1e-2)
    vision_blocks, projector, layers = recorded
    assert seen == {"vision": [vision_blocks] * 3, "projector": [projector], "language": layers}
    moved = {path for path, p in model.parameters.items() if not np.array_equal(be.to_numpy(p.tensor), before[path])}
    assert all(any(path.startswith(prefix) for path in moved) for prefix in trained)
    assert all(p.trainable for path, p in model.parameters.items() if path in moved)
    assert len(moved) == sum(p.trainable for p in model.parameters.values())
    assert trainer.state.exp_avg.keys() == moved
