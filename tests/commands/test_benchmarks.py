"""benchmarks/all.py: what is in its table, that a benchmark gives its rows, and what `--compare` says of two runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PLACE = Path(__file__).parents[2] / "benchmarks"
HELP = """
import contextlib, io, os, runpy, sys
sys.path.insert(0, os.getcwd())
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
    assert "usage:" in shown.getvalue(), path
"""


def programs() -> list[Path]:
    """All but the table itself and what they share."""
    files = (path for path in PLACE.glob("*.py") if path.name != "all.py")
    return sorted(path for path in files if "__main__" in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    """all.py; what it imports by name from beside it does not stay."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(PLACE))
    spec = importlib.util.spec_from_file_location("benchmarks_all", PLACE / "all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in {"benchmarks_all", "harness", "encode", "qwen_tokenizer"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def run(table: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def of(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["all.py", *map(str, words)])
        return table.main(), capsys.readouterr().out

    return of


def report(table: ModuleType, **changes: dict[str, Any]) -> Any:
    """Two frameworks' steps and a copy; `changes` of a row by its side."""
    seconds = table.Seconds
    limit = table.harness.Limit("matmul", 0.8)
    step = table.Row("training step", "torch", "8 samples", seconds(1.0, 2.0), seconds(1.2, 1.3), "transformers", limit,
                     "python benchmarks/train_step.py")  # fmt: skip
    copy = replace(
        step, name="convert", side="host", ours=seconds(9.0, 1.0), clock="wall", command="benchmarks/convert.py"
    )
    rows = [step, replace(step, side="mindspore", ours=seconds(1.1, 2.0)), copy]
    about = {"date": "now", "machine": "a", "cores": 2, "load": [0.1, 0.9], "versions": "", "quick": True, "seconds": 1,
             "processor seconds": 1, "gflops": 1.0, "gigabytes a second": 1.0}  # fmt: skip
    return table.Report(about, [replace(row, **changes.get(row.side, {})) for row in rows], {})


def test_every_benchmark_is_on_the_page(table: ModuleType) -> None:
    page = (PLACE / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in programs() if f"[{path.name}]({path.name})" not in page] == []
    has_rows = re.compile(r"^(def rows\(|rows = )", re.MULTILINE)
    assert {path.stem for path in programs() if has_rows.search(path.read_text())} == set(table.BENCHMARKS)


def test_the_table_is_that_of_the_figures(table: ModuleType) -> None:
    figures = table.Report.read(table.FILE)
    assert table.table(figures) in (PLACE / "README.md").read_text(encoding="utf-8")
    files = {row.command.rpartition("/")[2].removesuffix(".py") for row in figures.rows}
    assert files | set(figures.failed) == set(table.BENCHMARKS)
    assert all(row.ours.by(row.clock) > 0 and row.ratios for row in figures.rows)


def test_help_runs() -> None:
    command = [sys.executable, "-W", "ignore", "-c", HELP, *map(str, [PLACE / "all.py", *programs()])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PLACE)
    assert done.returncode == 0, done.stderr


def test_compare_flags_what_got_slower(table: ModuleType, run: Callable[..., Any], tmp_path: Path) -> None:
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    report(table).write(then)
    assert table.Report.read(then) == report(table)
    status, said = run("--compare", then, "--read", then)
    assert status == 0 and "SLOWER" not in said and "compared 3 rows, 0 benchmarks slower" in said

    report(table, mindspore={"ours": table.Seconds(1.1 * 1.12, 2.0)}).write(now)
    status, said = run("--compare", then, "--read", now)
    slower = [line for line in said.splitlines() if line.endswith("SLOWER")]
    assert status == 1 and len(slower) == 1 and slower[0].startswith("training step, mindspore: 0.92 to 1.03 of ")

    report(table, host={"ours": table.Seconds(9.0, 1.2)}, torch={"ours": table.Seconds(1.05, 99.0)}).write(now)
    status, said = run("--compare", then, "--read", now)  # the copy is measured on the wall, the step is not
    slower = [line for line in said.splitlines() if line.endswith("SLOWER")]
    assert status == 1 and len(slower) == 1 and slower[0].startswith("convert, host:")

    busy = table.Report.read(now)
    replace(busy, about={**busy.about, "load": [0.1, 5.0]}).write(now)
    status, said = run("--compare", then, "--read", now)
    assert status == 0 and "convert, host: by the clock on the wall of a busy machine, not compared" in said


def test_a_faster_other_side_is_no_slower_row(table: ModuleType, run: Callable[..., Any], tmp_path: Path) -> None:
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    report(table).write(then)
    report(table, torch={"theirs": table.Seconds(0.6, 0.6)}).write(now)
    assert run("--compare", then, "--read", now)[0] == 0
    report(table, torch={"theirs": None, "other": ""}, mindspore={"work": "other samples"}).write(now)
    status, said = run("--compare", then, "--read", now)
    assert status == 0 and "training step, mindspore: other work" in said and "compared 2 rows" in said


def test_a_comparison_of_nothing_does_not_pass(table: ModuleType, run: Callable[..., Any], tmp_path: Path) -> None:
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    report(table).write(then)
    report(table, **{side: {"work": "whole"} for side in ("torch", "mindspore", "host")}).write(now)
    status, said = run("--compare", then, "--read", now)
    assert status == 1 and "nothing could be compared" in said


def test_what_one_of_both_lacks_is_said(table: ModuleType, run: Callable[..., Any], tmp_path: Path) -> None:
    then, now = tmp_path / "then.json", tmp_path / "now.json"
    report(table).write(then)
    replace(report(table), rows=report(table).rows[:1]).write(now)
    status, said = run("--compare", then, "--read", now)
    assert status == 0 and "only then, not compared: training step, mindspore; convert, host\n" in said


def test_a_benchmark_gives_its_rows(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that needs no framework, where no other library is installed."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(table.harness, "installed", lambda *packages: False)
    table.inside("encode", quick=True)
    (row,), (limits,) = table.said(capsys.readouterr().out)
    assert (row.name, row.side, row.theirs) == ("encode", "host", None) and row.ratios.keys() == {"the limit"}
    assert "1024 patch rows" in row.work and row.command == "python benchmarks/encode.py"
    assert limits.flops > 0 and limits.bandwidth > 0
    assert "none installed" in table.line_of([row])


def test_what_fails_is_told_and_the_rest_goes_on(table: ModuleType) -> None:
    measured = table.measure(["no_such_benchmark"], quick=True)
    assert measured.rows == [] and "invalid choice" in measured.failed["no_such_benchmark"]
    assert "- failed: no_such_benchmark: " in table.table(measured)


def test_what_a_gpu_gave_is_quoted(table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert table.on_gpu("training step") == table.on_gpu("convert, resplit") == "not measured"
    lines = [
        "| sft | useful operations | 412 TFLOP/s, 52% of the matrix products' limit measured beside it (790) |",
        "| decode | batch 1 | 180 tokens a second, 5.5 ms a pass, 61% of the bandwidth measured beside it (4 TB/s) |",
    ]
    (tmp_path / "gpu.md").write_text("\n".join(lines))
    assert table.on_gpu("training step") == "7B: [52% of the matrix products](results/gpu.md)"
    assert table.on_gpu("decode, one") == "7B: [61% of the bandwidth](results/gpu.md)"
    assert table.on_gpu("LoRA step") == "not measured"
