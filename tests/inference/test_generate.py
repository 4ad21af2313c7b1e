"""Generation on both backends: transformers' greedy tokens, whoever else is in the batch, and where it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny_run

import duetvl
from duetvl.core.batch import Sample
from duetvl.core.errors import CheckpointError, ConfigError, DataError, DuetvlError

NEW = 10
MODELS = ("qwen2-tied", "qwen2.5-untied", "qwen2.5-real-heads")
every_model = pytest.mark.parametrize("name", MODELS)
# Videos of one second per temporal patch: transformers 4.57 truncates fractions of one.
PROMPTS = {
    "text": oracle.sample(9, seed=21),
    "image": oracle.sample(3, oracle.Image((1, 10, 12)), 6, seed=22),
    "two images": oracle.sample(2, oracle.Image((1, 4, 6)), 3, oracle.Image((1, 8, 8)), 5, seed=23),
    "video": oracle.sample(4, oracle.Video((3, 10, 8)), 5, seed=24),
    "ends with an image": oracle.sample(3, oracle.Image((1, 6, 4)), seed=25),
}


def expected_tokens(model, prompt: Sample) -> list[int]:
    """Transformers' greedy continuation."""
    import torch

    keywords = oracle.arguments(prompt)
    if prompt.second_per_grid_ts is not None and model.config.model_type == "qwen2_5_vl":
        keywords["second_per_grid_ts"] = torch.tensor(prompt.second_per_grid_ts)
    mask = torch.ones_like(keywords["input_ids"])
    found = model.generate(**keywords, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def answers(tiny) -> dict[str, dict[str, list[int]]]:
    """What transformers says to each prompt, by model."""
    return {name: {k: expected_tokens(tiny.theirs(name), p) for k, p in PROMPTS.items()} for name in MODELS}


@every_model
def test_greedy_tokens_are_those_of_transformers(tiny, be, answers, name):
    model = tiny.ours(name, be)
    for kind, prompt in PROMPTS.items():
        found = model.generate(prompt, max_new_tokens=NEW)
        assert found.token_ids == answers[name][kind], kind
        assert found.text is None  # the directory has no tokenizer


@every_model
def test_neighbours_change_nothing(tiny, be, answers, name):
    """All prompts at once, of very different lengths, and one of them twice."""
    kinds = ["video", "text", "ends with an image", "image", "two images", "text"]
    found = tiny.ours(name, be).generate_many([PROMPTS[kind] for kind in kinds], max_new_tokens=NEW)
    assert [answer.token_ids for answer in found] == [answers[name][kind] for kind in kinds]


@pytest.mark.parametrize("seconds", [0.5, 1.3])
def test_cached_steps_are_whole_passes(tiny, be, seconds):
    """Fractional seconds, where transformers is no oracle: every token is the argmax of a pass without a cache."""
    model = tiny.ours("qwen2.5-untied", be)
    prompt = oracle.sample(4, oracle.Video((4, 8, 4), seconds=seconds), 3, seed=26)
    for token in model.generate(prompt, max_new_tokens=NEW).token_ids:
        logits = np.array(be.to_numpy(model.logits(model.pack([prompt]))))
        assert logits[-1].argmax() == token
        prompt = replace(prompt, input_ids=np.append(prompt.input_ids, token), labels=None)


def test_it_stops_at_a_stop_token_and_keeps_it(tiny, be, answers):
    """Each sequence by itself: those that end early leave the others alone."""
    name = "qwen2.5-untied"
    kinds = list(PROMPTS)
    stops = {answers[name]["text"][0], answers[name]["image"][4], answers[name]["video"][6]}
    found = tiny.ours(name, be).generate_many([PROMPTS[kind] for kind in kinds], max_new_tokens=NEW, stop=stops)
    lengths = set()
    for kind, answer in zip(kinds, found, strict=True):
        whole = answers[name][kind]
        length = next((i + 1 for i, token in enumerate(whole) if token in stops), NEW)
        assert answer.token_ids == whole[:length]
        lengths.add(length)
    assert len(lengths) > 1


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit(tiny, be, answers, limit):
    found = tiny.ours("qwen2-tied", be).generate(PROMPTS["image"], max_new_tokens=limit)
    assert found.token_ids == answers["qwen2-tied"]["image"][:limit]


@every_model
def test_a_cache_takes_what_the_model_says(tiny, be, name):
    model = tiny.ours(name, be)
    cache = model.create_cache(blocks=3)
    size = {"float32": 4, "bfloat16": 2}[model.dtype]
    taken = sum(size * int(np.prod(x.shape)) for x in (*cache.keys, *cache.values))
    assert taken == 3 * model.cache_block_bytes


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("talker") / "model")


