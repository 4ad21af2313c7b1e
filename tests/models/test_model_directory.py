"""What belongs to a model and what only lies beside it: found, copied, named and checked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.cli import main
from duetvl.core.errors import CheckpointError
from duetvl.models.model_directory import ModelDirectory, open_model
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.loading import save_model
from duetvl.storage.tensor_files import TensorFile, TensorSpec, write_tensor_file

OWN = {
    "tokenizer.json": "{}", "tokenizer_config.json": "{}", "vocab.json": "{}", "merges.txt": "",
    "chat_template.jinja": "x", "additional_chat_templates/tool_use.jinja": "y", "preprocessor_config.json": "{}",
    "generation_config.json": "{}",
    "video_preprocessor_config.json": "{}", "configuration.json": "{}", "LICENSE": "free", "README.md": "a card",
}  # fmt: skip
LEFT = {  # by a trainer, or in another form
    "trainer_state.json": "{}", "training_args.json": "{}", "all_results.json": "{}", "trainer_log.jsonl": "{}",
    "latest": "global_step5", "rng_state_0.pth": "", "scheduler.pt": "", "model-q8.gguf": "", "adapter_model.bin": "",
    "additional_chat_templates/notes.txt": "", "checkpoint-5/config.json": "{}", ".gitattributes": "", "run.log": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tiny, tmp_path_factory) -> Path:
    """A model with an adapter that was trained on it beside it, and with what a trainer leaves."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("beside") / "both"
    shutil.copytree(tiny.directory("qwen2.5-tied"), directory)
    model = peft.get_peft_model(oracle.make("qwen2.5-tied"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "lora_B" in path:
                weight.fill_(0.1)
    model.save_pretrained(directory)
    for name, text in (OWN | LEFT).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def same_weights(found: Path, expected) -> None:
    torch = pytest.importorskip("torch")
    theirs = oracle.load(found).state_dict()
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[key], expected[key]) for key in expected)


def test_only_what_belongs_to_the_model_is_copied(tiny, be, both, tmp_path):
    duetvl.load_model(both, backend=be).save_pretrained(tmp_path / "saved")
    assert files(tmp_path / "saved") == {*OWN, "config.json", "model.safetensors"}
    same_weights(tmp_path / "saved", tiny.theirs("qwen2.5-tied").state_dict())


def test_merging_a_directory_with_the_adapter_in_it(both, tmp_path):
    """PEFT merges the same, and transformers finds no adapter in the result."""
    peft = pytest.importorskip("peft")
    assert main(["merge", str(both), str(both), "-o", str(tmp_path / "merged")]) == 0
    assert files(tmp_path / "merged") == {*OWN, "config.json", "model.safetensors"}
    plain = shutil.copytree(both, tmp_path / "plain", ignore=shutil.ignore_patterns("adapter_*"))
    merged = peft.PeftModel.from_pretrained(oracle.load(plain), both).merge_and_unload().state_dict()
    found = oracle.load(tmp_path / "merged").state_dict()
    assert found.keys() == merged.keys()
    assert all(np.allclose(found[key], merged[key], rtol=0, atol=1e-6) for key in merged)
    key = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(found[key], oracle.load(plain).state_dict()[key])


@pytest.mark.parametrize("name", ["Qwen/Tiny-VL", "modelscope:Qwen/Tiny-VL", "ckpt/model"])
def test_an_adapter_names_its_model_as_the_user_does(tiny, be, both, tmp_path, name):
    model = duetvl.load_model(tiny.directory("qwen2.5-tied"), backend=be, adapter=both)
    model.source = ModelDirectory(name, model.source.path, "0123abc")
    model.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name.removeprefix("modelscope:")


def test_a_path_stays_as_it_was_given(tiny, be, both, monkeypatch):
    monkeypatch.chdir(tiny.directory("qwen2.5-tied").parent)
    model = duetvl.load_model("qwen2.5-tied", backend=be, adapter=both)
    assert (model.source.name, model.source.revision) == ("qwen2.5-tied", None)
    assert model.source.identity().keys() == {"path", "fingerprint"}


# -- the head ---------------------------------------------------------------------------------------------------------


def with_head(source: Path, target: Path, change=lambda head: head, dtype: str = "float32") -> Path:
    """A copy of a tied model that stores its head as well."""
    shutil.copytree(source, target)
    (path,) = target.glob("*.safetensors")
    file = TensorFile(path)
    tensors = {key: np.array(file.view(key)) for key in file.specs}
    name = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = change(tensors[name].copy()).astype(dtype)
    specs = {**file.specs, "lm_head.weight": TensorSpec(dtype, tensors["lm_head.weight"].shape)}
    write_tensor_file(path, specs, tensors.__getitem__, {"format": "pt"})
    return target


def changed(head: np.ndarray) -> np.ndarray:
    head[-1, -1] += 1
    return head


@pytest.mark.parametrize(("change", "dtype"), [(changed, "float32"), (np.transpose, "float32"), (np.copy, "float16")])
def test_a_tied_model_that_stores_another_head_is_refused(tiny, be, tmp_path, change, dtype):
    directory = with_head(tiny.directory("qwen2.5-tied"), tmp_path / "odd", change, dtype)
    with pytest.raises(CheckpointError, match=r"ties the head to the embedding .* with other values .* to false"):
        duetvl.load_model(directory, backend=be)
    edited = json.loads((directory / "config.json").read_text())
    edited["text_config"]["tie_word_embeddings"] = edited["tie_word_embeddings"] = False
    (directory / "config.json").write_text(json.dumps(edited))
    if change is changed:
        model = duetvl.load_model(directory, backend=be)
        head, embedding = (model.parameters[f"{name}.weight"].tensor for name in ("lm_head", "model.embed_tokens"))
        assert float(be.to_numpy(head)[-1, -1] - be.to_numpy(embedding)[-1, -1]) == pytest.approx(1)


def test_a_tied_model_may_store_its_head_again(tiny, be, tmp_path):
    directory = with_head(tiny.directory("qwen2.5-tied"), tmp_path / "twice")
    assert (
        open_model(directory).identity()["fingerprint"]
        == open_model(tiny.directory("qwen2.5-tied")).identity()["fingerprint"]
    )
    assert "lm_head.weight" not in duetvl.load_model(directory, backend=be).parameters


def test_converting_does_not_lose_the_head_either(tiny, tmp_path, capsys):
    from duetvl.convert.cli import main as convert

    directory = with_head(tiny.directory("qwen2.5-tied"), tmp_path / "odd", changed)
    arguments = ["Qwen2_5_VLConverter", "hf_to_mm", "--cfg.mm_dir", str(tmp_path / "mm")]
    arguments += ["--cfg.hf_config.hf_dir", str(directory), "--cfg.parallel_config.llm_pp_layers", "[[2]]"]
    arguments += ["--cfg.parallel_config.vit_pp_layers", "[[3]]", "--cfg.parallel_config.tp_size", "1"]
    assert convert(arguments) != 0
    assert "ties the head to the embedding" in capsys.readouterr().err
    assert not (tmp_path / "mm").exists()


def test_an_untied_config_over_tied_weights_says_what_to_set(tiny, be, tmp_path):
    directory = tmp_path / "model"
    save_model(tiny.ours("qwen2.5-tied", be), directory)
    config = replace(load_config(directory), tie_word_embeddings=False).to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is absent, .* set tie_word_embeddings to true"):
        duetvl.load_model(directory, backend=be)
