"""Adapters that MindSpeed-MM trained on fused tensors: the same change of the model, written as peft has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from duetvl.convert.cli import main
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorFile
from tests.convert.tiny import expected_files, split, tiny_config, write_hf

RANK = 3
TEXT, VISION = [[1, 3]], [[4, 0]]
FUSED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
CONVERTERS = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}
Change = dict[tuple[str, str], torch.Tensor]  # (stage's folder, fused weight) -> what the adapter adds to it


def small(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Whole numbers, so that sums are exact."""
    return torch.randint(-3, 4, shape, generator=rng).float()


def matrices(config: ModelConfig) -> Iterator[tuple[str, str, torch.Size]]:
    """Stage's folder, name and shape of each fused matrix that adapters are on, before it is divided over ranks."""
    zeros = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    for folder, content in expected_files(zeros, config, TEXT, VISION, 1).items():
        for name, tensor in content["model"].items():
            if ".layers." in name and name.endswith(tuple(f"{module}.weight" for module in FUSED)):
                yield folder, name, tensor.shape


def write_mm(config: ModelConfig, tp: int, chosen: str = "", prefix: str = "mm") -> Change:
    """A trained checkpoint of an adapter, as tensor parallelism divides it; what it adds to each fused matrix."""
    rng = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    change: Change = {}
    for folder, name, shape in matrices(config):
        stem = name.removesuffix(".weight")
        if chosen not in stem:
            continue
        a, b = small(rng, RANK, shape[1]), small(rng, shape[0], RANK)
        change[folder, name] = b @ a
        row_parallel = stem.endswith(("linear_proj", "linear_fc2"))
        for rank in range(tp):
            file = files.setdefault(folder.replace("mp_rank_00", f"mp_rank_{rank:02}"), {})
            file[f"{stem}.lora_A.default.weight"] = a.chunk(tp, dim=1)[rank].clone() if row_parallel else a
            file[f"{stem}.lora_B.default.weight"] = b if row_parallel else split(name, b, rank, tp, config).clone()
    for folder in {place.replace("mp_rank_00", f"mp_rank_{rank:02}") for place, *_ in matrices(config)
                   for rank in range(tp)}:  # fmt: skip
        path = Path(prefix) / "iter_0000005" / folder
        path.mkdir(parents=True)
        content = {"model": files.get(folder, {}), "checkpoint_version": 3.0, "iteration": 5}
        torch.save(content, path / "model_optim_rng.pt")
    (Path(prefix) / "latest_checkpointed_iteration.txt").write_text("5")
    return change


def read_back(config: ModelConfig) -> Mapping[tuple[str, str], torch.Tensor]:
    """What the written adapter adds to each fused matrix."""
    file = TensorFile("back/adapter_model.safetensors")
    tensors = {name: torch.from_numpy(file.view(name).copy()) for name in file.specs}
    added = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            added[name] = tensors[key.replace("lora_A", "lora_B")] @ a
    files = expected_files(added, config, TEXT, VISION, 1)
    return {(folder, name): files[folder]["model"][name] for folder, name, _ in matrices(config)}


def line(family: str, tp: int, *more: str) -> list[str]:
    return [CONVERTERS[family], "lora_mm_to_hf", "--cfg.save_hf_dir", "back", "--cfg.mm_dir", "mm",
            "--cfg.parallel_config.llm_pp_layers", "[1,3]", "--cfg.parallel_config.vit_pp_layers", "[4,0]",
            "--cfg.parallel_config.tp_size", str(tp), "--cfg.common_model_config.model_prefix", "base_model.model.",
            *more]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModelConfig:
    monkeypatch.chdir(tmp_path)
    family = getattr(request, "param", "qwen2_5_vl")
    made = tiny_config(family)
    write_hf(Path("hf"), made)
    return made


HF = ("--cfg.hf_config.hf_dir", "hf")


