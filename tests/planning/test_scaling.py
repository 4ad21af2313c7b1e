"""docs/scaling.md: its smallest rows are those that the code makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_rows_of_sixteen_devices(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    layout = scaling.planned(16, 16 * scaling.SAMPLES_A_DEVICE)
    for table in (scaling.steps, scaling.parts, scaling.checkpoints):
        _, _, row = table([layout])
        assert row in page


def test_every_number_is_written_by_one_rank(scaling):
    """Bytes of all ranks' weights, moments and masters together are those of the model and of what is trained."""
    layout = scaling.planned(16, 16 * scaling.SAMPLES_A_DEVICE)
    shapes = scaling.parameter_shapes(layout.config)
    numbers = dict.fromkeys(("weights", "exp_avg"), 0)
    for rank in range(16):
        held, owned, state = scaling.of_rank(layout, rank)
        sizes = scaling.size_of(scaling.written_pieces(held, owned, state, layout.division(rank)), "bfloat16")
        numbers = {kind: numbers[kind] + sizes[kind] for kind in numbers}
    whole = {path: scaling.math.prod(shape) for path, shape in shapes.items()}
    assert numbers["weights"] == 2 * sum(whole.values())
    assert numbers["exp_avg"] == 4 * sum(count for path, count in whole.items() if not path.startswith("visual."))
