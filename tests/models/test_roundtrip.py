"""Model directories as others write them read whole by `duetvl.load_model`, and ours read by transformers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

import duetvl
from duetvl.core.errors import CheckpointError
from duetvl.models.qwen_vl.config import ModelConfig, load_config

families = pytest.mark.parametrize("name", ["qwen2-tied", "qwen2.5-untied"])
SETTINGS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"padding_side": "left"}',
    "chat_template.json": "{}",
    "preprocessor_config.json": '{"patch_size": 14}',
    "generation_config.json": '{"eos_token_id": [3, 4]}',
    "LICENSE": "do what you like",
}


def theirs_again(directory: Path):
    """Transformers' model of a directory, which must hold each of its parameters and nothing else."""
    import transformers as hf

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[load_config(directory).model_type]
    loader = getattr(hf, f"{kind}ForConditionalGeneration")
    model, report = loader.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_same_weights(one, other) -> None:
    import torch

    wanted = dict(one.named_parameters())
    assert wanted.keys() == dict(other.named_parameters()).keys()
    assert all(torch.equal(x, wanted[path]) for path, x in other.named_parameters())


@families
def test_transformers_reads_ours(tiny, be, samples, name, tmp_path):
    tiny.ours(name, be).save_pretrained(tmp_path / "saved")
    again = theirs_again(tmp_path / "saved")
    assert_same_weights(tiny.theirs(name), again)
    for kind in samples:
        np.testing.assert_array_equal(oracle.logits(again.eval(), samples[kind]), tiny.logits(name, kind))


