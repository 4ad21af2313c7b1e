"""Models are read from whatever holds them, without conversion: the same weights, the same answers, named errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_run

import duetvl
from duetvl.convert.commands import hf_to_mm
from duetvl.convert.layouts import Layout
from duetvl.convert.opening import open_merged, open_model
from duetvl.convert.plans import Options
from duetvl.convert.torch_zip import TorchFile
from duetvl.core.backend import Backend
from duetvl.core.boxes import Box, LocalPart, Shape, Slices
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.models.model_directory import ModelDirectory
from duetvl.models.model_directory import open_model as open_plain
from duetvl.models.qwen_vl.adapters import merge_directories
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorFile
from duetvl.storage.weights_dir import load_parameters
from duetvl.training.check import check
from duetvl.training.checkpoints.export import export_run
from duetvl.training.train import train
from tests.convert.tiny import read_hf, same, tiny_config, write_hf

LAYOUTS = {
    "one": Layout(((4,),), ((4,),)),
    "tp 2, pp 2": Layout(((1, 3),), ((4, 0),), 2),
    "virtual, tp 4": Layout(((0, 1), (2, 1)), ((1, 3), (0, 0)), 4, vision_tp=2),
    "canonical": Layout(((2, 2),), ((4, 0),), 2, canonical=True),
    "old qkv": Layout(((1, 3),), ((4, 0),), 2, vision_qkv="hf"),
}


def bits_of(model: ModelDirectory) -> dict[str, np.ndarray]:
    return {name: np.array(model.weights.view(name)) for name in model.weights.names}


# -- MindSpeed-MM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_mindspeed_directories_of_any_layout(tmp_path: Path, family: str, layout: Layout) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config(family, tied=layout.tp == 4))
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", layout, Options())
    model = open_model(tmp_path / "mm", base=tmp_path / "hf")
    if layout.vision_qkv == "hf":
        with pytest.warns(UserWarning, match="read with the qkv order of releases 2.1.0"):
            assert same(bits_of(model), bits)
        return
    assert same(bits_of(model), bits)
    assert model.identity() == {**open_plain(tmp_path / "hf").identity(), "path": str(tmp_path / "mm")}
    rng = np.random.default_rng(0)
    for name, whole in bits.items():
        offset = tuple(int(rng.integers(0, size)) for size in whole.shape)
        box = Box(offset, tuple(int(rng.integers(1, s - o + 1)) for s, o in zip(whole.shape, offset, strict=True)))
        assert np.array_equal(model.weights.read(name, box), whole[box.slices]), name


def test_no_other_parts_are_read_than_the_boxes_asked_for(
    tmp_path: Path, be: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half of each divided tensor, as one of two ranks holds it, comes from the files of one rank."""
    config = tiny_config()
    bits = write_hf(tmp_path / "hf", config)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", LAYOUTS["tp 2, pp 2"], Options())
    weights = open_model(tmp_path / "mm", base=tmp_path / "hf").weights
    shapes = parameter_shapes(config)
    names = [name for name in shapes if name.endswith(("o_proj.weight", "mlp.down_proj.weight", "embed_tokens.weight"))]
    boxes = {
        name: Box((0, 0), (rows // 2, columns) if "embed" in name else (rows, columns // 2))
        for name, (rows, columns) in ((name, shapes[name]) for name in names)
    }
    touched: set[str] = set()
    plain = TorchFile.view
    monkeypatch.setattr(TorchFile, "view", lambda self, name: touched.add(self.path.parent.name) or plain(self, name))
    chosen = {name: weights.read(name, box) for name, box in boxes.items()}
    assert touched == {"mp_rank_00_000", "mp_rank_00_001"}

    def part_of(name: str, shape: Shape) -> LocalPart:
        return LocalPart(shape, Slices((boxes[name],))) if name in boxes else LocalPart.all_of(shape)

    loaded = load_parameters(shapes, weights, be, "bfloat16", part_of=part_of)
    for name, box in boxes.items():
        assert np.array_equal(chosen[name], bits[name][box.slices])
        assert np.array_equal(be.checkpoint_io.save(loaded[name])[0].reshape(box.shape), bits[name][box.slices])


def test_an_iteration_and_settings_that_lie_beside_it(tmp_path: Path) -> None:
    bits = write_hf(tmp_path / "hf", tiny_config())
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", LAYOUTS["one"], Options())
    with pytest.raises(CheckpointError, match=r"is a MindSpeed-MM checkpoint, which has neither .* --base DIR"):
        open_model(tmp_path / "mm")
    (tmp_path / "mm" / "release").rename(tmp_path / "mm" / "iter_0000040")
    (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("40")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "mm")
    for place in (tmp_path / "mm", tmp_path / "mm" / "iter_0000040"):
        with pytest.warns(UserWarning, match="taken as interleaved by heads"):
            assert same(bits_of(open_model(place)), bits)
        assert open_model(place).has_tokenizer


def test_a_base_that_is_another_model(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", tiny_config())
    write_hf(tmp_path / "other", tiny_config(layers=3))
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", LAYOUTS["one"], Options())
    with pytest.raises(CheckpointError, match="its tensors are not those of the model and layout"):
        _ = open_model(tmp_path / "mm", base=tmp_path / "other").weights
    (tmp_path / "hf" / "release").mkdir()
    assert open_model(tmp_path / "hf").weights.names == open_plain(tmp_path / "hf").weights.names
    with pytest.raises(ConfigError, match="is a model in the Hugging Face layout, which needs no base"):
        open_model(tmp_path / "hf", base=tmp_path / "other")


# -- runs and adapters ------------------------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "which colour?"}]


@pytest.fixture(scope="module")
def trained(be: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of two steps and a LoRA run, on models whose answers training changes."""
    directory = tmp_path_factory.mktemp("trained")
    recipe = tiny_run.write_recipe(directory, std=0.2)
    common = ["checkpoint.every=1", "checkpoint.keep_last=null", "optim.lr=0.02", "optim.warmup=0", "train.steps=2"]
    train(recipe, [f"train.output_dir={directory}/full", *common], backend=be)
    train(recipe, [f"train.output_dir={directory}/lora", *common, "lora.rank=4", "lora.alpha=64"], backend=be)
    return directory


def answer(model: duetvl.Model) -> list[int]:
    return model.generate(QUESTION, max_new_tokens=12).token_ids


def test_a_full_run_is_the_model_that_it_exports(trained: Path, be: Backend, tmp_path: Path) -> None:
    for run in (f"{trained}/full", f"{trained}/full@1", f"{trained}/full/checkpoints/step-0000001"):
        target = tmp_path / run.replace("/", "-")
        exported = export_run(run, target)
        assert same(bits_of(open_model(run)), read_hf(exported))
        model = duetvl.load_model(run, backend=be)
        assert answer(model) == answer(duetvl.load_model(exported, backend=be))
    first = answer(duetvl.load_model(f"{trained}/full@1", backend=be))
    assert answer(duetvl.load_model(trained / "full", backend=be)) != first


def test_a_lora_run_and_its_adapter_are_laid_on_the_model(trained: Path, be: Backend, tmp_path: Path) -> None:
    export_run(f"{trained}/lora", tmp_path / "adapter")
    merge_directories(trained / "model", tmp_path / "adapter", tmp_path / "merged")
    model = duetvl.load_model(trained / "lora", backend=be)
    expected = answer(duetvl.load_model(trained / "model", backend=be, adapter=tmp_path / "adapter"))
    assert expected != answer(duetvl.load_model(trained / "model", backend=be))
    for place in (trained / "lora", tmp_path / "adapter"):
        assert answer(duetvl.load_model(place, backend=be)) == expected
        assert same(bits_of(open_merged(place)), read_hf(tmp_path / "merged"))
    model.save_adapter(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(trained / "model")
    with pytest.raises(ConfigError, match="has an adapter of its own"):
        duetvl.load_model(trained / "lora", backend=be, adapter=tmp_path / "adapter")


def test_where_the_model_below_has_gone(trained: Path, tmp_path: Path) -> None:
    export_run(f"{trained}/lora", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(trained / "model"), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match=r"is an adapter, and its base model cannot be read.*gone.*--base DIR"):
        open_model(tmp_path / "adapter")
    moved = open_model(tmp_path / "adapter", base=trained / "model")
    assert moved.adapter is not None and moved.config == open_plain(trained / "model").config
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="is an adapter that does not name its model"):
        open_model(tmp_path / "adapter")
    other = tiny_run.write_model(tmp_path / "other", std=0.3)
    with pytest.raises(
        CheckpointError, match=r"its adapters belong to .*model' with the weights [0-9a-f]{8}, those of"
    ):
        _ = open_model(trained / "lora", base=other).weights
    two = tiny_run.write_model(tmp_path / "two", family="qwen2_vl")
    with pytest.raises(CheckpointError, match="is not the model that its run started from"):
        open_model(trained / "full", base=two)
    assert duetvl.load_processor(trained / "full", base=other).decode([1]) == duetvl.load_processor(other).decode([1])


def test_recipes_start_from_all_of_them(trained: Path, be: Backend, tmp_path: Path) -> None:
    """The first loss is that of the model converted by hand."""
    recipe = trained / "tiny.json"
    export_run(f"{trained}/lora", tmp_path / "adapter")
    merge_directories(trained / "model", tmp_path / "adapter", tmp_path / "merged")
    config = open_plain(trained / "model").config
    hf_to_mm(tmp_path / "merged", tmp_path / "mm", Layout.one_stage(config), Options())

    def loss(number: int, *overrides: str) -> float:
        run = tmp_path / f"run{number}"
        result = train(recipe, [f"train.output_dir={run}", "train.steps=1", *overrides], backend=be)
        assert (run / "export" / "tokenizer.json").exists() == ("checkpoint.export=true" in overrides)
        return result.loss

    expected = loss(0, f"model.path={tmp_path}/merged")
    assert loss(1, f"model.path={trained}/lora") == pytest.approx(expected, rel=1e-6)
    mindspeed = [f"model.path={tmp_path}/mm", f"model.base={trained}/model"]
    assert loss(2, *mindspeed, "checkpoint.export=true") == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(loss(3), rel=1e-3)
    assert any("model: " in line for line in check(recipe, [f"model.path={trained}/lora"]))


def test_adapters_on_a_model_that_has_one(trained: Path, be: Backend, tmp_path: Path) -> None:
    """The run started from the first one merged, and its own adapter belongs on that."""
    words = [f"train.output_dir={tmp_path}/second", "train.steps=1", "optim.lr=0.02", "optim.warmup=0"]
    train(trained / "tiny.json", [*words, f"model.path={trained}/lora", "lora.rank=2", "lora.alpha=64"], backend=be)
    export_run(f"{trained}/lora", tmp_path / "first")
    merge_directories(trained / "model", tmp_path / "first", tmp_path / "merged")
    export_run(f"{tmp_path}/second", tmp_path / "adapter")
    expected = answer(duetvl.load_model(tmp_path / "merged", backend=be, adapter=tmp_path / "adapter"))
    for place in (tmp_path / "second", tmp_path / "adapter"):
        assert answer(duetvl.load_model(place, backend=be)) == expected


# -- what is none -----------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_named(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "odd").mkdir()
    with pytest.raises(CheckpointError, match=r"odd: is not a model: expected .*, found an empty directory"):
        open_model(tmp_path / "odd")
    (tmp_path / "odd" / "photo.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"odd: is not a model: expected .*, found photo.png"):
        open_model(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"photo.png: is not a model: expected .*, found a file"):
        open_model(tmp_path / "odd" / "photo.png")
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; there are 1, 2"):
        open_model(f"{trained}/full@7")
    tiny_run.write_model(tmp_path / "cleaned" / "export")
    with pytest.raises(CheckpointError, match=r"give the model that it exported: .*cleaned/export"):
        open_model(tmp_path / "cleaned")
    with pytest.raises(CheckpointError, match="no such directory"):
        _ = open_model(tmp_path / "none").config
    broken = shutil.copytree(trained / "full", tmp_path / "broken")
    file = next((broken / "checkpoints" / "step-0000002").glob("weights-*"))
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        _ = open_model(broken).weights
    assert TensorFile(next((broken / "checkpoints" / "step-0000001").glob("weights-*"))).specs
    (broken / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a model \(config.json\) and a run"):
        open_model(broken)
