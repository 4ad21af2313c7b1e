"""LoRA, rsLoRA and DoRA on both backends against PEFT on transformers' models: logits, gradients, merging, files.

Limits are four times the largest difference measured over all cases below (x86 CPU, torch 2.13, MindSpore 2.10,
transformers 4.57.6, PEFT 0.21.2; logits have a standard deviation of about 1).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.cli import main
from duetvl.core.backend import Backend
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.random import philox
from duetvl.models.lora import Adapters, Size, is_adapter
from duetvl.models.qwen_vl.adapters import add_adapters, layers, open_adapter_for, peft_targets
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.names import module_name
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorFile

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

LOGITS = 7e-5  # measured: 1.7e-5 on torch, 1.7e-5 on MindSpore
GRADIENTS = 4e-5  # relative to the norm of each tensor; 9.2e-6, 1.0e-5
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


@every_model
def test_a_new_adapter_changes_nothing_and_starts_as_in_peft(tiny, be, samples, name):
    model = duetvl.load_model(tiny.directory(name), backend=be)
    batch = model.pack([samples["image"]])
    before = array(be, model.logits(batch))
    modules = layers(model.config).choose(("language", "vision", "projector"))
    add_adapters(model, Adapters(dict.fromkeys(modules, Size(4, 8.0)), dora=True), seed=1)
    np.testing.assert_allclose(array(be, model.logits(batch)), before, rtol=0, atol=LOGITS)
    for path, parameter in model.parameters.items():
        values = array(be, parameter.tensor)
        if path.endswith("lora_A.weight"):
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < np.abs(values).max() <= bound, path
        elif path.endswith("lora_B.weight"):
            assert not values.any()
        elif "magnitude" in path:
            weight = array(be, model.parameters[path.replace("lora_magnitude_vector.", "")].tensor)
            np.testing.assert_allclose(values, np.linalg.norm(weight, axis=1), rtol=1e-5)
    assert {path for path, p in model.parameters.items() if p.trainable} == set(filter(is_adapter, model.parameters))


@every_model
def test_without_its_adapters_a_model_is_what_it_was(tiny, be, samples, trained, name):
    model = ours(tiny, be, name, trained(name, "dora"))
    base = model.without_adapters()
    batch = base.pack([samples["image"]])
    np.testing.assert_allclose(array(be, base.logits(batch)), tiny.logits(name, "image"), rtol=0, atol=LOGITS)
    assert base.parameters["model.norm.weight"].tensor is model.parameters["model.norm.weight"].tensor


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_bfloat16_base_with_float32_adapters(tiny, be, samples, trained, kind):
    """Against the same adapter on the float32 model; without an adapter half precision costs 0.016."""
    adapter = trained("qwen2.5-untied", kind)
    expected = oracle.logits(theirs(tiny, "qwen2.5-untied", adapter).base_model.model, samples["image"])
    model = ours(tiny, be, "qwen2.5-untied", adapter, dtype="bfloat16")
    batch = model.pack([samples["image"]])
    dtypes = {is_adapter(path): be.ops.dtype_of(p.tensor) for path, p in model.parameters.items()}
    assert dtypes == {True: "float32", False: "bfloat16"}
    loss, gradients = model.loss_and_grads(batch)
    assert np.isfinite(loss) and {be.ops.dtype_of(gradient) for gradient in gradients.values()} == {"float32"}
    unmerged = array(be, model.logits(batch))
    model.merge_adapter()
    assert be.ops.dtype_of(model.parameters["model.layers.0.mlp.up_proj.weight"].tensor) == "bfloat16"
    for found in (unmerged, array(be, model.logits(batch))):
        assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


# -- dropout ----------------------------------------------------------------------------------------------------------


KEYS = [(), (0, 1, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]


def with_dropout(tiny, be: Backend, dora: bool = False):
    """A model with adapters everywhere whose B is not zero."""
    model = duetvl.load_model(tiny.directory("qwen2.5-untied"), backend=be)
    modules = layers(model.config).choose(("language", "vision", "projector"))
    add_adapters(model, Adapters(dict.fromkeys(modules, Size(4, 40.0)), dropout=0.3, dora=dora), seed=1)
    for path, parameter in model.parameters.items():
        if path.endswith("lora_B.weight"):
            values = philox(5, path).standard_normal(parameter.shape, dtype=np.float32) * np.float32(0.05)
            be.ops.assign(parameter.tensor, be.ops.from_numpy(values))
    return model


def test_masks_are_of_the_pass_and_the_same_on_both_backends(tiny, samples):
    pytest.importorskip("mindspore")
    found = []
    for name in ("torch", "mindspore"):
        model = with_dropout(tiny, duetvl.load_backend(name, device="cpu"))
        batch = model.pack([samples["image"]])
        found.append([float(model.backend.to_numpy(model.forward_loss(batch, key=key)[0])) for key in KEYS])
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert found[0][1] == found[0][2]
    different = [*found[0][:2], *found[0][3:]]
    assert min(abs(a - b) for i, a in enumerate(different) for b in different[:i]) > 1e-3 * different[0]


def gradients_of(model, batch, key) -> list[np.ndarray]:
    """The loss, then the gradients of the adapters."""
    be = model.backend
    loss, tape = model.forward_loss(batch, key=key)
    be.autograd.backward(tape, [be.ops.from_numpy(np.ones((), np.float32))])
    found = [array(be, loss), *(array(be, p.main_grad) for p in model.parameters.values() if p.trainable)]
    for parameter in model.parameters.values():
        parameter.main_grad = None
    return found


@pytest.mark.parametrize("dora", [False, True])
def test_masks_are_the_same_when_activations_are_computed_again(tiny, be, samples, dora):
    """The frozen embedding's rows need no gradient, so nothing that enters the first block does."""
    model = with_dropout(tiny, be, dora)
    batch = model.pack([samples["image and video"]])
    kept = gradients_of(model, batch, KEYS[1])
    for mode in ("full", "selective"):
        model.recompute = mode
        for one, again in zip(kept, gradients_of(model, batch, KEYS[1]), strict=True):
            np.testing.assert_allclose(again, one, rtol=0, atol=1e-5 * np.abs(one).max())


