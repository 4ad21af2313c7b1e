"""Guided answers: every one that ends is what its grammar allows, whatever the model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_run

import duetvl
from duetvl.cli import main
from duetvl.core.backend import Backend
from duetvl.core.errors import ConfigError
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.engine import Engine
from duetvl.inference.guided import Grammars
from duetvl.inference.request import Completion, Request
from duetvl.inference.sampling import Sampling

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("guided") / "model", std=0.2)


@pytest.fixture(scope="module")
def model(be: Backend, directory: Path) -> duetvl.Model:
    return duetvl.load_model(directory, backend=be)


def grammars(model: duetvl.Model) -> Grammars:
    processor = model.processor
    return Grammars(processor.tokenizer, model.family.vocabulary, processor.stop_token_ids)


def answers(model: duetvl.Model, guides: Any, count: int = 6, **options: Any) -> list[Completion]:
    """Sampled ones, all in the same passes, and one that is free among them."""
    prompt = model.processor([{"role": "user", "content": "say"}], add_generation_prompt=True)
    ends = frozenset(model.processor.stop_token_ids)
    made = [
        Request(prompt, sampling=Sampling(temperature=2.0, seed=seed), stop_ids=ends, guide=guides, **options)
        for seed in range(count)
    ]
    free = Request(prompt, stop_ids=ends, max_new_tokens=8)
    engine = Engine(model, tokenizer=model.processor.tokenizer, cache_tokens=4096)
    *found, last = engine.generate([*made, free])
    assert last.token_ids == model.generate(prompt, max_new_tokens=8).token_ids
    return found


def test_json_after_a_schema(model: duetvl.Model) -> None:
    for done in answers(model, grammars(model).json_schema(SCHEMA), max_new_tokens=64):
        assert done.error is None and done.finish_reason == "stop" and done.text is not None
        value = json.loads(done.text)
        assert set(value) == {"ok", "n"} and isinstance(value["ok"], bool) and 0 <= value["n"] <= 99
        assert not re.search(r"\s{2}", done.text)  # no blanks for ever


def test_a_pattern_and_a_choice(model: duetvl.Model) -> None:
    for done in answers(model, grammars(model).regex(r"[a-c]{2,5}-\d\d"), max_new_tokens=32):
        assert done.text is not None and re.fullmatch(r"[a-c]{2,5}-\d\d", done.text), done.text
    texts = ["red", "green", 'bl\u00fc "quoted"']
    found = answers(model, grammars(model).choice(texts), count=12, max_new_tokens=32)
    assert {done.text for done in found} <= set(texts) and len({done.text for done in found}) > 1


def test_choices_of_one_request_have_guides_of_their_own(model: duetvl.Model) -> None:
    for done in answers(model, grammars(model).regex("x{4}y{4}"), count=2, n=3, max_new_tokens=16):
        assert done.text == "xxxxyyyy"


def test_an_answer_that_is_cut_off_says_so(model: duetvl.Model) -> None:
    for done in answers(model, grammars(model).regex("z{30}"), count=2, max_new_tokens=7):
        assert (done.text, done.finish_reason) == ("zzzzzzz", "length")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda known: known.regex("(?=a)b"), "the pattern cannot be used: "),
        (lambda known: known.regex("("), "the pattern cannot be used: "),
        (lambda known: known.json_schema({"type": "nonsense"}), "the JSON schema cannot be used: "),
        (lambda known: known.json_schema("no json"), "the JSON schema cannot be used: "),
        (lambda known: known.json_schema({"$ref": "http://example.com/x"}), "the JSON schema cannot be used: "),
        (lambda known: known.regex("a" * 70_000), "has 70000 characters; at most 65536 are compiled"),
        (lambda known: known.choice([]), "a choice is between texts of at least one character"),
    ],
)
def test_grammars_that_make_no_sense(model: duetvl.Model, make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(grammars(model))


def test_nothing_ends_an_answer(model: duetvl.Model) -> None:
    with pytest.raises(ConfigError, match="need a token that ends them"):
        Grammars(TextTokenizer(tiny_run.tokenizer()), model.family.vocabulary, [])


def test_the_command(directory: Path, be: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    words = ["infer", str(directory), "--prompt", "say", "--device", "cpu", "--backend", be.name]
    assert main([*words, "--json-schema", str(schema)]) == 0
    assert json.loads(capsys.readouterr().out)["n"] >= 0
    assert main([*words, "--choice", "yes", "--choice", "no"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert main([*words, "--regex", "("]) == 2
    assert "the pattern cannot be used" in capsys.readouterr().err
