"""The command line: exit codes, messages without tracebacks, and what is imported when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from duetvl import doctor
from duetvl.cli import _overrides, _parse, main

sys.path.insert(0, str(Path(__file__).parent / "training"))
import tiny_run

HEAVY = ("torch", "mindspore", "transformers", "numpy", "pydantic", "matplotlib")


def test_help_is_quick_and_loads_nothing():
    code = (
        "import sys; from duetvl.cli import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: sys.stderr.write(repr([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    times = []
    for _ in range(3):
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - begun)
        assert "COMMAND" in done.stdout
        assert done.stderr == "[]"
    assert min(times) < 0.5


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
    assert error_of(capsys, "train", str(recipe), "parallel.tp=2").endswith("this release trains on one process")
    assert "no backend 'tourch'; did you mean 'torch'?" in error_of(capsys, "train", str(recipe), "--backend", "tourch")
    assert "has no metrics.jsonl" in error_of(capsys, "plot", str(recipe.parent))
    monkeypatch.setenv("DUETVL_BACKEND", "nothing")
    assert "no backend 'nothing'; there are mindspore, ms, " in error_of(capsys, "train", str(recipe))
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
    args = _parse(["train", "r.yaml", "optim.lr=1", "--backend", "torch", "train.steps=2", "--device", "cpu"])
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
    args = _parse(["train", "r.yaml", *argv])
    assert (args.resume, args.overrides) == (resume, overrides)


def test_check_looks_at_a_layout_for_many_processes_before_it_refuses_it(capsys, recipe):
    assert main(["check", str(recipe), "parallel.tp=2"]) == 2
    told = capsys.readouterr()
    assert "data.train: 12 records" in told.out
    assert told.err.endswith("pp 1 x dp 1 x cp 1 x tp 2 needs 2 processes; this release trains on one process\n")


def test_train_check_and_plot(capsys, recipe):
    assert main(["check", str(recipe), "train.steps=2"]) == 0
    assert "recipe: 2 steps of 4 samples" in capsys.readouterr().out
    assert main(["train", str(recipe), "train.steps=2", "--device", "cpu"]) == 0
    assert "step 2/2  loss " in capsys.readouterr().out
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