# -- patterns ---------------------------------------------------------------------------------------------------------


PATTERNS = [  # (rank_pattern, alpha_pattern), as users of PEFT write them
    ({}, {"model.language_model.layers.0.self_attn.q_proj": 9}),  # a name of transformers >= 4.52
    ({}, {"model.layers.0.self_attn.q_proj": 9}),  # one of before: PEFT passes over it today, and warns
    ({}, {r".*language_model.*\.(q|v)_proj": 9, "q_proj": 11}),  # the first that matches counts
    ({}, {r"model\.visual\..*": 9, r"^language_model": 11, "_proj": 13}),  # whole steps of a name, or its beginning
    ({}, {r"layers\.(\d)\.mlp\.up_proj": 9, "q_proj|k_proj": 4}),
    ({r"model\.language_model\.layers\.0\..*": 2, "visual.blocks.0.attn.qkv": 4}, {r"language_model\..*down_proj": 9}),
    ({"up_proj": 2}, {"model.visual.merger.mlp.0": 9, "self_attn.*": 11}),
]


def scales(model) -> dict[str, float]:
    """What PEFT multiplies each module's product by."""
    return {
        path.removeprefix("base_model.model."): module.scaling["default"]
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(("ranks", "alphas"), PATTERNS)
@pytest.mark.filterwarnings("ignore:.*(did not match any|matches no layer)")
def test_patterns_mean_what_they_mean_in_peft(tiny, ranks, alphas, tmp_path):
    options = {"rank_pattern": ranks, "alpha_pattern": alphas}
    adapter = trained_adapter("qwen2.5-untied", "lora", tmp_path / "adapter", **options)
    expected = scales(theirs(tiny, "qwen2.5-untied", adapter))
    adapters = open_adapter_for(load_config(tiny.directory("qwen2.5-untied")), adapter).adapters
    assert {module_name(module): adapters.scale(module) for module in adapters.sizes} == pytest.approx(expected)


def old_name(name: str) -> str:
    """A name as transformers before 4.52 has it; of a tensor, a module or a pattern."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


NEW = {
    "rank_pattern": {r"model.language_model.layers.1.mlp.up_proj": 2, "merger.mlp.0": 4},
    "alpha_pattern": {"model.visual.blocks.0.attn.qkv": 7, "model.language_model.layers.0.self_attn.q_proj": 9},
}
OLD = {field: {old_name(key): value for key, value in patterns.items()} for field, patterns in NEW.items()}


@pytest.mark.parametrize(("tensors", "patterns"), [("old", OLD), ("old", NEW), ("new", OLD)])
def test_patterns_of_either_layout(tiny, tmp_path, tensors, patterns):
    """Of the tensors' own layout, of today's, and of the old one where the ranks prove it."""
    source = trained_adapter("qwen2.5-untied", "lora", tmp_path / "source", **NEW)
    adapter = rewritten(source, tmp_path / "adapter", old_name if tensors == "old" else str, **patterns)
    config = load_config(tiny.directory("qwen2.5-untied"))
    assert open_adapter_for(config, adapter).adapters == open_adapter_for(config, source).adapters


def test_a_pattern_without_effect_is_told(tiny, trained, tmp_path, capsys):
    adapter = rewritten(trained("qwen2-tied", "lora"), tmp_path / "adapter", alpha_pattern={"layers.7.mlp": 3})
    with pytest.warns(UserWarning, match=r"adapter_config.json: alpha_pattern: 'layers.7.mlp' matches no layer"):
        open_adapter_for(load_config(tiny.directory("qwen2-tied")), adapter)
    assert main(["merge", str(tiny.directory("qwen2-tied")), str(adapter), "-o", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"warning: {adapter}/adapter_config.json: alpha_pattern: 'layers.7.mlp' matches no layer")


# -- files ------------------------------------------------------------------------------------------------------------


@every_kind
@every_model
def test_peft_loads_what_we_save(tiny, be, samples, trained, name, kind, tmp_path):
    model = ours(tiny, be, name, trained(name, kind))
    model.save_adapter(tmp_path / "saved")
    reference = theirs(tiny, name, tmp_path / "saved")
    found = oracle.logits(reference.base_model.model, samples["image"])
    expected = oracle.logits(theirs(tiny, name, trained(name, kind)).base_model.model, samples["image"])
    np.testing.assert_array_equal(found, expected)
    before, after = (
        TensorFile(path / "adapter_model.safetensors") for path in (trained(name, kind), tmp_path / "saved")
    )
    assert before.specs == after.specs
    assert all(np.array_equal(before.view(key), after.view(key)) for key in before.specs)
    with pytest.raises(CheckpointError, match="exists already"):
        model.save_adapter(tmp_path / "saved")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["*.mlp.gate_proj"], ["gate_proj"]),
        (["language"], "regular expression"),
        (["model.layers.1"], "regular expression"),
        (["vision"], "regular expression"),
        (["projector", "visual.blocks.0-1.attn"], "regular expression"),
    ],
)
def test_peft_finds_the_layers_that_a_recipe_names(tiny, targets, expected):
    config = load_config(tiny.directory("qwen2.5-untied"))
    modules = layers(config).choose(targets)
    found = peft_targets(config, modules)
    assert found == expected or (expected == "regular expression" and isinstance(found, str))
    model = peft.get_peft_model(oracle.make("qwen2.5-untied"), peft.LoraConfig(target_modules=found))
    with_adapter = {path.split(".lora_A")[0] for path, _ in model.named_parameters() if "lora_A" in path}
    assert with_adapter == {f"base_model.model.{module_name(module)}" for module in modules}


def rewritten(source: Path, target: Path, rename=lambda key: key, skip=lambda key: False, **changes) -> Path:
    """A copy of an adapter with other names of tensors and other values in its configuration."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {rename(key): tensor.contiguous() for key, tensor in tensors.items() if not skip(key)}
    save_file(kept, target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize("names", ["of transformers before 4.52", "with the adapter's own"])
def test_other_names_of_tensors_are_read(tiny, be, trained, tmp_path, names):
    def old(key: str) -> str:
        return key.replace("model.language_model.", "model.").replace("model.model.visual.", "model.visual.")

    def full(key: str) -> str:
        return key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")

    source = trained("qwen2-tied", "dora")
    rename = old if names.startswith("of") else full
    adapter = rewritten(source, tmp_path / "other", rename)
    one, other = (ours(tiny, be, "qwen2-tied", path) for path in (source, adapter))
    assert one.parameters.keys() == other.parameters.keys() and one.adapters == other.adapters


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (ConfigError, {"peft_type": "IA3"}, "peft_type 'IA3' is not implemented"),
        (ConfigError, {"modules_to_save": ["lm_head"]}, "modules_to_save .*merge_and_unload"),
        (ConfigError, {"bias": "all"}, "trained biases"),
        (ConfigError, {"init_lora_weights": "pissa"}, "changes the base model's weights"),
        (
            ConfigError,
            {"use_qalora": True, "layer_replication": [[0, 2]]},
            "layer_replication .*, use_qalora True: not",
        ),
        (CheckpointError, {"r": 5}, r"has 3 rows, adapter_config.json says rank 5"),
        (CheckpointError, {"alpha_pattern": {"(": 5}}, "cannot be read"),
        (ConfigError, {"alpha_pattern": {"qkv": -1}}, "rank 3 and alpha -1 must be more than 0"),
        (ConfigError, {"use_rslora": "false"}, "use_rslora 'false' must be true or false"),
        (ConfigError, {"lora_dropout": "much"}, "lora_dropout 'much' must be a number"),
        (CheckpointError, {"use_dora": True}, "absent .*lora_magnitude_vector"),
        (CheckpointError, {"lora_alpha": None}, "cannot be read"),
    ],
)
def test_configurations_that_are_refused(tiny, be, trained, tmp_path, error, changes, message):
    adapter = rewritten(trained("qwen2-tied", "lora"), tmp_path / "adapter", **changes)
    with pytest.raises(error, match=message):
        ours(tiny, be, "qwen2-tied", adapter)


