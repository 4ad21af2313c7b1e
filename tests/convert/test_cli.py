"""The command: the grammar users know, one clear line for every mistake, nothing half-written, sources untouched."""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from duetvl.convert import streaming
from duetvl.convert.cli import main
from duetvl.storage.tensor_files import TensorFile
from tests.convert.test_round_trips import fingerprint
from tests.convert.tiny import mm_files, read_hf, same, tiny_config, write_hf

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file

FAMILIES = {"qwen2_vl": "Qwen2VLConverter", "qwen2_5_vl": "Qwen2_5_VLConverter"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `hf` (Qwen2.5-VL, 4 layers in each tower, sharded)."""
    monkeypatch.chdir(tmp_path)
    write_hf(Path("hf"), tiny_config(), shard_bytes=20_000)
    return tmp_path


def run(line: str) -> int:
    return main(shlex.split(line))


def fails(line: str, capsys: pytest.CaptureFixture[str], target: str = "out") -> str:
    """The one line that is said; nothing of the target is there, nothing of the sources has changed."""
    before = {name: fingerprint_raw(Path(name)) for name in ("hf", "mm", "other") if Path(name).is_dir()}
    capsys.readouterr()
    assert run(line) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    assert not Path(target).exists()
    assert not list(Path.cwd().glob(".*.saving"))
    assert before == {name: fingerprint_raw(Path(name)) for name in before}
    return said.err


def fingerprint_raw(directory: Path) -> dict[str, Any]:
    return {
        str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(directory.rglob("*"))
    }


HF_TO_MM = "Qwen2_5_VLConverter hf_to_mm --cfg.mm_dir out --cfg.hf_config.hf_dir hf"
MM_TO_HF = "Qwen2_5_VLConverter mm_to_hf --cfg.save_hf_dir out --cfg.mm_dir mm --cfg.hf_config.hf_dir hf"
ONE = " --cfg.parallel_config.llm_pp_layers [[4]] --cfg.parallel_config.vit_pp_layers [[4]]"
TWO = " --cfg.parallel_config.llm_pp_layers [[1,3]] --cfg.parallel_config.vit_pp_layers [[4,0]]"


# -- grammar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_commands_of_the_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """As they stand in the users' guides (see docs/mm_convert.md), with layers of a small model."""
    monkeypatch.chdir(tmp_path)
    bits = write_hf(Path("hf"), tiny_config(family))
    name = FAMILIES[family]
    assert (
        run(f"""{name} hf_to_mm
        --cfg.mm_dir "mm" --cfg.hf_config.hf_dir "hf"
        --cfg.parallel_config.llm_pp_layers [[0,0],[1,1],[1,1]]
        --cfg.parallel_config.vit_pp_layers [[3,1],[0,0],[0,0]]
        --cfg.parallel_config.tp_size 1""")
        == 0
    )
    virtual = """--cfg.parallel_config.llm_pp_layers [[0,0],[1,1],[1,1]]
        --cfg.parallel_config.vit_pp_layers [[3,1],[0,0],[0,0]]"""
    assert (
        run(f"""{name} mm_to_hf --cfg.save_hf_dir "back" --cfg.mm_dir "mm" --cfg.hf_config.hf_dir "hf"
        {virtual} --cfg.parallel_config.tp_size 1""")
        == 0
    )
    assert same(read_hf(Path("back")), bits)
    source = virtual.replace("parallel", "source_parallel") + " --cfg.hf_config.hf_dir hf"
    assert (
        run(f"""{name} resplit --cfg.source_dir mm --cfg.target_dir re {source}
        --cfg.target_parallel_config.llm_pp_layers [1,1,1,1] --cfg.target_parallel_config.vit_pp_layers [4,0,0,0]
        --cfg.target_parallel_config.tp_size 2""")
        == 0
    )
    assert (
        run(f"""{name} mm_to_hf --cfg.save_hf_dir=again --cfg.mm_dir=re --cfg.hf_config.hf_dir=hf
        --cfg.parallel_config.llm_pp_layers=[1,1,1,1] --cfg.parallel_config.vit_pp_layers=[4,0,0,0]
        --cfg.parallel_config.tp_size=2 --cfg.trust_remote_code true""")
        == 0
    )
    assert same(read_hf(Path("again")), bits)
    assert run("verify hf re") == run("verify mm re") == 0


def test_lists_as_any_shell_passes_them(here: Path) -> None:
    words = [*shlex.split(HF_TO_MM), "--cfg.parallel_config.vit_pp_layers", "[[4,", "0]]",
             "--cfg.parallel_config.llm_pp_layers", "[[1,", "3]]", "--cfg.save_vit_only", "--cfg.dry_run"]  # fmt: skip
    assert main(words) == 0
    script = f"mm-convert {HF_TO_MM}{TWO} --cfg.dry_run true"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not Path("out").exists()


def test_config_file_and_what_prints_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{HF_TO_MM}{TWO} --cfg.parallel_config.tp_size 2 --print_config=comments") == 0
    Path("run.yaml").write_text(capsys.readouterr().out)
    assert "# ranks of tensor parallelism" in Path("run.yaml").read_text()
    assert run("Qwen2_5_VLConverter hf_to_mm --config run.yaml --cfg.mm_dir from_file") == 0
    assert run("Qwen2_5_VLConverter hf_to_mm --config run.yaml --cfg.mm_dir first") == 0
    assert len(mm_files(Path("from_file"))) == 4
    nested = {"Qwen2_5_VLConverter": {"hf_to_mm": {"cfg": {"mm_dir": "nested", "hf_config": {"hf_dir": "hf"},
              "parallel_config": {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]]}}}}}  # fmt: skip
    Path("nested.json").write_text(json.dumps(nested))
    assert run("--config nested.json Qwen2_5_VLConverter hf_to_mm") == 0
    capsys.readouterr()
    assert run(f"{HF_TO_MM} --print_config=skip_null,skip_default") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["cfg"]["mm_dir"] == "out"
    assert "overwrite" not in printed["cfg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg: {mm_dri: x}", "there is no key cfg.mm_dri; did you mean 'mm_dir'?"),
        ("cfg: {parallel_config: {tp: 2}}", "there is no key cfg.parallel_config.tp"),
        ("cfg: 3", "cfg is 3, expected a section"),
        ("cfg: {parallel_config: [1]}", "cfg.parallel_config is [1], expected a section"),
        ("mm_dir: out", "expected a section cfg, found the key 'mm_dir'"),
        ("[1]", "expected a section cfg, found [1]"),
        ("", "expected a section cfg, found None"),
        ("cfg: {mm_dir: a, mm_dir: b}", "the key 'mm_dir' is given twice in one section; keep one of them"),
        ("cfg: {parallel_config: {tp_size: 1, tp_size: 2}}", "the key 'tp_size' is given twice"),
        ("a: &a [*a]\ncfg: {}", "expected a section cfg, found the key 'a'"),
        ("cfg: [", "cannot be read as YAML"),
        ("{" * 3000, "cannot be read as YAML"),
        ("? [1]\n: 2", "cannot be read as YAML"),
        ("a: " + "x" * (1 << 20), "is too large for a file of keys"),
    ],
)
def test_config_files_that_are_none(here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    """Even where flags say all that is needed."""
    Path("bad.yaml").write_text(text)
    said = fails(f"{HF_TO_MM}{ONE} --config bad.yaml", capsys)
    assert "bad.yaml: " in said
    assert message in said
    assert "bad.yaml: " in fails(f"--config bad.yaml {HF_TO_MM}{ONE}", capsys)
    assert "none.yaml: " in fails(f"{HF_TO_MM}{ONE} --config none.yaml", capsys)
    assert len(said) < 1000


def test_sections_as_json_and_environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = json.dumps({"llm_pp_layers": [[1, 3]], "vit_pp_layers": [[4, 0]], "tp_size": 1})
    assert run(f"{HF_TO_MM} --cfg.parallel_config '{section}'") == 0
    prefix = "MM_CONVERT_QWEN2_5_VLCONVERTER__HF_TO_MM__CFG"
    monkeypatch.setenv(f"{prefix}__PARALLEL_CONFIG__TP_SIZE", "2")
    monkeypatch.setenv(f"{prefix}__MM_DIR", "from_env")
    line = f"Qwen2_5_VLConverter hf_to_mm --cfg.hf_config.hf_dir hf{TWO}"
    assert run(line) == 2
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    assert run(line) == 0
    assert len(mm_files(Path("from_env"))) == 4


@pytest.mark.parametrize("line", ["", "--help", "Qwen2VLConverter", "Qwen2VLConverter --help", "verify --help",
                                  "--version", "Qwen2_5_VLConverter resplit --help"])  # fmt: skip
def test_help(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    assert "mm-convert" in capsys.readouterr().out


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from duetvl.convert.options import COMMANDS, key_names, key_tree

    for command, keys in COMMANDS.items():
        run(f"Qwen2_5_VLConverter {command} --help" if command != "verify" else "verify --help")
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"--{name} " in said for name in key_names(key_tree(keys)))
        assert "order of rows" in said or command == "lora_hf_to_mm"


def test_dry_run_tells_files_sizes_stages(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{HF_TO_MM}{TWO} --cfg.dry_run") == 0
    said = capsys.readouterr().out
    assert "pipeline rank 1: no vision layers, language layers 1 to 3" in said
    assert "release/mp_rank_00_001/model_optim_rng.pt: " in said
    assert "memory: about" in said
    assert not Path("out").exists()


def test_works_without_any_framework(here: Path) -> None:
    """As in an environment that has none, or only the other one."""
    code = (
        "import sys\n"
        "for name in ('torch', 'mindspore', 'safetensors', 'transformers', 'tqdm', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "from duetvl.convert.cli import main\n"
        f"assert main({shlex.split(HF_TO_MM.replace('out', 'mm') + TWO)!r}) == 0\n"
        f"assert main({shlex.split(MM_TO_HF + TWO)!r}) == 0\n"
        "assert main(['verify', 'mm', 'out']) == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert same(read_hf(Path("out")), read_hf(Path("hf")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frameworks_read_the_safetensors_edition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(Path("hf"), tiny_config(), dtype)
    assert run(HF_TO_MM + ONE + " --cfg.format safetensors") == 0
    assert run(HF_TO_MM.replace("out", "pt") + ONE) == 0
    wanted = mm_files(Path("pt"))["mp_rank_00"]["model"]
    path = "out/release/mp_rank_00/model_optim_rng.safetensors"
    by_torch = load_file(path)
    assert by_torch.keys() == {f"model.{name}" for name in wanted}
    assert all(torch.equal(by_torch[f"model.{name}"], tensor) for name, tensor in wanted.items())
    if find_spec("mindspore") is None:
        pytest.skip("mindspore is not installed")
    np.savez("wanted.npz", **{f"model.{name}": tensor.float().numpy() for name, tensor in wanted.items()})
    code = (  # in a process of its own: loading starts a runtime that later tests want to start themselves
        "import mindspore, numpy\n"
        f"found, wanted = mindspore.load_checkpoint({path!r}, format='safetensors'), numpy.load('wanted.npz')\n"
        "assert set(found) == set(wanted)\n"
        "assert all((found[n].astype(mindspore.float32).asnumpy() == wanted[n]).all() for n in wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Qwen2Converter hf_to_mm", "no converter 'Qwen2Converter'; did you mean 'Qwen2VLConverter'?"),
        ("Qwen2VLConverter hf2mm", "has no command 'hf2mm'; did you mean 'hf_to_mm'?"),
        ("Qwen2_5_VLConverter hf_to_mm_dcp --cfg.mm_dir x", "training needs no conversion"),
        (HF_TO_MM, "missing: --cfg.parallel_config.llm_pp_layers"),
        (HF_TO_MM + ONE + " --cfg.parallel_config.tp_sise 2", "did you mean '--cfg.parallel_config.tp_size'?"),
        (HF_TO_MM + ONE + " --tp 2", "unknown option --tp"),
        (HF_TO_MM + ONE + " --cfg.parallel_config.tp_size two", "tp_size: expected a whole number from 1, found 'two'"),
        (HF_TO_MM + ONE + " --cfg.parallel_config.tp_size 0", "expected a whole number from 1, found "),
        (HF_TO_MM + ONE + " --cfg.parallel_config.tp_size 1 2", "unexpected argument '2': each option takes one value"),
        (HF_TO_MM + ONE + " --cfg.parallel_config.ep_size 2", "no experts"),
        (HF_TO_MM + ONE + " --cfg.save_vit_only perhaps", "save_vit_only: expected true or false, found 'perhaps'"),
        (HF_TO_MM + ONE + " --cfg.format pth", "--cfg.format: expected pt or safetensors, found 'pth'"),
        (HF_TO_MM + ONE.replace("[[4]]", "[[4,-1]]", 1), "expected a list of layers for each stage"),
        (HF_TO_MM + ONE.replace("[[4]]", "[[4", 1), "expected a list of layers for each stage"),
        (HF_TO_MM + ONE.replace("[[4]]", "[[5]]", 1), "places 5 layers, the model has 4"),
        (HF_TO_MM + ONE + " --cfg.parallel_config.tp_size 8", "does not divide the 4 key and value heads"),
        (HF_TO_MM.replace("hf_dir hf", "hf_dir nowhere") + ONE, "expected an existing directory, found 'nowhere'"),
        (HF_TO_MM.replace("Qwen2_5_VL", "Qwen2VL") + ONE, "use Qwen2_5_VLConverter instead of Qwen2VLConverter"),
        (HF_TO_MM.replace("mm_dir out", "mm_dir hf") + ONE, "is not apart from the source"),
        (HF_TO_MM.replace("mm_dir out", "mm_dir hf/mm") + ONE + " --cfg.overwrite", "is not apart from the source"),
        (HF_TO_MM + ONE + " --cfg.parallel_config '{\"tp_sise\": 2}'", "no key cfg.parallel_config.tp_sise; did you"),
        (HF_TO_MM + ONE + " --cfg.parallel_config '{\"tp_size\": 0}'", "tp_size: expected a whole number from 1"),
        (HF_TO_MM + ONE + " --cfg.parallel_config '{\"tp_size\": 1, \"tp_size\": 2}'", "'tp_size' is given twice"),
        (HF_TO_MM + ONE + " --cfg.parallel_config 3", "--cfg.parallel_config"),
        (HF_TO_MM + ONE + " --cfg.parallel 3", "unknown option --cfg.parallel"),
        (HF_TO_MM + ONE + " --cfg.mm_dir ''", "--cfg.mm_dir: expected the path of a directory, found ''"),
        (HF_TO_MM + ONE + " --cfg.workers", "--cfg.workers"),
        (HF_TO_MM.replace("hf_dir hf", "hf_dir hf@x") + ONE, "expected an existing directory, found 'hf@x'"),
        (HF_TO_MM.replace("hf_dir hf", "hf_dir hf@7") + ONE, "has no checkpoint"),
        ("verify hf", "missing: b"),
        ("verify hf hf hf", "unexpected argument 'hf'"),
        ("verify hf nowhere", "expected an existing directory, found 'nowhere'"),
        ("verify hf hf --cfg.a_vit_qkv_layout no", "expected auto or interleaved or hf, found 'no'"),
    ],
)  # fmt: skip
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert message in fails(line, capsys)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _name_absent(path: Path) -> None:
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda hf: next(hf.glob("model-00002*")).unlink(), "shards missing (model-00002"),
        (lambda hf: _truncate(next(hf.glob("model-00001*"))), "is truncated"),
        (lambda hf: _name_absent(hf / "model.safetensors.index.json"), "named that are not in their shard"),
        (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
        (lambda hf: (hf / "config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_damaged_sources(here: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str) -> None:
    damage(Path("hf"))
    assert message in fails(HF_TO_MM + ONE, capsys)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda mm: shutil.rmtree(mm / "release" / "mp_rank_00_001"), "pipeline ranks: 1, "),
        (lambda mm: _truncate(mm / "release" / "mp_rank_00_001" / "model_optim_rng.pt"), "truncated or damaged"),
        (lambda mm: (mm / "latest_checkpointed_iteration.txt").write_text("100"), "there is no 'iter_0000100'"),
        (lambda mm: shutil.rmtree(mm / "release"), "says 'release', but there is no 'release' (nothing)"),
        (lambda mm: _without_layer(mm), "absent"),
        (lambda mm: _harmful(mm), "absent"),
    ],
)
def test_damaged_checkpoints(here: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str) -> None:
    assert run(HF_TO_MM.replace("out", "mm") + TWO) == 0
    damage(Path("mm"))
    said = fails(MM_TO_HF + TWO, capsys)
    assert message in said
    assert not Path("harmed").exists()


