"""LoRA, rsLoRA and DoRA on both backends against PEFT on transformers' models: logits, gradients, merging, files.

Limits are four times the largest difference measured over all cases below (x86 CPU, torch 2.13, MindSpore 2.10,
transformers 4.57.6, PEFT 0.21.2; logits have a standard deviation of about 1).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.core.backend import Backend
from duetvl.models.lora import is_adapter
from duetvl.models.qwen_vl.config import parameter_shapes

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

LOGITS = 1e-4
GRADIENTS = 5e-5  # relative to the norm of each tensor
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_dora": True, "use_rslora": True},
}
MODELS = ["qwen2-tied", "qwen2.5-untied"]
# Everything that may have an adapter, by transformers' names: PEFT would take the patch embedding for a layer as well.
EVERYWHERE = r".*(layers\.\d+\.(self_attn|mlp)\.\w+_proj|blocks\.\d+\.(attn|mlp)\.(?!act)\w+|merger\.mlp\.[02])"

every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_model = pytest.mark.parametrize("name", MODELS)


def array(be: Backend, tensor) -> np.ndarray:
    return np.array(be.to_numpy(tensor), np.float32)


def trained_adapter(name: str, kind: str, directory: Path, targets=EVERYWHERE, **options) -> Path:
    """An adapter that PEFT saves, its numbers as if it had been trained, with ranks and alphas by pattern."""
    settings = {
        "r": 3, "lora_alpha": 5, "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "merger.mlp.0": 4},
        "alpha_pattern": {"o_proj": 7}, "target_modules": targets, **KINDS[kind], **options,
    }  # fmt: skip
    model = peft.get_peft_model(oracle.make(name), peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                weight.copy_(torch.randn_like(weight) * 0.05)
            elif "magnitude" in path:
                weight.mul_(1 + 0.2 * torch.rand_like(weight))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a PEFT adapter for a model and a kind, made once."""
    made: dict[tuple[str, str], Path] = {}

    def find(name: str, kind: str) -> Path:
        if (name, kind) not in made:
            made[name, kind] = trained_adapter(name, kind, tmp_path_factory.mktemp("adapter"))
        return made[name, kind]

    return find


def theirs(tiny, name: str, adapter: Path, trainable: bool = False):
    """PEFT's model of the same files."""
    return peft.PeftModel.from_pretrained(oracle.load(tiny.directory(name)), adapter, is_trainable=trainable)


def ours(tiny, be: Backend, name: str, adapter: Path, dtype: str = "float32"):
    return duetvl.load_model(tiny.directory(name), backend=be, dtype=dtype, adapter=adapter)


# -- numbers ----------------------------------------------------------------------------------------------------------


@every_kind
@every_model
def test_logits_unmerged_and_merged(tiny, be, samples, trained, name, kind):
    adapter = trained(name, kind)
    given = samples["image and video"]
    expected = oracle.logits(theirs(tiny, name, adapter).base_model.model, given)
    assert np.abs(expected - tiny.logits(name, "image and video")).max() > 0.1  # the adapter does something
    model = ours(tiny, be, name, adapter)
    np.testing.assert_allclose(array(be, model.logits(model.pack([given]))), expected, rtol=0, atol=LOGITS)
    model.merge_adapter()
    assert model.adapters is None and not any(map(is_adapter, model.parameters))
    assert model.parameters.keys() == parameter_shapes(model.config).keys()
    np.testing.assert_allclose(array(be, model.logits(model.pack([given]))), expected, rtol=0, atol=LOGITS)


@every_kind
@every_model
def test_gradients(tiny, be, samples, trained, name, kind):
    adapter, given = trained(name, kind), [samples["image and video"], samples["three images"]]
    reference = theirs(tiny, name, adapter, trainable=True)
    expected_loss, found = oracle.loss_and_grads(reference.base_model.model, given)
    expected = {path.replace(".default", ""): gradient for path, gradient in found.items()}
    model = ours(tiny, be, name, adapter)
    loss, gradients = model.loss_and_grads(model.pack(given))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys() == {path for path in model.parameters if is_adapter(path)}
    for path, theirs_ in expected.items():
        difference = np.linalg.norm(array(be, gradients[path]) - theirs_) / np.linalg.norm(theirs_)
        assert difference <= GRADIENTS, (path, difference)