def test_a_conversation(be, talker):
    from PIL import Image

    model, processor = duetvl.load_model(talker, backend=be), duetvl.load_processor(talker)
    picture = {"type": "image", "image": Image.new("RGB", (60, 90), "red")}
    question = [{"role": "user", "content": [picture, {"type": "text", "text": "which colour?"}]}]
    sampling = duetvl.Sampling(temperature=1.5, seed=3)
    told: list[str] = []
    answer = model.generate(question, max_new_tokens=30, sampling=sampling, stop=(), on_text=told.append)
    prompt = processor(question, add_generation_prompt=True)
    assert answer == model.generate(prompt, max_new_tokens=30, sampling=sampling, stop=())
    assert answer.text == processor.decode(answer.token_ids) == "".join(told)
    assert len(answer.token_ids) == 30
    assert len(told) > 5

    middle = answer.token_ids[10]
    stopped = model.generate(question, max_new_tokens=30, sampling=sampling, stop=[middle])
    assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(middle) + 1]
    ends = {processor.tokenizer.token_id(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert ends == set(processor.stop_token_ids)
    with pytest.raises(DataError, match="ends with an assistant message"):
        model.generate([*question, {"role": "assistant", "content": "red"}])
    with pytest.raises(ConfigError, match="on_text follows the answer to one prompt, found 2"):
        model.generate_many([question, question], on_text=told.append)


def test_the_end_of_turn_ends_it_by_default(be, talker):
    model = duetvl.load_model(talker, backend=be)
    end = model.processor.tokenizer.token_id("<|im_end|>")
    prompt = model.processor([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    # The embedding is tied: logits of this token become the largest when its row points where the state does.
    hidden = np.array(be.to_numpy(model.parameters["model.embed_tokens.weight"].tensor))
    likeliest = model.generate(prompt, max_new_tokens=1).token_ids[0]
    hidden[end] = 3 * hidden[likeliest]
    be.ops.assign(model.parameters["model.embed_tokens.weight"].tensor, be.ops.from_numpy(hidden))
    answer = model.generate(prompt, max_new_tokens=8)
    assert answer.token_ids == [end]
    assert answer.text == ""


# -- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one(tiny, be, limit):
    with pytest.raises(ConfigError, match=f"max_new_tokens is {limit}, it must be at least 1"):
        tiny.ours("qwen2-tied", be).generate(PROMPTS["text"], max_new_tokens=limit)


def test_empty_prompts(tiny, be):
    model = tiny.ours("qwen2-tied", be)
    with pytest.raises(DataError, match="no prompts were given"):
        model.generate_many([])
    with pytest.raises(DataError, match="sample 1: has no tokens"):
        model.generate_many([PROMPTS["text"], Sample(np.zeros(0, np.int64))])
    with pytest.raises(DataError, match="sample 0: has 1 image grids, but placeholder tokens for 0"):
        model.generate(replace(PROMPTS["image"], input_ids=np.arange(4), labels=None))


def test_messages_without_a_tokenizer(tiny, be):
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        tiny.ours("qwen2-tied", be).generate([{"role": "user", "content": "hello"}])


def test_logits_that_are_not_finite(tiny, be):
    """As fp16 makes them: without this a model says "!!!!" for ever."""
    model = duetvl.load_model(tiny.directory("qwen2-tied"), backend=be)
    norm = model.parameters["model.norm.weight"]
    be.ops.assign(norm.tensor, be.ops.from_numpy(np.full(norm.shape, np.nan, np.float32)))
    with pytest.raises(DuetvlError, match="sample 0: the logits after 0 new tokens are not finite"):
        model.generate(PROMPTS["text"], max_new_tokens=3)