@pytest.mark.parametrize("config", ["qwen2_vl", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("tp", [1, 2])
def test_adds_the_same(config: ModelConfig, tp: int) -> None:
    change = write_mm(config, tp)
    assert main(line(config.model_type, tp, *HF)) == 0
    found = read_back(config)
    assert found.keys() == change.keys()
    assert all(torch.equal(found[place], wanted) for place, wanted in change.items())
    names = TensorFile("back/adapter_model.safetensors").specs
    layer = "base_model.model.model.layers.2."
    assert {n.removeprefix(layer) for n in names if n.startswith(layer)} == {
        f"{module}.lora_{letter}.weight" for letter in "AB"
        for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                       "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip


def test_one_module_alone(config: ModelConfig) -> None:
    """Of one tower, so that the other's place in the lists has no tensors."""
    change = write_mm(config, 2, "text_decoder.decoder.layers.0.self_attention.linear_qkv")
    assert main(line("qwen2_5_vl", 2, *HF)) == 0
    found = read_back(config)
    assert len(change) == 2
    assert all(torch.equal(found[place], change.get(place, torch.zeros_like(delta))) for place, delta in found.items())


def test_stages_that_are_stated_wrong(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Which layer of the model a stage's first is depends on the lists alone."""
    write_mm(config, 1, "mlp")
    assert main([word.replace("[1,3]", "[2,3]") for word in line("qwen2_5_vl", 1)]) == 0
    assert "stage 0 has adapters on 1 of the 2 text layers that are stated for it" in capsys.readouterr().out


def test_needs_the_heads(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """Which rows are q, k and v depends on them; without fused q, k, v they do not matter."""
    write_mm(config, 1)
    assert main(line("qwen2_5_vl", 1)) == 2
    assert "its heads cannot be told from its files; add --cfg.hf_config.hf_dir" in capsys.readouterr().err
    assert not Path("back").exists()
    change = write_mm(config, 1, "linear_fc1", prefix="plain")
    assert main([word.replace("mm", "plain") if word == "mm" else word for word in line("qwen2_5_vl", 1)]) == 0
    found = read_back(config)
    assert all(torch.equal(found[place], wanted) for place, wanted in change.items())


def test_order_of_old_releases(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """B has the rows of the base that it was trained on: said where it is assumed, [q; k; v] where it is stated."""
    change = write_mm(config, 1, "image_encoder.encoder.blocks.layers.1.self_attention.linear_qkv")
    assert main(line("qwen2_5_vl", 1, *HF)) == 0
    assert "warning: " in (said := capsys.readouterr().out)
    assert "add --cfg.vit_qkv_layout hf" in said
    assert all(torch.equal(read_back(config)[place], wanted) for place, wanted in change.items())
    assert main([*line("qwen2_5_vl", 1, *HF), "--cfg.vit_qkv_layout", "hf", "--cfg.overwrite"]) == 0
    assert "--cfg.vit_qkv_layout" not in capsys.readouterr().out
    file = TensorFile("back/adapter_model.safetensors")
    a, b = (file.view(f"base_model.model.visual.blocks.1.attn.qkv.lora_{letter}.weight") for letter in "AB")
    assert torch.equal(torch.from_numpy(b @ a), next(iter(change.values())))


def test_adapters_that_are_not_one(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A that the ranks do not share, another model, other layers, both structures, the wrong flag."""
    write_mm(config, 2)
    path = Path("mm/iter_0000005/mp_rank_01_001/model_optim_rng.pt")
    content = torch.load(path)
    name = "text_decoder.decoder.layers.1.mlp.linear_fc1.lora_A.default.weight"
    before = content["model"][name].clone()

    def said(*more: str) -> str:
        assert main(line("qwen2_5_vl", 2, *more)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not Path("back").exists()
        return error

    content["model"][name] = before + 1
    torch.save(content, path)
    assert "its ranks did not train one adapter" in said(*HF)
    content["model"][name] = before
    torch.save(content, path)
    write_hf(Path("other"), tiny_config(heads=4, kv_heads=2))
    assert "of the adapter do not fit the model of hf_dir" in said("--cfg.hf_config.hf_dir", "other")
    write_hf(Path("longer"), tiny_config(layers=5))
    assert "places 4 text layers, the model has 5" in said("--cfg.hf_config.hf_dir", "longer")
    assert "is a model of type" in main_error("qwen2_vl", capsys)
    assert "but enable_canonical_hf_struct is true" in said(
        *HF, "--cfg.common_model_config.enable_canonical_hf_struct", "true"
    )
    content["model"]["text_decoder.decoder.layers.1.self_attention.q_proj.lora_A.default.weight"] = torch.ones(3, 64)
    torch.save(content, path)
    assert "also for separate ones" in said(*HF)


def main_error(family: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(line(family, 2, *HF)) == 2
    return capsys.readouterr().err