def _without_layer(mm: Path) -> None:
    path = mm / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path)
    del content["model"]["text_decoder.decoder.layers.1.mlp.linear_fc2.weight"]
    torch.save(content, path)


class _Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def _harmful(mm: Path) -> None:
    path = mm / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(path)
    content["model"]["text_decoder.decoder.layers.1.mlp.linear_fc2.weight"] = _Harm()
    torch.save(content, path)


def test_existing_target_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HF_TO_MM + ONE) == 0
    (here / "out" / "iter_0000007").mkdir()
    before = fingerprint_raw(here / "out")
    assert run(HF_TO_MM + TWO) == 2
    assert "exists already" in capsys.readouterr().err
    assert fingerprint_raw(here / "out") == before
    assert run(HF_TO_MM + TWO + " --cfg.dry_run") == 0
    assert "would be refused, as it exists already" in capsys.readouterr().out
    assert run(HF_TO_MM + TWO + " --cfg.overwrite") == 0
    assert sorted(mm_files(here / "out")) == ["mp_rank_00_000", "mp_rank_00_001"]
    assert (here / "out" / "iter_0000007").is_dir(), "what is not replaced stays"


def test_model_directory_of_another_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HF_TO_MM.replace("out", "mm") + TWO) == 0
    write_hf(Path("other"), tiny_config(layers=5))
    said = fails(MM_TO_HF.replace("hf_dir hf", "hf_dir other") + TWO, capsys)
    assert "places 4 text layers, the model has 5" in said


