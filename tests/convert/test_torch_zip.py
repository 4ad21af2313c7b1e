"""Our reader and writer of torch's files against torch itself, and against files that mean harm."""

from __future__ import annotations

import argparse
import ast
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duetvl.convert import torch_pickle
from duetvl.convert.streaming import PlannedFile
from duetvl.convert.torch_pickle import OPAQUE
from duetvl.convert.torch_plan import plan_torch_file
from duetvl.convert.torch_zip import TorchFile
from duetvl.core.errors import CheckpointError
from duetvl.storage.tensor_files import NUMPY_DTYPES, TensorSpec

torch = pytest.importorskip("torch")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
          "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
          "bool": torch.bool}  # fmt: skip


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def random_tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return (torch.randn(shape) * 50).to(DTYPES[dtype])


def put(path: Path, planned: PlannedFile, data: dict[str, bytes]) -> None:
    with open(path, "wb") as handle:
        handle.truncate(planned.size)
        sums = {name: zlib.crc32(raw) for name, raw in data.items()}
        places = [(planned.starts[name], raw) for name, raw in data.items()]
        for position, raw in (*places, *planned.fixed, *planned.finish(sums)):
            handle.seek(position)
            handle.write(raw)


# -- what torch wrote -------------------------------------------------------------------------------------------------


def test_reads_what_torch_saves(tmp_path: Path) -> None:
    base = random_tensor((6, 4), "bfloat16")
    model: dict[str, Any] = {name: random_tensor((3, 5), name) for name in DTYPES}
    model |= {
        "transposed": base.t(), "slice": base[1:4, 2:], "row": base[2], "alias": base, "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7), "expanded": torch.ones(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(base.float()),
        "grad": torch.randn(2, requires_grad=True), "steps": torch.arange(20)[::3],
    }  # fmt: skip
    for content in (
        model,
        OrderedDict(model),
        torch.nn.ParameterDict({"a": torch.nn.Parameter(base.float())}).state_dict(),
    ):
        torch.save({"model": content, "checkpoint_version": 3.0}, tmp_path / "x.pt")
        file = TorchFile(tmp_path / "x.pt")
        assert file.root["checkpoint_version"] == 3.0
        assert file.specs.keys() == {f"model.{name}" for name in content}
        for name, tensor in content.items():
            view = file.view(f"model.{name}")
            assert file.specs[f"model.{name}"].shape == tuple(tensor.shape)
            assert np.array_equal(view, bits_of(tensor)), name
            file.release(f"model.{name}")
            assert np.array_equal(view, bits_of(tensor)), name  # read again


def test_reads_what_megatron_saves_after_training(tmp_path: Path) -> None:
    """Arguments, optimizer, scheduler, random state: none of it is ours, none of it is imported."""
    weights = {"a.weight": torch.randn(4, 4).bfloat16(), "a._extra_state": None, "b._extra_state": BytesIO(b"fp8")}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.randn(3))])
    content = {
        "args": argparse.Namespace(lr=1e-5, dtype=torch.bfloat16, device=torch.device("cpu"), enum=pickle.PickleError),
        "checkpoint_version": 3.0, "iteration": 1200, "model": weights, "optimizer": optimizer.state_dict(),
        "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state(), "set": {1, 2}}],
        "arrays": [np.arange(5), np.float32(2)], "path": Path("/x"), ("odd", "key"): 1,
    }  # fmt: skip
    for protocol in (2, 4, 5):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        file = TorchFile(tmp_path / "x.pt")
        assert list(file.specs) == ["model.a.weight"]
        assert np.array_equal(file.view("model.a.weight"), bits_of(weights["a.weight"]))  # type: ignore[arg-type]
        assert file.root["iteration"] == 1200
        assert file.root["args"] is OPAQUE


class _Harm:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_harm_does_nothing(tmp_path: Path) -> None:
    for where in ("model", "args"):
        content: dict[str, Any] = {"model": {"w": torch.ones(2)}, "args": None, where: _Harm(tmp_path / "harmed")}
        if where == "model":
            content["model"] = {"w": torch.ones(2), "x": _Harm(tmp_path / "harmed")}
        torch.save(content, tmp_path / "x.pt")
        file = TorchFile(tmp_path / "x.pt")
        assert np.array_equal(file.view("model.w"), [1, 1])
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "harmed").exists(), "the harm works where pickles are trusted"


