"""duetvl bench infer: every combination is measured, with prompts and answers of exactly the asked size."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from duetvl.api import load_processor
from duetvl.cli import main
from duetvl.commands.bench import Case, Figures, make_prompts, mindie_csv, numbers, pictures
from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("bench") / "model")


def test_every_combination(model: Path, be: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--batch",
        "1,3",
        "--input-tokens",
        "90",
        "--output-tokens",
        "1,5",
        "--image-size",
        "0,56x28",
        "--repeat",
        "2",
    ]
    files = ["--json", str(tmp_path / "f.json"), "--csv", str(tmp_path / "f.csv")]
    assert main(["bench", "infer", str(model), *words, *files, "--backend", be.name, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 9 and "tokens/s" in shown[0]
    found = json.loads((tmp_path / "f.json").read_text())
    runs = found["runs"]
    shapes = [(run["batch"], run["output_tokens"], run["picture"], run["picture_tokens"]) for run in runs]
    assert shapes == [
        (1, 1, None, 0), (1, 1, "56x28", 2), (1, 5, None, 0), (1, 5, "56x28", 2),
        (3, 1, None, 0), (3, 1, "56x28", 2), (3, 5, None, 0), (3, 5, "56x28", 2),
    ]  # fmt: skip
    for run in runs:
        assert run["first_token_ms_p50"] > 0 and run["tokens_per_s"] > 0 and run["memory_gib"] > 0
        assert (run["between_ms_p50"] is None) == (run["output_tokens"] == 1)
    with open(tmp_path / "f.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["batch_size"] for row in rows] == ["1"] * 4 + ["3"] * 4
    assert len(rows[-1]["decode_token_times"].split()) == 12


def test_prompts_are_of_the_asked_length_and_all_different(model: Path) -> None:
    processor = load_processor(model)
    prompts = make_prompts(processor, Case(3, 80, 1, (56, 28)))
    assert [len(prompt) for prompt in prompts] == [80, 80, 80]
    assert len({prompt.input_ids.tobytes() for prompt in prompts}) == 3
    assert not np.array_equal(prompts[0].pixel_values, prompts[1].pixel_values)
    with pytest.raises(
        ConfigError, match=r"--input-tokens 20: the shortest prompt with a picture of 56x28 has \d+ tokens"
    ):
        make_prompts(processor, Case(1, 20, 1, (56, 28)))


def test_figures() -> None:
    """Two answers of three tokens: 0.5 s to the first, then 0.1 s and 0.3 s."""
    case = Case(2, 10, 3, (0, 0))
    figures = Figures(case, 0, [[0.5, 0.6, 0.9], [0.5, 0.6, 0.9]], 1.0, 2**30)
    row: dict[str, Any] = figures.row()
    assert (row["first_token_ms_p50"], row["between_ms_p50"], row["tokens_per_s"]) == (500.0, 200.0, 6.0)
    assert (row["decode_tokens_per_s"], row["memory_gib"]) == (8.0, 1.0)
    heading, values = mindie_csv([figures]).splitlines()
    assert heading.startswith(
        "batch_size,input_seq_len,output_seq_len,e2e_time(ms),prefill_time(ms),decoder_token_time(ms)"
    )
    assert values == "2,10,3,1000.0,500.0,200.0,2,500.0 500.0,100.0 300.0 100.0 300.0,500.0"


@pytest.mark.parametrize("text", ["", "0", "1,", "a", "1.5", "-1"])
def test_lists_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--batch '.*': expected whole numbers from 1"):
        numbers("--batch", text)


def test_picture_sizes() -> None:
    assert pictures("0, 448,1280x720") == [(0, 0), (448, 448), (1280, 720)]
    with pytest.raises(ConfigError, match="--image-size '3x'"):
        pictures("3x")
