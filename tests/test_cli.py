"""The command line: exit codes, messages without tracebacks, and what is imported when."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny_run
from PIL import Image

from duetvl import doctor
from duetvl.cli import _overrides, main
from duetvl.commands.parser import parse
from duetvl.core import backend as backend_module
from duetvl.core.errors import BackendError

HEAVY = ("torch", "mindspore", "transformers", "numpy", "pydantic", "matplotlib")


def test_help_loads_nothing():
    code = (
        "import sys; from duetvl.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: sys.stderr.write(repr([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "COMMAND" in done.stdout
    assert done.stderr == "[]"


def error_of(capsys, *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removesuffix("\n")


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("DUETVL_BACKEND", raising=False)
    return tiny_run.write_recipe(tmp_path)


def test_mistakes_are_one_line_and_status_2(capsys, recipe, monkeypatch):
    assert error_of(capsys, "train", str(recipe), "optim.rl=3e-5").startswith(
        "error: optim has no field 'rl'; did you mean 'lr'? (betas,"
    )
    assert error_of(capsys, "train", "none.yaml") == "error: none.yaml: no such file"
    assert error_of(capsys, "train", str(recipe), "parallel.tp=2").endswith(
        "or parallel.tp=1 takes the same steps on one"
    )
    assert "no backend 'tourch'; did you mean 'torch'?" in error_of(capsys, "train", str(recipe), "--backend", "tourch")
    assert "has no metrics.jsonl" in error_of(capsys, "plot", str(recipe.parent))
    monkeypatch.setenv("DUETVL_BACKEND", "nothing")
    assert "no backend 'nothing'; there are auto, mindspore, ms, " in error_of(capsys, "train", str(recipe))
    assert not (recipe.parent / "runs").exists()


def test_debug_shows_the_traceback(recipe, monkeypatch):
    monkeypatch.setenv("DUETVL_DEBUG", "1")
    with pytest.raises(Exception, match="no such file"):
        main(["train", "none.yaml"])


@pytest.mark.parametrize("argv", ["train", "train r.yaml --rl", "train r.yaml lr", "plot a --x=1", ""])
def test_a_wrong_command_is_argparse_s_error(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2
    assert "usage: duetvl" in capsys.readouterr().err


def test_overrides_stand_anywhere_and_options_win(monkeypatch):
    monkeypatch.setenv("DUETVL_BACKEND", "mindspore")
    args = parse(["train", "r.yaml", "optim.lr=1", "--backend", "torch", "train.steps=2", "--device", "cpu"])
    assert _overrides(args) == [
        "backend.name=mindspore", "optim.lr=1", "train.steps=2", "backend.name=torch", "backend.device=cpu",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "resume", "overrides"),
    [
        ([], None, []),
        (["--resume"], "", []),
        (["--resume", "run@5"], "run@5", []),
        (["--resume", "optim.lr=1", "train.steps=2"], "", ["optim.lr=1", "train.steps=2"]),
    ],
)
def test_resume(argv, resume, overrides):
    args = parse(["train", "r.yaml", *argv])
    assert (args.resume, args.overrides) == (resume, overrides)


def test_check_shows_a_layout_for_many_processes_on_one(capsys, recipe):
    layers = ["parallel.vision_layers=[2,0]", "parallel.language_layers=[1,1]"]
    assert main(["check", str(recipe), "parallel.tp=2", "parallel.pp=2", *layers]) == 0
    told = capsys.readouterr().out
    assert "data.train: 12 records" in told
    assert (
        "layout: pp 2 x dp 1 x cp 1 x tp 2 needs 4 processes, vision layers [[2, 0]], language layers [[1, 1]]" in told
    )
    flat = "parallel.pp=1 parallel.vision_layers=null parallel.language_layers=null"
    lines = told.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("  tp ")] == ["  tp 0", "  tp 1"]
    assert any(line.startswith("  a rank sends about ") for line in lines)
    assert main(["train", str(recipe), "parallel.tp=2"]) == 2
    assert main(["check", str(recipe), "parallel.dp=2", "parallel.zero=3", "train.recompute=full"]) == 0
    told = capsys.readouterr().out
    assert "  zero 3: a rank holds " in told and " of blocks gathered and their gradients" in told
    assert main(["check", str(recipe), "parallel.tp=2", "parallel.pp=2", *layers, *flat.split(), "parallel.tp=1"]) == 0
    told = capsys.readouterr().out
    assert "layout:" not in told and "schedule:" not in told


def test_check_draws_the_schedule_of_a_pipeline(capsys, recipe):
    picture = recipe.parent / "schedule.png"
    argv = ["check", str(recipe), "parallel.pp=2", "data.pack=false", "--schedule", str(picture)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("schedule: ")]
    assert lines[at] == "schedule: 2 ranks, 4 micro-batches: bubble 25.0 %, formula 25.0 %"
    assert [line[:8] for line in lines[at + 1 : at + 3]] == ["  rank 0", "  rank 1"]
    assert lines[at + 3] == f"  drawn: {picture}"
    assert Image.open(picture).format == "PNG"


def test_a_schedule_that_cannot_be_drawn_is_refused_at_once(capsys, recipe):
    told = error_of(capsys, "check", str(recipe), "--schedule", str(recipe.parent / "s.png"))
    assert told == "error: --schedule: parallel.pp is 1, so there is no pipeline to draw; give parallel.pp=2 or more"
    told = error_of(capsys, "check", str(recipe), "parallel.pp=2", "--schedule", str(recipe))
    assert told.startswith(f"error: --schedule {recipe}: exists already and is not a PNG file")


def test_an_unknown_backend_is_refused_by_every_command_that_reads_a_recipe(capsys, recipe, monkeypatch):
    expected = "error: backend.name: no backend 'foo'; there are auto, mindspore, ms, pytorch, torch, torch_npu"
    commands = (["train"], ["check"], ["data", "preview"])
    for command in commands:
        assert error_of(capsys, *command, str(recipe), "--backend", "foo") == expected
        assert error_of(capsys, *command, str(recipe), "backend.name=foo") == expected
    monkeypatch.setenv("DUETVL_BACKEND", "foo")
    for command in commands:
        assert error_of(capsys, *command, str(recipe)) == expected


def test_check_refuses_a_backend_that_is_not_there(capsys, recipe, monkeypatch):
    assert error_of(capsys, "check", str(recipe), "--backend", "torch", "--device", "abacus") == (
        "error: backend torch_npu has no device 'abacus'; it has cpu, cuda, npu and auto"
    )
    only(monkeypatch, "mindspore")
    assert error_of(capsys, "check", str(recipe), "--backend", "torch") == (
        "error: backend torch_npu needs PyTorch, which is not installed: pip install 'duetvl[torch]'"
    )
    assert main(["check", str(recipe)]) == 0
    assert capsys.readouterr().out.startswith("backend: mindspore, device cpu\n")


def only(monkeypatch: pytest.MonkeyPatch, *frameworks: str) -> None:
    """As if of all frameworks these alone were installed."""
    monkeypatch.setattr(
        backend_module, "find_spec", lambda name: importlib.util.find_spec("json") if name in frameworks else None
    )


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [(("torch", "mindspore"), "torch_npu"), (("torch",), "torch_npu"), (("mindspore",), "mindspore")],
)
def test_without_a_name_the_backend_that_is_installed_is_taken(monkeypatch, installed, chosen):
    only(monkeypatch, *installed)
    assert backend_module.choose_backend() == chosen


def test_without_any_framework_both_are_named(capsys, recipe, monkeypatch):
    only(monkeypatch)
    assert error_of(capsys, "train", str(recipe)) == (
        "error: no framework is installed; a backend needs PyTorch (pip install 'duetvl[torch]') or MindSpore "
        "(pip install 'duetvl[mindspore]')"
    )


def test_a_directory_of_the_framework_s_name_is_no_framework(monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: ModuleSpec(name, None, is_package=True))
    with pytest.raises(BackendError, match="no framework is installed"):
        backend_module.choose_backend()


def test_a_registered_backend_that_cannot_be_loaded(monkeypatch):
    point = EntryPoint("mine", "gone.module:create", backend_module.ENTRY_POINTS)
    monkeypatch.setattr(backend_module, "entry_points", lambda group: [point])
    only(monkeypatch)
    assert backend_module.choose_backend() == "mine"
    with pytest.raises(BackendError, match=r"backend mine cannot be loaded from gone\.module:create: No module named"):
        backend_module.load_backend("mine")


def test_train_check_and_plot(capsys, recipe):
    assert main(["check", str(recipe), "train.steps=2"]) == 0
    assert "recipe: 2 steps of 4 samples" in capsys.readouterr().out
    assert main(["train", str(recipe), "train.steps=2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(("backend: torch_npu (torch 2.", "backend: mindspore (mindspore 2."))
    assert "step 2/2  loss " in out
    run = recipe.parent / "runs" / "tiny"
    assert main(["plot", str(run)]) == 0
    assert (run / "loss.png").exists()
    assert main(["plot", str(run), str(run), "-o", str(run / "two.png")]) == 0
    assert (run / "two.png").exists()
    assert main(["train", str(recipe), "train.steps=2", "--resume"]) == 0
    assert "all 2 steps are done already" in capsys.readouterr().out


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("duetvl.cli._doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_doctor_tries_each_place_in_its_own_process(monkeypatch):
    pytest.importorskip("torch")
    works = doctor.examine("torch_npu", "cpu")
    assert works.works
    assert "torch" in works.detail
    missing = doctor.examine("torch_npu", "abacus")
    assert not missing.works
    assert "no device 'abacus'" in missing.detail
    assert "\n" not in missing.detail


def test_doctor_survives_a_crash_and_a_hang(monkeypatch):
    def script(code: str) -> None:
        plain = subprocess.run
        monkeypatch.setattr(doctor.subprocess, "run", lambda argv, **options: plain([*argv[:2], code], **options))

    script("import os; os.kill(os.getpid(), 11)")
    assert doctor.examine("torch_npu", "cpu").detail == "the process died of SIGSEGV"
    monkeypatch.undo()
    script("import sys; sys.exit('oh no')")
    assert doctor.examine("torch_npu", "cpu").detail == "the process ended with status 1: oh no"
    monkeypatch.undo()
    script("import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "TIMEOUT_S", 0.5)
    assert doctor.examine("torch_npu", "cpu").detail == "no answer within 0.5 s"


def test_doctor_reports_every_backend(monkeypatch, capsys):
    findings = {("torch_npu", "cpu"): (True, "torch 2"), ("mindspore", "cpu"): (False, "MindSpore is not installed")}

    def examine(backend, device):
        works, detail = findings.get((backend, device), (False, "not here"))
        return doctor.Finding(backend, device, works, detail)

    monkeypatch.setattr(doctor, "examine", examine)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch_npu   cpu     works    torch 2" in out
    assert "mindspore   cpu     -        MindSpore is not installed" in out
    assert "-> pip install 'duetvl[mindspore]'" in out
    findings.clear()
    assert main(["doctor"]) == 1


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("torch_npu", "PyTorch is not installed in "), ("mindspore", "MindSpore is not installed")],
)
def test_launch_scripts_name_a_framework_that_is_missing(backend, expected, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(bare)}
    script = Path(__file__).parents[1] / "launch" / backend / "train.sh"
    done = subprocess.run(["bash", str(script), "run.yaml"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert expected in done.stderr and f"{bare} -m pip install 'duetvl[" in done.stderr
    environment["PYTHON"] = "python9.99"
    done = subprocess.run(["bash", str(script), "run.yaml"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: PYTHON=python9.99: no such program\n")


@pytest.mark.parametrize("backend", ["torch_npu", "mindspore"])
def test_launch_scripts_hand_on_what_they_are_given(backend, tmp_path):
    """To an interpreter that says what it was asked to run; the first question is for the framework."""
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@ with $TASK_QUEUE_ENABLE $CPU_AFFINITY_CONF"\n')
    echo.chmod(0o755)
    script = Path(__file__).parents[1] / "launch" / backend / "train.sh"

    def said(**environment: str) -> str:
        given = {"PATH": os.environ["PATH"], "PYTHON": str(echo), **environment}
        done = subprocess.run(["bash", str(script), "a b.yaml", "x=1"], env=given, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    ours = "2 1" if backend == "torch_npu" else " "
    assert said() == f"-m duetvl launch --backend {backend} --nproc 1 -- train a b.yaml x=1 with {ours}\n"
    nodes = {"NPROC": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER": "node0:29500", "RESTARTS": "3", "LOG_DIR": "logs"}
    assert said(**nodes, TASK_QUEUE_ENABLE="1", CPU_AFFINITY_CONF="0") == (
        f"-m duetvl launch --backend {backend} --nproc 8 --nnodes 2 --node-rank 1 --master node0:29500 --restarts 3 "
        "--log-dir logs -- train a b.yaml x=1 with 1 0\n"
    )


@pytest.mark.parametrize("backend", ["torch_npu", "mindspore"])
def test_a_port_that_is_taken_is_told_before_anything_starts(backend, recipe, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        words = ["launch", "--backend", backend, "--nproc", "1", "--nnodes", "2", "--master", master]
        words += ["--log-dir", str(tmp_path / "logs")]
        assert main([*words, "--", "train", str(recipe), "--device", "cpu", "parallel.dp=2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--master {master}: its port cannot be opened on this node" in error
    assert not (tmp_path / "logs").exists()


def test_scripts_are_bash():
    scripts = sorted(Path(__file__).parents[1].glob("launch/**/*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), script


@pytest.mark.parametrize(("backend", "launcher"), [("torch_npu", "torch"), ("mindspore", "mindspore")])
def test_launch_scripts(backend, launcher, recipe):
    pytest.importorskip(launcher)
    script = Path(__file__).parents[1] / "launch" / backend / "train.sh"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), str(recipe), "--device", "cpu", "train.steps=1"],
        env=environment, capture_output=True, text=True, timeout=300, cwd=recipe.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 1/1  loss") == 1
    rows = (recipe.parent / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 1]
    stored = (recipe.parent / "runs" / "tiny" / "resolved_recipe.yaml").read_text()
    assert f"name: {backend}" in stored


@pytest.mark.parametrize(("backend", "launcher"), [("torch_npu", "torch"), ("mindspore", "mindspore")])
def test_a_mistake_shows_no_traceback_of_the_launcher(backend, launcher, tmp_path):
    pytest.importorskip(launcher)
    script = Path(__file__).parents[1] / "launch" / backend / "train.sh"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), "none.yaml", "--device", "cpu"],
        env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout + done.stderr == "error: none.yaml: no such file\n"
