"""Adapters of peft to MindSpeed-MM's canonical structure and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from duetvl.convert.cli import main
from duetvl.models.qwen_vl.parameters import parameter_shapes
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file
from tests.convert.tiny import mm_files, random_bits, tiny_config

torch = pytest.importorskip("torch")

RANK = 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "attn.qkv", "attn.proj")
CANONICAL = "--cfg.common_model_config.enable_canonical_hf_struct true"
PREFIX = "--cfg.common_model_config.model_prefix base_model.model."
NEW = "--cfg.common_model_config.new_transformers_weight_key true"


def write_adapter(directory: Path, *, new_names: bool) -> dict[str, np.ndarray]:
    """As peft saves it, by canonical names without its prefix."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in parameter_shapes(tiny_config()).items():
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = random_bits((RANK, shape[1]), "float32", rng)
            tensors[f"{stem}.lora_B.weight"] = random_bits((shape[0], RANK), "float32", rng)
    stored = {"base_model.model." + (renamed(name) if new_names else name): name for name in tensors}
    directory.mkdir()
    specs = {key: TensorSpec("float32", tensors[name].shape) for key, name in stored.items()}
    write_tensor_file(
        directory / "adapter_model.safetensors", specs, lambda key: tensors[stored[key]], {"format": "pt"}
    )
    return tensors


def renamed(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize("new_names", [False, True])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_names: bool) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = write_adapter(Path("lora"), new_names=new_names)
    new = NEW if new_names else ""
    division = "--cfg.parallel_config.tp_size 2 --cfg.parallel_config"
    line = f"""Qwen2_5_VLConverter lora_hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir lora {CANONICAL} {PREFIX} {new}
        {division}.llm_pp_layers [[1,3]] --cfg.parallel_config.vit_pp_layers [[4,0]]"""
    assert main(line.split()) == 0
    line = f"""Qwen2_5_VLConverter lora_mm_to_hf --cfg.save_hf_dir back --cfg.mm_dir mm {CANONICAL} {PREFIX} {new}
        {division}.llm_pp_layers [1,3] --cfg.parallel_config.vit_pp_layers [4,0]"""
    assert main(line.split()) == 0
    file = TensorFile(Path("back/adapter_model.safetensors"))
    wanted = {"base_model.model." + (renamed(name) if new_names else name): bits for name, bits in tensors.items()}
    assert file.specs.keys() == wanted.keys()
    assert all(np.array_equal(file.view(name), bits) for name, bits in wanted.items())
    assert [path.name for path in Path("back").iterdir()] == ["adapter_model.safetensors"]


def test_where_adapters_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A by columns of linear_proj and linear_fc2, B by rows of the others, all else whole on every rank."""
    monkeypatch.chdir(tmp_path)
    tensors = write_adapter(Path("lora"), new_names=False)
    line = f"""Qwen2_5_VLConverter lora_hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir lora {CANONICAL} {PREFIX}
        --cfg.parallel_config.tp_size 2 --cfg.parallel_config.llm_pp_layers [[0,1,3]]
        --cfg.parallel_config.vit_pp_layers [[3,1,0]]"""
    assert main(line.split()) == 0
    files = mm_files(tmp_path / "mm")
    second = files["mp_rank_01_002"]["model"]
    text = {name: torch.from_numpy(bits.copy()) for name, bits in tensors.items()}
    for module, name, cut in (
        ("self_attention.q_proj", "self_attn.q_proj", "B"), ("self_attention.k_proj", "self_attn.k_proj", "B"),
        ("mlp.up_proj", "mlp.up_proj", "B"), ("self_attention.linear_proj", "self_attn.o_proj", "A"),
        ("mlp.linear_fc2", "mlp.down_proj", "A"),
    ):  # fmt: skip
        for letter in "AB":
            whole = text[f"model.layers.1.{name}.lora_{letter}.weight"]
            wanted = whole.chunk(2, dim=1 if letter == "A" else 0)[1] if letter == cut else whole
            assert second[f"text_decoder.decoder.layers.0.{module}.lora_{letter}.default.weight"].equal(wanted)
    vision = files["mp_rank_00_001"]["model"]
    prefix = "image_encoder.encoder.blocks.layers.0.self_attention.linear_qkv.lora_"
    assert vision[f"{prefix}A.default.weight"].equal(text["visual.blocks.3.attn.qkv.lora_A.weight"])
    assert vision[f"{prefix}B.default.weight"].equal(text["visual.blocks.3.attn.qkv.lora_B.weight"].chunk(2)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (CANONICAL, "enable_canonical_hf_struct must be true"),
        (PREFIX, "is no LoRA tensor of these models"),
        ("[[1,3]]", "the adapter in lora is for at least 4"),
    ],
)
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("lora"), new_names=False)
    line = f"""Qwen2_5_VLConverter lora_hf_to_mm --cfg.mm_dir mm --cfg.hf_config.hf_dir lora {CANONICAL} {PREFIX}
        --cfg.parallel_config.llm_pp_layers [[1,3]] --cfg.parallel_config.vit_pp_layers [[4,0]]"""
    assert main(line.replace(change, "[[1,2]]" if change[0] == "[" else "").split()) == 2
    assert message in capsys.readouterr().err
    assert not Path("mm").exists()
