"""Between the trainer and MindSpeed-MM: its checkpoints are read, and it can save in that layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duetvl.convert.commands import export_mindspeed_mm, hf_to_mm, mm_to_hf
from duetvl.convert.layouts import Layout
from duetvl.convert.plans import Options
from duetvl.convert.verify import Difference, verify
from duetvl.core.backend import Backend
from duetvl.core.errors import CheckpointError, ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.params import Parameter
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.models.qwen_vl.sharding import Heads
from duetvl.parallel.division import Division
from duetvl.storage.checkpoint_format import Meta
from duetvl.storage.tensor_files import TensorSpec
from duetvl.training.checkpoints.checkpoint import take_snapshot
from duetvl.training.checkpoints.export import export_run
from duetvl.training.checkpoints.writing import begin_save, commit, make_manifest, write_first, write_share
from tests.convert.tiny import assert_files_equal, mm_files, read_hf, same, tiny_config, write_hf

TWO = Layout(((1, 3),), ((4, 0),), 2)


def save_run(
    run: Path, be: Backend, bits: dict[str, np.ndarray], model_config: dict[str, object], step: int = 7
) -> None:
    parameters = [Parameter(name, be.checkpoint_io.load(array, "bfloat16", "bfloat16")) for name, array in bits.items()]
    meta = Meta(model_config=model_config)
    taken = take_snapshot(step=step, parameters=parameters, optimizer_state=None, meta=meta, backend=be)
    write_first(begin_save(run, taken.step, taken.nbytes), taken)


@pytest.mark.parametrize("tied", [False, True])
def test_training_checkpoints_are_read(tmp_path: Path, be: Backend, tied: bool) -> None:
    config = tiny_config(tied=tied)
    bits = write_hf(tmp_path / "hf", config)
    save_run(tmp_path / "run", be, bits, config.to_dict())
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-0000007"):
        hf_to_mm(source, tmp_path / f"mm-{source.name}", TWO, Options(), family="qwen2_5_vl")
        mm_to_hf(tmp_path / f"mm-{source.name}", tmp_path / "hf", tmp_path / f"back-{source.name}", TWO, Options())
        assert same(read_hf(tmp_path / f"back-{source.name}"), bits)
        assert not [f for f in verify(source, tmp_path / "hf") if isinstance(f, Difference)]


MANY = {
    "dp 3": Mesh(dp=3),
    "tp 2": Mesh(tp=2),
    "dp 2 x tp 4": Mesh(dp=2, tp=4),
}


def save_on_ranks(run: Path, be: Backend, bits: dict[str, np.ndarray], config: ModelConfig, mesh: Mesh) -> Path:
    """As a run over ranks saves a frozen model: each number by one of those that hold it."""
    heads = Heads(config.text.num_heads, config.text.num_kv_heads, config.vision.num_heads)
    staging, written = begin_save(run, 7, 0), []
    for rank in range(mesh.size):
        division = Division(mesh, heads, rank, vision="shard")
        parameters = []
        for name, array in bits.items():
            part = division.part(name, array.shape)
            mine = np.concatenate([array[box.slices] for box in part.slices.boxes], part.slices.axis)
            tensor = be.checkpoint_io.load(np.ascontiguousarray(mine), "bfloat16", "bfloat16")
            parameters.append(Parameter(name, tensor, trainable=False, part=part))
        taken = take_snapshot(
            step=7,
            parameters=parameters,
            optimizer_state=None,
            meta=Meta(model_config=config.to_dict()),
            backend=be,
            division=division,
        )
        written.append(write_share(staging, taken, rank, mesh.size))
    return commit(staging, make_manifest(taken, written))


@pytest.mark.parametrize("mesh", MANY.values(), ids=MANY)
def test_checkpoints_of_many_writers_are_read(tmp_path: Path, be: Backend, mesh: Mesh) -> None:
    config = tiny_config(heads=8, kv_heads=2)
    bits = write_hf(tmp_path / "hf", config)
    path = save_on_ranks(tmp_path / "run", be, bits, config, mesh)
    assert len(list(path.glob("weights-*.safetensors"))) == mesh.size
    layout = Layout.one_stage(config)
    hf_to_mm(tmp_path / "run", tmp_path / "mm", layout, Options(), family="qwen2_5_vl")
    hf_to_mm(tmp_path / "hf", tmp_path / "direct", layout, Options(), family="qwen2_5_vl")
    assert_files_equal(mm_files(tmp_path / "mm"), mm_files(tmp_path / "direct"))
    export_run(str(tmp_path / "run"), tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()

    missing = path / f"weights-00001-of-{mesh.size:05}.safetensors"
    missing.unlink()
    for read in (
        lambda: export_run(str(tmp_path / "run"), tmp_path / "no"),
        lambda: hf_to_mm(tmp_path / "run", tmp_path / "no", layout, Options(), family="qwen2_5_vl"),
    ):
        with pytest.raises(CheckpointError, match=f"{missing.name} cannot be read: No such file"):
            read()


def test_damaged_training_checkpoints(tmp_path: Path, be: Backend) -> None:
    config = tiny_config()
    bits = write_hf(tmp_path / "hf", config)
    save_run(tmp_path / "bare", be, bits, {})
    with pytest.raises(ConfigError, match="does not name its model"):
        hf_to_mm(tmp_path / "bare", tmp_path / "mm", TWO, Options())
    save_run(tmp_path / "run", be, bits, tiny_config(layers=5).to_dict())
    with pytest.raises(CheckpointError, match="its weights are not those of its model_config"):
        hf_to_mm(tmp_path / "run", tmp_path / "mm", TWO, Options())
    manifest = tmp_path / "run" / "checkpoints" / "step-0000007" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"step": 7', '"step": 8'))
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        hf_to_mm(tmp_path / "run", tmp_path / "mm", TWO, Options())
    manifest.write_text(text[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        hf_to_mm(tmp_path / "run", tmp_path / "mm", TWO, Options())


def flip(path: Path) -> None:
    """One bit in the last tensor of a file."""
    with open(path, "r+b") as handle:
        handle.seek(-1, 2)
        last = handle.read(1)
        handle.seek(-1, 2)
        handle.write(bytes([last[0] ^ 1]))


def test_a_run_is_verified(tmp_path: Path, be: Backend) -> None:
    """A flipped bit in the newest: the one before is taken, and said; a step that is named is met or fails."""
    config = tiny_config()
    old = write_hf(tmp_path / "old", config, seed=1)
    new = write_hf(tmp_path / "new", config, seed=2)
    run = tmp_path / "run"
    save_run(run, be, old, config.to_dict(), step=7)
    save_run(run, be, new, config.to_dict(), step=9)
    newest = run / "checkpoints" / "step-0000009"
    assert same(read_back(run, tmp_path / "a"), new)
    assert same(read_back(Path(f"{run}@7"), tmp_path / "b"), old)
    flip(newest / "weights-00000-of-00001.safetensors")
    said: list[str] = []
    assert same(read_back(run, tmp_path / "c", said), old)
    assert ["warning: skipped" in said[0], "step 7 is read" in said[1]] == [True, True]
    for named in (newest, Path(f"{run}@9"), Path(f"{run}@8"), newest.with_name("step-0000008")):
        with pytest.raises(CheckpointError):
            read_back(named, tmp_path / "no")
    assert not [f for f in verify(run, tmp_path / "old") if isinstance(f, Difference)]
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        list(verify(newest, tmp_path / "new"))
    flip(run / "checkpoints" / "step-0000007" / "weights-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="no other checkpoint can be used"):
        read_back(run, tmp_path / "no")


def read_back(source: Path, folder: Path, said: list[str] | None = None) -> dict[str, np.ndarray]:
    hf_to_mm(source, folder / "mm", TWO, Options(say=(said if said is not None else []).append))
    mm_to_hf(folder / "mm", folder.parent / "old", folder / "back", replace(TWO, vision_qkv="interleaved"), Options())
    return read_hf(folder / "back")


def test_directories_that_are_two_things(tmp_path: Path, be: Backend) -> None:
    config = tiny_config()
    bits = write_hf(tmp_path / "hf", config)
    save_run(tmp_path / "hf", be, bits, config.to_dict())
    with pytest.raises(CheckpointError, match=r"is a model \(config.json\) and a run"):
        hf_to_mm(tmp_path / "hf", tmp_path / "mm", TWO, Options())
    write_hf(tmp_path / "cleaned" / "export", config)
    with pytest.raises(CheckpointError, match=r"give the model that it exported: .*cleaned/export"):
        hf_to_mm(tmp_path / "cleaned", tmp_path / "mm", TWO, Options())
    write_hf(tmp_path / "model@7", config)
    hf_to_mm(tmp_path / "model@7", tmp_path / "mm", TWO, Options())
    save_run(tmp_path / "run", be, bits, config.to_dict())
    with pytest.raises(ConfigError, match="has its own language model"):
        hf_to_mm(tmp_path / "run", tmp_path / "no", TWO, Options(), language_dir=tmp_path / "model@7")


@pytest.mark.parametrize("tied", [False, True])
def test_export(tmp_path: Path, tied: bool) -> None:
    """The same files as a conversion makes; every tensor fetched once."""
    config = tiny_config(tied=tied)
    bits = write_hf(tmp_path / "hf", config)
    hf_to_mm(tmp_path / "hf", tmp_path / "mm", TWO, Options())
    fetched: list[str] = []

    def fetch(name: str) -> np.ndarray:
        fetched.append(name)
        return bits[name]

    specs = {name: TensorSpec("bfloat16", array.shape) for name, array in bits.items()}
    export_mindspeed_mm(tmp_path / "out", config, specs, fetch, TWO)
    assert sorted(fetched) == sorted(bits)
    assert_files_equal(mm_files(tmp_path / "out"), mm_files(tmp_path / "mm"))
    with pytest.raises(CheckpointError, match="exists already"):
        export_mindspeed_mm(tmp_path / "out", config, specs, fetch, TWO)
    less = {name: spec for name, spec in specs.items() if name != "model.norm.weight"}
    with pytest.raises(ConfigError, match=r"absent or of another shape, such as model\.norm\.weight"):
        export_mindspeed_mm(tmp_path / "no", config, less, fetch, TWO)


def test_export_from_a_backend(tmp_path: Path, be: Backend) -> None:
    """As a trainer calls it: tensors of a device, fetched one by one."""
    config = tiny_config(tied=True)
    bits = write_hf(tmp_path / "hf", config)
    tensors = {name: be.checkpoint_io.load(array, "bfloat16", "bfloat16") for name, array in bits.items()}
    specs = {name: TensorSpec(be.ops.dtype_of(tensor), bits[name].shape) for name, tensor in tensors.items()}

    def fetch(name: str) -> np.ndarray:
        return be.checkpoint_io.save(tensors[name])[0].reshape(specs[name].shape)

    layout = Layout.one_stage(config, tp=2)
    export_mindspeed_mm(tmp_path / "out", config, specs, fetch, layout, kind="safetensors")
    assert not [f for f in verify(tmp_path / "out", tmp_path / "hf") if isinstance(f, Difference)]
