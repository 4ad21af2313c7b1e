"""generation_config.json: what is taken over, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from duetvl.core.errors import CheckpointError
from duetvl.inference.defaults import Defaults, read_defaults
from duetvl.inference.sampling import Sampling

PROCESSOR: Any = SimpleNamespace(stop_token_ids=(7, 8))
PUBLISHED = {
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05, "temperature": 0.1, "top_p": 0.001, "top_k": 1, "transformers_version": "4.49.0",
}  # fmt: skip


def read(directory: Path, values: object) -> Defaults:
    (directory / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_defaults(directory, PROCESSOR)


def test_nothing_is_greedy_and_the_tokenizer_s_ends(tmp_path):
    found = read_defaults(tmp_path, PROCESSOR)
    assert (found.sampling, found.stop_ids, found.told) == (Sampling(), frozenset({7, 8}), "")


def test_a_published_one(tmp_path):
    found = read(tmp_path, PUBLISHED)
    assert found.sampling == Sampling(temperature=0.1, top_k=1, top_p=0.001, repetition_penalty=1.05)
    assert found.stop_ids == {151645, 151643}
    assert found.told.endswith(
        "generation_config.json: sampling: temperature 0.1, top_k 1, top_p 0.001, repetition_penalty 1.05"
    )


def test_values_that_are_not_given_are_transformers(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(do_sample=True)
    assert read(tmp_path, {"do_sample": True}).sampling == Sampling(
        temperature=theirs.temperature, top_k=theirs.top_k, top_p=theirs.top_p
    )


def test_without_sampling_the_penalty_alone_counts(tmp_path):
    found = read(tmp_path, {**PUBLISHED, "do_sample": False, "eos_token_id": 5})
    assert found.sampling == Sampling(repetition_penalty=1.05)
    assert found.stop_ids == {5} and found.told.endswith("sampling: greedy, repetition_penalty 1.05")


def test_what_is_not_done_is_said(tmp_path):
    found = read(tmp_path, {"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 0.9, "early_stopping": False})
    assert found.ignored == ("num_beams 4", "typical_p 0.9")
    assert found.told.endswith("sampling: greedy; not done: num_beams 4, typical_p 0.9")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature is -1"), ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": [1, True]}, "eos_token_id"), ("{", "cannot be read as JSON"), ([], "expected an object"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense(tmp_path, values, message):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        read(tmp_path, values)