HAND_MADE = {
    "import by name on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch %s\x85R.",
    "instance": b"(S'touch %s'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch %s'\no.",
    "new object": b"\x80\x02cos\nsystem\nU\x00\x85\x81.",
    "state": b"cos\nsystem\n)R}S'a'\nS'b'\nsb.",
    "extension": b"\x80\x02\x82\x01.",
    "endless nesting as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "deep nesting": b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b".",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\xff.",
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_pickles(tmp_path: Path, name: str) -> None:
    harmed = tmp_path / "h"
    data = HAND_MADE[name].replace(b"%s", str(harmed).encode())
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
    with suppress(CheckpointError):
        assert TorchFile(tmp_path / "x.pt").specs == {}
    assert not harmed.exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_pickles_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    buffer = BytesIO()
    torch.save({"model": {"w": torch.ones(3, 2), "v": torch.ones(4)[1:]}, "x": [1, {2.5: None}]}, buffer)
    source = zipfile.ZipFile(buffer)
    pickled = bytearray(source.read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, bytes(pickled) if name.endswith("data.pkl") else source.read(name))
    try:
        file = TorchFile(path)
    except CheckpointError:
        return
    for name in file.specs:
        file.view(name).tobytes()  # inside the file, or the process would be gone


def test_every_instruction_of_pickle_is_known() -> None:
    handled = set(torch_pickle._HANDLERS) | torch_pickle._LITERALS | torch_pickle._MEMO_GET | torch_pickle._MEMO_PUT
    handled |= {"GLOBAL", "INST", "PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "PROTO", "FRAME", "READONLY_BUFFER"}
    assert handled | {"STOP"} == {opcode.name for opcode in pickletools.opcodes}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "is truncated or damaged"),
        (lambda raw: b"", "is no file of torch.save"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
        (lambda raw: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.more", "format that torch wrote before 1.6"),
        (lambda raw: raw.replace(b"PK\x03\x04", b"PK\x00\x00", 1), "no record .* where its directory says"),
        (lambda raw: raw.replace(b"storage", b"sturage"), "specs"),
        (lambda raw: raw.replace(b"little", b"bigger"), "big-endian"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, damage: Any, message: str) -> None:
    buffer = BytesIO()
    torch.save({"model": {"w": torch.ones(3, 2)}}, buffer)
    (tmp_path / "x.pt").write_bytes(damage(buffer.getvalue()))
    if message == "specs":  # not one of our tensors any more
        assert not TorchFile(tmp_path / "x.pt").specs
        return
    with pytest.raises(CheckpointError, match=message):
        TorchFile(tmp_path / "x.pt")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    buffer = BytesIO()
    torch.save({"model": {"w": torch.ones(300)}}, buffer)
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in zipfile.ZipFile(buffer).namelist():
            archive.writestr(name, zipfile.ZipFile(buffer).read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        TorchFile(tmp_path / "x.pt")


# -- what we write ----------------------------------------------------------------------------------------------------


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    sections = {
        "model0": {name: random_tensor((5, 3), name) for name in DTYPES} | {"scalar": torch.tensor(2.0)},
        "model1": {},
        "model2": {
            "empty": torch.empty(0, 4),
            "wide": random_tensor((300, 70_000 // 300), "bfloat16"),
            "名": torch.ones(1),
        },
    }
    names = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    specs = {s: {n: TensorSpec(names[t.dtype], tuple(t.shape)) for n, t in v.items()} for s, v in sections.items()}
    planned = plan_torch_file(specs, {"checkpoint_version": 3.0, "iteration": 123456789012})
    put(
        tmp_path / "x.pt",
        planned,
        {f"{s}.{n}": bits_of(t).tobytes() for s, v in sections.items() for n, t in v.items()},
    )
    assert (tmp_path / "x.pt").stat().st_size == planned.size
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)
        assert list(loaded) == ["model0", "model1", "model2", "checkpoint_version", "iteration"]
        assert (loaded["checkpoint_version"], loaded["iteration"]) == (3.0, 123456789012)
        for section, tensors in sections.items():
            assert list(loaded[section]) == list(tensors)
            assert all(torch.equal(loaded[section][name], tensor) for name, tensor in tensors.items())
            assert all(loaded[section][name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    assert all(start % 64 == 0 for start in planned.starts.values())
    file = TorchFile(tmp_path / "x.pt")
    assert file.sections == ["model0", "model1", "model2"]
    assert np.array_equal(file.view("model2.wide"), bits_of(sections["model2"]["wide"]))


def test_torch_needs_no_checksums(tmp_path: Path) -> None:
    """They serve other tools; this is why a kill between data and headers could not go unnoticed by torch alone."""
    planned = plan_torch_file({"model": {"w": TensorSpec("float32", (2,))}})
    put(tmp_path / "x.pt", planned, {"model.w": np.array([1, 2], "<f4").tobytes()})
    raw = bytearray((tmp_path / "x.pt").read_bytes())
    raw[planned.starts["model.w"]] ^= 1
    (tmp_path / "x.pt").write_bytes(raw)
    assert torch.load(tmp_path / "x.pt", weights_only=True)["model"]["w"][1] == 2
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is not None


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """One record of more than 4 GiB, and records that start beyond; the file is sparse, so it takes no space."""
    rows = (1 << 32) // 2 // 1024 + 8
    specs = {"big": TensorSpec("bfloat16", (rows, 1024)), "after": TensorSpec("float32", (3,))}
    planned = plan_torch_file({"model": specs})
    path = tmp_path / "x.pt"
    with open(path, "wb") as handle:
        handle.truncate(planned.size)
        last, after = np.array([7], "<u2"), np.array([1, 2, 3], "<f4")
        sums = {"model.big": 0, "model.after": zlib.crc32(after.tobytes())}
        ends = [(planned.starts["model.big"] + specs["big"].nbytes - 2, last.tobytes())]
        places = [(planned.starts["model.after"], after.tobytes())]
        for position, raw in (*ends, *places, *planned.fixed, *planned.finish(sums)):
            handle.seek(position)
            handle.write(raw)
    loaded = torch.load(path, weights_only=True, mmap=True)["model"]
    assert loaded["big"].shape == (rows, 1024)
    assert int(loaded["big"].view(torch.int16)[-1, -1]) == 7
    assert loaded["after"].tolist() == [1, 2, 3]
    file = TorchFile(path)
    assert file.view("model.big")[-1, -1] == 7
    assert file.view("model.after").tolist() == [1, 2, 3]
    assert zipfile.ZipFile(path).getinfo("model_optim_rng/data/0").file_size == specs["big"].nbytes


def test_file_larger_than_memory(tmp_path: Path) -> None:
    """A map that is only read does not count against memory."""
    specs = {"big": TensorSpec("bfloat16", (1 << 25, 4096)), "after": TensorSpec("int8", (1,))}
    planned = plan_torch_file({"model": specs})
    with open(tmp_path / "x.pt", "wb") as handle:
        handle.truncate(planned.size)
        for position, raw in (*planned.fixed, *planned.finish({"model.big": 0, "model.after": 0})):
            handle.seek(position)
            handle.write(raw)
    file = TorchFile(tmp_path / "x.pt")
    assert file.specs["model.big"].nbytes == 1 << 38
    assert not file.view("model.big")[-1].any()
    assert not file.view("model.big").flags.writeable


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, duetvl.convert.cli\n"
        "found = {'torch', 'mindspore', 'safetensors', 'transformers', 'pydantic', 'tqdm'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_convert_imports() -> None:
    """Itself, core, and the configuration and names of the model: nothing that could need a framework.

    opening.py is for those who load models, and mm-convert does without it.
    """
    folder = Path(torch_pickle.__file__).parent
    files = [path for path in folder.glob("*.py") if path.name != "opening.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    found = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in found if name and name.startswith("duetvl.")}
    allowed = (
        "duetvl.convert",
        "duetvl.core.",
        "duetvl.storage.",
        "duetvl.version",
        "duetvl.models.qwen_vl.config",
        "duetvl.models.qwen_vl.names",
        "duetvl.models.qwen_vl.sharding",
        "duetvl.models.qwen_vl.parameters",
        "duetvl.models.qwen_vl.weights",
        "duetvl.models.settings",
    )
    assert not [name for name in ours if not name.startswith(allowed)]
    assert "duetvl.convert.opening" not in ours


def test_dtypes_of_both_sides_agree() -> None:
    assert set(DTYPES) <= set(NUMPY_DTYPES)
