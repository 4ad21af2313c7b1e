"""README.md as printed: every command and every example, in order, in one shell, in a copy of the tree.

The blocks of README.zh.md are the same (`tests/test_docs.py`). What `.ci/run` runs itself is left out here: the demo,
whose model and data are made without its training, the tests, and the installation.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import clips
import pytest
from PIL import Image

from duetvl.training.watching.metrics import read_metrics

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_BY_CI = {
    "bash scripts/demo.sh",
    "bash scripts/test.sh",
    'pip install -e ".[torch]"',
    'pip install -e ".[mindspore]"',
    'pip install -e ".[torch,mindspore]" -c constraints.txt',
}
RECORDS = "records.jsonl"


def script(readme: str) -> str:
    """One shell script of all blocks: commands as they are, recipes and records to files, programs to python."""
    parts = ["set -eo pipefail"]
    skipped = set()
    for found in BLOCK.finditer(readme):
        language, text = found.groups()
        if language == "bash":
            skipped |= RUN_BY_CI & set(text.splitlines())
            parts += [line for line in text.splitlines() if line not in RUN_BY_CI]
        elif language in ("yaml", "yml"):  # a recipe; another file
            (name,) = re.findall(r"`(\w+\.yaml)`", readme[: found.start()].strip().splitlines()[-1])
            parts += [f"cat > {name} <<'END'", text + "END"]
        elif language == "json":
            parts.append(f"echo {shlex.quote(json.dumps(json.loads(text)))} >> {RECORDS}")
        else:
            assert language == "python"
            parts += ["python - <<'END'", text + "END"]
    assert skipped == RUN_BY_CI
    overrides = f"data.train={RECORDS} data.val=null train.eval_every=null"
    return "\n".join([*parts, f"duetvl data preview run.yaml {overrides} -n 2 -o records.png"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the tree as in a clone, the environment that runs the tests as `.venv`, and the demo's data."""
    place = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["cp", "--parents", *filter(None, listed.decode().split("\0")), place], cwd=ROOT, check=True)
    activate = place / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={place}\n")
    code = "import run, pathlib; run.prepare(pathlib.Path('build/demo'))"
    paths = os.pathsep.join([str(place / "scripts" / "demo"), str(place)])
    subprocess.run([sys.executable, "-c", code], cwd=place, env=os.environ | {"PYTHONPATH": paths}, check=True)
    for name in ("cat", "a", "b"):
        (place / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (56, 56), "red").save(place / "pictures" / f"{name}.png")
    (place / "clips").mkdir()
    clips.write_clip(place / "clips" / "door.mp4")
    return place


@pytest.fixture(scope="module")
def printed(place: Path) -> str:
    """What the commands print; they have run in `place`."""
    for framework in ("torch", "mindspore"):
        if find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        ["bash", "-c", script((place / "README.md").read_text(encoding="utf-8"))],
        cwd=place, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_command_and_example_works(place: Path, printed: str) -> None:
    made = (
        "preview.png", "compare.png", "records.png", "runs/run/loss.png", "runs/run/export/model.safetensors",
        "runs/again/export/model.safetensors", "runs/lora/export/adapter_model.safetensors",
        "runs/step-30/model.safetensors", "build/demo/mm/release",
    )  # fmt: skip
    assert [path for path in made if not (place / path).exists()] == []
    assert "of them trained" in printed and "records.jsonl:2: " in printed


def test_no_command_lifts_the_learning_rate_of_another(place: Path, printed: str) -> None:
    """After its warm-up the rate of a run falls, on whichever framework it is resumed."""
    first, again = ([row for row in read_metrics(place / "runs" / name) if "lr" in row] for name in ("run", "again"))
    assert [row["step"] for row in first] == [row["step"] for row in again] == list(range(1, 61))
    rates = [row["lr"] for row in first]
    assert rates == [row["lr"] for row in again]
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and peak == 6


def test_a_run_of_ten_steps_by_each_launcher(place: Path, printed: str) -> None:
    for name, backend in (("torchrun", "torch_npu"), ("msrun", "mindspore")):
        assert read_metrics(place / "runs" / name)[-1]["step"] == 10
        (meta,) = (place / "runs" / name / "checkpoints").glob("step-0000010/*.json")
        assert backend in meta.read_text()