@pytest.mark.parametrize(
    ("model", "skip", "message"),
    [
        ("qwen2-tied", "", r"adapter for another model: .* of layers that the model does not have"),
        ("qwen2.5-real-heads", "visual", r"of another shape \(.*lora_A.weight \[3, 32\] instead of \[3, 256\]"),
        ("qwen2.5-untied", "0.self_attn.q_proj.lora_B", r"1 absent \(model.layers.0.self_attn.q_proj.lora_B.weight\)"),
        ("qwen2.5-untied", "0.self_attn.q_proj.lora_A", r"1 without its lora_A \(model.layers.0.self_attn.q_proj\)"),
        ("qwen2.5-untied", "base_model", r"it has no tensors"),
    ],
)
def test_an_adapter_of_another_model(tiny, be, trained, tmp_path, model, skip, message):
    source = trained("qwen2.5-untied", "lora")
    adapter = rewritten(source, tmp_path / "adapter", skip=lambda key: bool(skip) and skip in key)
    with pytest.raises(CheckpointError, match=message):
        ours(tiny, be, model, adapter)


def test_what_is_no_adapter(tiny, be, trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        ours(tiny, be, "qwen2-tied", tiny.directory("qwen2-tied"))
    source = trained("qwen2-tied", "lora")
    strange = rewritten(source, tmp_path / "strange", lambda key: key.replace("lora_A", "lora_E"))
    with pytest.raises(CheckpointError, match="is not a tensor of a LoRA adapter"):
        ours(tiny, be, "qwen2-tied", strange)
    pickled = tmp_path / "pickled"
    shutil.copytree(source, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is a pickle"):
        ours(tiny, be, "qwen2-tied", pickled)


def test_a_plain_model_has_nothing_to_merge_and_one_with_an_adapter_is_not_saved_whole(tiny, be, trained, tmp_path):
    with pytest.raises(ConfigError, match="has no adapter"):
        tiny.ours("qwen2-tied", be).merge_adapter()
    with pytest.raises(ConfigError, match="merge it first"):
        ours(tiny, be, "qwen2-tied", trained("qwen2-tied", "lora")).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@every_kind
@every_model
def test_merging_directories_gives_what_peft_merges(tiny, trained, name, kind, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["merge", str(tiny.directory(name)), str(trained(name, kind)), "-o", str(out)]) == 0
    expected = theirs(tiny, name, trained(name, kind)).merge_and_unload().state_dict()
    found = oracle.load(out).state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6)
    assert main(["merge", str(tiny.directory(name)), str(trained(name, kind)), "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_merging_keeps_bfloat16_and_rounds_once(tiny, be, trained, tmp_path):
    duetvl.load_model(tiny.directory("qwen2-tied"), backend=be, dtype="bfloat16").save_pretrained(tmp_path / "half")
    adapter = trained("qwen2-tied", "dora")
    assert main(["merge", str(tmp_path / "half"), str(adapter), "-o", str(tmp_path / "merged")]) == 0
    on_device = duetvl.load_model(tmp_path / "half", backend=be, dtype="bfloat16", adapter=adapter)
    on_device.merge_adapter()
    merged = duetvl.load_model(tmp_path / "merged", backend=be, dtype="bfloat16")
    file = TensorFile(tmp_path / "merged" / "model.safetensors")
    assert {spec.dtype for spec in file.specs.values()} == {"bfloat16"}
    for path, parameter in merged.parameters.items():
        assert np.array_equal(be.to_numpy(parameter.tensor), be.to_numpy(on_device.parameters[path].tensor)), path