def test_trained_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An iteration that Megatron saved: arguments, optimizer and random state beside the tensors."""
    assert run(HF_TO_MM.replace("out", "mm") + TWO) == 0
    for name, content in mm_files(Path("mm")).items():
        folder = Path("mm/iter_0000100") / name
        folder.mkdir(parents=True)
        model = {key: tensor.clone() for key, tensor in content["model"].items()}
        model["text_decoder.decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
        model["text_decoder.rotary_pos_emb.inv_freq"] = torch.ones(3)
        model["image_encoder.encoder.blocks.layers.0.mlp.linear_fc1._extra_state"] = torch.ones(2, dtype=torch.uint8)
        rest = {"args": argparse.Namespace(tp=2), "iteration": 100, "optimizer": {"state": {0: torch.ones(3)}},
                "rng_state": [_Harm()], "opt_param_scheduler": {"lr": 1e-5}}  # fmt: skip
        torch.save({"model": model, "checkpoint_version": 3.0, **rest}, folder / "model_optim_rng.pt")
    shutil.rmtree("mm/release")
    Path("mm/latest_checkpointed_iteration.txt").write_text("100")
    assert run(MM_TO_HF + TWO) == 0
    assert same(read_hf(Path("out")), read_hf(Path("hf")))
    assert run("verify mm/iter_0000100 out") == 0
    assert not Path("harmed").exists()
    path = Path("mm/iter_0000100/mp_rank_00_001/model_optim_rng.pt")
    content = torch.load(path, weights_only=False) | {"rng_state": None}
    content["model"]["text_decoder.decoder.layers.0.self_attention.q_layernorm.weight"] = torch.ones(8)
    torch.save(content, path)
    shutil.rmtree("out")
    assert "1 not part of the model (text_decoder.decoder.layers.0" in fails(MM_TO_HF + TWO, capsys)


def test_verify_exit_status(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HF_TO_MM + TWO + " --cfg.format safetensors --cfg.parallel_config.tp_size 2") == 0
    assert list(Path("out").rglob("*.pt")) == []
    assert run("verify hf out") == 0
    write_hf(Path("other"), tiny_config(), seed=1)
    capsys.readouterr()
    assert run("verify out other") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("0 tensor(s) equal, ")
    assert "numbers differ, by up to" in said[0]


def test_verify_tells_copies_that_differ(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(HF_TO_MM + TWO + " --cfg.parallel_config.tp_size 2") == 0
    path = Path("out/release/mp_rank_01_001/model_optim_rng.pt")
    content = torch.load(path)
    content["model"]["text_decoder.decoder.final_layernorm.weight"] += 1
    torch.save(content, path)
    assert run("verify out hf") == 1
    said = capsys.readouterr().out.splitlines()
    assert "model.norm.weight: differs between its copies in out" in said[-2]
    assert said[-1].endswith("1 difference(s)")


def test_progress_in_bytes_where_someone_looks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(HF_TO_MM + ONE) == 0
    assert "writing: " in terminal.getvalue()


@pytest.mark.parametrize("shell", ["{} >&-", "{} | true", "PYTHONIOENCODING=ascii {}", "{} >&- 2>&-", "{} <&-"])
def test_streams_that_are_closed_or_narrow(here: Path, shell: str) -> None:
    """What is said is not what matters: the conversion is made, and no traceback is shown."""
    line = f"{HF_TO_MM.replace('out', '模型')}{ONE}"
    command = shell.format(f"{sys.executable} -m duetvl.convert.cli {line}")
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(mm_files(Path("模型"))) == 1


def test_config_that_is_a_pipe_or_a_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("pipe")
    for name in ("pipe", "hf"):
        assert f"{name}: is not a file of keys" in fails(f"{HF_TO_MM}{ONE} --config {name}", capsys)


# -- trouble on the way -----------------------------------------------------------------------------------------------


def test_no_space_is_told_before_writing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1.0 kB free" in fails(HF_TO_MM + ONE, capsys)


@pytest.mark.parametrize("command", ["hf_to_mm", "mm_to_hf"])
def test_space_that_ends_while_writing(here: Path, command: str) -> None:
    """As a quota would have it; here the limit on a file's size."""
    assert run(HF_TO_MM.replace("out", "mm") + ONE) == 0
    lines = {
        "hf_to_mm": HF_TO_MM + ONE,
        "mm_to_hf": MM_TO_HF + ONE,
    }

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    before = fingerprint(here / "hf")
    words = [sys.executable, "-B", "-m", "duetvl.convert.cli", *shlex.split(lines[command])]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "could not be written: File too large" in done.stderr
    assert not Path("out").exists()
    assert not list(here.glob(".*.saving"))
    assert fingerprint(here / "hf") == before


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_full_disk(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "disk"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        line = HF_TO_MM.replace("mm_dir out", "mm_dir disk/out") + ONE
        assert "needs" in fails(line, capsys)
        usage = shutil.disk_usage(here)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # another process takes the space meanwhile
        assert "No space left on device" in fails(line, capsys)
        assert list(Path("disk").iterdir()) == []
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_target_that_may_not_be_written(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    assert "file is no directory that may be written to" in fails(HF_TO_MM.replace("out", "file/out") + ONE, capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "may be written to" in fails(HF_TO_MM + ONE, capsys)


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (3, signal.SIGINT), (3, signal.SIGTERM)])
def test_interrupt_in_the_middle(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int, number: int
) -> None:
    """Ctrl-C while tensors are being written, in this thread and in others."""
    write, count = streaming._write_at, [0]

    def slow(descriptor: int, data: memoryview, position: int) -> None:
        count[0] += 1
        if count[0] == 20:
            os.kill(os.getpid(), number)
        if count[0] >= 20:
            time.sleep(0.02)
        write(descriptor, data, position)

    monkeypatch.setattr(streaming, "_write_at", slow)
    before = fingerprint_raw(here / "hf")
    assert run(f"{HF_TO_MM}{ONE} --cfg.workers {workers}") == 130
    assert capsys.readouterr().err == "interrupted; nothing was left behind\n"
    assert 20 <= count[0] < 150, "of more than 300"
    assert not Path("out").exists()
    assert not list(here.glob(".*.saving"))
    assert fingerprint_raw(here / "hf") == before


def test_kill_leaves_nothing_that_looks_complete(here: Path) -> None:
    code = (
        "import os, signal, sys\nfrom duetvl.convert import plans, cli\n"
        "plans.write_text = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *shlex.split(HF_TO_MM + ONE)])
    assert done.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert run(HF_TO_MM + ONE) == 0, "and does not stand in the way of the next run"
    assert not list(here.glob(".*.saving"))


def test_two_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused, and leaves the first alone."""
    with open(".out.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "another process is writing it" in fails(HF_TO_MM + ONE, capsys)
        assert Path(".out.lock").exists()
    assert run(HF_TO_MM + ONE) == 0, "a lock that nobody holds is no obstacle"
    assert not list(here.glob(".*"))


def test_failing_worker_stops_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, name: str) -> Any:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(TensorFile, "view", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(f"{HF_TO_MM}{ONE} --cfg.workers 3")
    assert not Path("out").exists()
    assert not list(here.glob(".*.saving"))


def test_modes_do_not_depend_on_umask(here: Path) -> None:
    old = os.umask(0o077)
    try:
        assert run(HF_TO_MM + ONE) == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((here / "out").stat().st_mode) == 0o750
    assert stat.S_IMODE((here / "out/release/mp_rank_00/model_optim_rng.pt").stat().st_mode) == 0o640
