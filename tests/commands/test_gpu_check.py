"""benchmarks/gpu.py as far as a CPU lets it: the first run on a card should not end at a slip of the pen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

WAITS = "waits for the device in a step"
FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_taken(gpu: ModuleType) -> None:
    place = gpu.Place("cpu", tiny=True)
    for part in ("sft", "lora"):
        rows = gpu.MEASURED[part][1](place)
        assert rows.keys() == {"a step", "tokens a second", "useful operations", "peak memory", WAITS}
        assert "120 tokens" in rows["a step"]
        first, last = (float(word) for word in rows["a step"].rpartition("losses ")[2].split(" to "))
        assert last < first
    assert gpu.decode(place).keys() == {f"batch {n}{how}" for n in (1, 3) for how in ("", ", not recorded")}
    for row in gpu.compiled(place).values():
        assert float(row.rpartition(" ")[2]) < 0.05  # roundings in another order


def test_the_shape_is_that_of_the_published_model(gpu: ModuleType) -> None:
    from duetvl.models.qwen_vl.config import ModelConfig
    from duetvl.models.qwen_vl.parameters import parameter_shapes

    numbers = 0
    for shape in parameter_shapes(ModelConfig.from_dict(gpu.SHAPE_7B)).values():
        count = 1
        for length in shape:
            count *= length
        numbers += count
    assert numbers == 8_292_166_656


def test_what_fails_is_a_row_and_the_rest_goes_on(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {
        "slow": (0.5, lambda place: [sys.executable, "-c", "import time; time.sleep(60)"]),
        "bad": (60, lambda place: [sys.executable, "-c", "print('FAILED a.py::b'); import sys; sys.exit('2 | 3')"]),
        "good": (60, lambda place: [sys.executable, "-c", "print('3 passed')"]),
    }
    monkeypatch.setattr(gpu, "COMMANDS", parts)
    monkeypatch.setattr(gpu, "PARTS", {**parts, **gpu.MEASURED})
    page = tmp_path / "gpu.md"
    monkeypatch.setattr(
        sys, "argv",
        ["gpu.py", "--device", "cpu", "--tiny", "--only", "slow", "bad", "good", "lora", "--output", str(page)],
    )  # fmt: skip
    assert gpu.main() == 1
    text = page.read_text()
    assert "| slow | failed | no end within its 0.5 s |" in text
    assert "| bad | failed | status 1: 2 \\| 3 |" in text and "| bad | failed 1 | FAILED a.py::b |" in text
    assert "| good | passed | 3 passed |" in text
    assert "| lora | tokens a second |" in text


def test_parts_end_within_eight_minutes(gpu: ModuleType) -> None:
    assert sum(limit for limit, _ in gpu.PARTS.values()) <= 480