@families
def test_half_precision_is_written_as_such(tiny, be, name, tmp_path):
    import torch

    duetvl.load_model(tiny.directory(name), backend=be, dtype="bfloat16").save_pretrained(tmp_path / "saved")
    again = theirs_again(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    assert_same_weights(oracle.load(tiny.directory(name)).to(torch.bfloat16), again)
    assert load_config(tmp_path / "saved").dtype == "bfloat16"


def test_through_both_backends_and_back(tiny, samples, tmp_path):
    pytest.importorskip("mindspore")
    path = tiny.directory("qwen2.5-untied")
    for number, name in enumerate(("torch_npu", "mindspore", "torch_npu")):
        model = duetvl.load_model(path, backend=duetvl.load_backend(name, device="cpu"))
        path = tmp_path / str(number)
        model.save_pretrained(path)
    assert_same_weights(tiny.theirs("qwen2.5-untied"), theirs_again(path))
    assert (path / "config.json").read_text() == (tmp_path / "0" / "config.json").read_text()


# -- layouts that are about -------------------------------------------------------------------------------------------


def rewrite(source: Path, target: Path, *, names: str, config: str, files: str) -> None:
    """A copy of a model directory in another layout."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    weights = {_spelt(path, names): x for path, x in load_file(source / "model.safetensors").items()}
    if files == "one":
        save_file(weights, target / "model.safetensors", {"format": "pt"})
    else:
        _write_shards(weights, target, index=files == "shards and index")
    plain = json.loads((source / "config.json").read_text())
    flat = ModelConfig.from_dict(plain).to_dict()
    nested = {"model_type": flat["model_type"], "vision_config": flat["vision_config"], "text_config": flat}
    nested |= {key: value for key, value in flat.items() if key.endswith("token_id") or key == "tie_word_embeddings"}
    (target / "config.json").write_text(json.dumps({"saved": plain, "flat": flat, "nested": nested}[config]))


def _spelt(path: str, names: str) -> str:
    if names == "old" or path == "lm_head.weight":
        return path
    new = f"model.{path}" if path.startswith("visual.") else path.replace("model.", "model.language_model.", 1)
    return new if names == "new" else new.removeprefix("model.")


def _write_shards(weights, target: Path, index: bool) -> None:
    from safetensors.torch import save_file

    ordered = sorted(weights)
    places = {path: f"model-{1 + 3 * i // len(ordered):05}-of-00003.safetensors" for i, path in enumerate(ordered)}
    for file in set(places.values()):
        save_file({path: weights[path] for path in ordered if places[path] == file}, target / file, {"format": "pt"})
    if index:
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize(
    ("name", "names", "config", "files"),
    [
        ("qwen2-tied", "old", "flat", "one"),
        ("qwen2-untied", "new", "nested", "shards and index"),
        ("qwen2-tied", "headless", "saved", "shards"),
        ("qwen2.5-untied", "old", "nested", "shards"),
        ("qwen2.5-untied", "new", "flat", "shards and index"),
        ("qwen2.5-tied", "new", "saved", "one"),
        ("qwen2.5-tied", "headless", "nested", "shards and index"),
    ],
)
def test_every_layout_is_the_same_model(tiny, be, samples, tmp_path, name, names, config, files):
    rewrite(tiny.directory(name), tmp_path / "copy", names=names, config=config, files=files)
    model, plain = duetvl.load_model(tmp_path / "copy", backend=be), tiny.ours(name, be)
    assert model.config == plain.config
    assert list(model.parameters) == list(plain.parameters)
    for path, parameter in plain.parameters.items():
        np.testing.assert_array_equal(be.to_numpy(model.parameters[path].tensor), be.to_numpy(parameter.tensor))
    batch = model.pack([samples["three images"]])
    found = np.array(be.to_numpy(model.logits(batch)))
    np.testing.assert_allclose(found, tiny.logits(name, "three images"), rtol=0, atol=7e-5)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(tiny.theirs(name), theirs_again(tmp_path / "saved"))


# -- what lies beside the weights -------------------------------------------------------------------------------------


@pytest.fixture
def with_settings(tiny, tmp_path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(tiny.directory("qwen2-tied"), source)
    for file, text in SETTINGS.items():
        (source / file).write_text(text)
    (source / "training_args.bin").write_bytes(b"pickle")
    return source


def test_settings_go_along(with_settings, be, tmp_path):
    duetvl.load_model(with_settings, backend=be).save_pretrained(tmp_path / "saved")
    found = {file.name: file for file in (tmp_path / "saved").iterdir()}
    assert found.keys() == {*SETTINGS, "config.json", "model.safetensors"}
    assert all(found[name].read_text() == text for name, text in SETTINGS.items())


def test_saving_over_the_directory_it_was_read_from(with_settings, be, samples):
    """The weights are mapped from that very file while it is replaced, unless they have been copied."""
    model = duetvl.load_model(with_settings, backend=be)
    before = np.array(be.to_numpy(model.logits(model.pack([samples["image"]]))))
    with pytest.raises(CheckpointError, match=r"source: exists already; choose another directory"):
        model.save_pretrained(with_settings)
    model.save_pretrained(with_settings, overwrite=True)
    model.save_pretrained(with_settings, overwrite=True)
    again = duetvl.load_model(with_settings, backend=be)
    np.testing.assert_array_equal(be.to_numpy(again.logits(again.pack([samples["image"]]))), before)
    assert (with_settings / "LICENSE").read_text() == SETTINGS["LICENSE"]
    assert [path.name for path in with_settings.parent.iterdir()] == ["source"]


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_save_leaves_nothing(with_settings, be, tmp_path, monkeypatch, error):
    model = duetvl.load_model(with_settings, backend=be)
    expected = {file.name: file.read_bytes() for file in with_settings.iterdir()}
    plain, written = type(be.checkpoint_io).save, []

    def fail_after_some(io, tensor):
        written.append(tensor)
        if len(written) > 10:
            raise error
        return plain(io, tensor)

    monkeypatch.setattr(type(be.checkpoint_io), "save", fail_after_some)
    caught = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    for target, overwrite in ((tmp_path / "new", False), (with_settings, True)):
        written.clear()
        with pytest.raises(caught):
            model.save_pretrained(target, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert {file.name: file.read_bytes() for file in with_settings.iterdir()} == expected


KILLED = """
import os, sys
import duetvl
from duetvl.models.qwen_vl import loading
be = duetvl.load_backend("torch_npu", device="cpu")
model = duetvl.load_model(sys.argv[1], backend=be)
loading.write_config = lambda *args: os.kill(os.getpid(), 9)  # all weights are written by then
model.save_pretrained(sys.argv[2])
"""


def test_a_kill_leaves_no_directory_of_that_name(tiny, tmp_path):
    source = tiny.directory("qwen2-tied")
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(tmp_path / "saved")], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert left == [".lock", ".saving"]
    be = duetvl.load_backend("torch_npu", device="cpu")
    tiny.ours("qwen2-tied", be).save_pretrained(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert_same_weights(tiny.theirs("qwen2-tied"), theirs_again(tmp_path / "saved"))
