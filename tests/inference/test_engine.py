"""The engine on both backends with tiny models: transformers' tokens, whatever happens on the way to them."""

from __future__ import annotations

import asyncio
import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from test_generate import MODELS, PROMPTS, expected_tokens

import duetvl
from duetvl.core.backend import Backend
from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError, DataError, DuetvlError
from duetvl.inference.engine import Engine
from duetvl.inference.request import Completion, Delta, Request
from duetvl.inference.sampling import Sampling
from duetvl.models.qwen_vl.config import load_config
from duetvl.models.qwen_vl.loading import write_random_model

NEW = 10
BLOCK = 8
MIXED = oracle.sample(
    4, oracle.Image((1, 6, 10)), 3, oracle.Video((2, 8, 4)), 5, oracle.Image((1, 4, 4)), 2, seed=31
)  # 15 + 16 + 4 tokens of media
LONG = oracle.sample(40, seed=32)
SHORT = [
    oracle.sample(14, seed=33),
    oracle.sample(2, oracle.Image((1, 4, 6)), 5, seed=34),
    oracle.sample(2, oracle.Video((2, 4, 4)), 3, seed=35),
    oracle.sample(13, seed=36),
    oracle.sample(4, oracle.Image((1, 4, 4)), 4, seed=37),
]


def in_small_blocks(be: Backend) -> Backend:
    """Blocks of 8 rows: prompts of a few dozen tokens have some."""
    store = copy.copy(be.kv_cache)
    store.block_size = BLOCK
    return replace(be, kv_cache=store)


@pytest.fixture(scope="module")
def models(tiny):
    found: dict[tuple[str, str], Any] = {}

    def model(name: str, be: Backend) -> Any:
        if (name, be.name) not in found:
            found[name, be.name] = duetvl.load_model(tiny.directory(name), backend=in_small_blocks(be))
        return found[name, be.name]

    return model


@pytest.fixture(scope="module")
def theirs(tiny):
    found: dict[tuple[str, int], list[int]] = {}

    def tokens(name: str, prompt: Sample) -> list[int]:
        if (name, id(prompt)) not in found:
            found[name, id(prompt)] = expected_tokens(tiny.theirs(name), prompt)
        return found[name, id(prompt)]

    return tokens


def ask(prompt: Sample, **changes: Any) -> Request:
    return Request(prompt, **{"max_new_tokens": NEW, **changes})


def run(engine: Engine, most: int = 3000) -> dict[tuple[str, int], Completion]:
    """Step to the end of all requests; after every step pool, features and sequences agree."""
    found = {}
    for _ in range(most):
        for delta in engine.step():
            if delta.completion is not None:
                found[delta.id, delta.choice] = delta.completion
        engine.scheduler.check()
        if not engine.busy:
            return found
    raise AssertionError(f"not done after {most} steps")


def tokens_of(engine: Engine, *prompts: Sample, **changes: Any) -> list[list[int]]:
    ids = [engine.submit(ask(prompt, **changes)) for prompt in prompts]
    found = run(engine)
    assert all(one.error is None for one in found.values()), found
    return [found[id, 0].token_ids for id in ids]


# -- transformers' tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_one_by_one_and_in_mixtures(be, models, theirs, name):
    prompts = [*PROMPTS.values(), MIXED, LONG]
    wanted = [theirs(name, prompt) for prompt in prompts]
    model = models(name, be)
    assert [tokens_of(Engine(model, cache_tokens=400), prompt)[0] for prompt in prompts] == wanted
    assert tokens_of(Engine(model, cache_tokens=800), *prompts) == wanted
    few = Engine(model, cache_tokens=300, pass_tokens=13, max_sequences=3, pass_patches=64, media_tokens=60)
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    found = tokens_of(few, *(prompts[place] for place in order))
    assert found == [wanted[place] for place in order]


def test_arrivals_over_time(be, models, theirs):
    """Each joins when the others are in the middle of something."""
    name = "qwen2.5-untied"
    prompts = [*PROMPTS.values(), MIXED, LONG]
    engine = Engine(models(name, be), cache_tokens=600, pass_tokens=20)
    found: dict[str, list[int]] = {}
    ids = []
    for prompt in prompts:
        ids.append(engine.submit(ask(prompt)))
        for _ in range(3):
            for delta in engine.step():
                found.setdefault(delta.id, []).extend(delta.token_ids)
    rest = run(engine)
    assert {key for key, _ in rest} <= set(ids)
    assert found.keys() <= set(ids)
    whole = {id: one.token_ids for (id, _), one in rest.items()}
    assert all(found[id] == whole[id][: len(found[id])] for id in whole if id in found)
    assert [whole.get(id, found.get(id)) for id in ids] == [theirs(name, prompt) for prompt in prompts]


def test_chunks_that_end_anywhere(be, models, theirs):
    """Inside pictures and a video, at their edges, between them: passes of one row end everywhere."""
    name = "qwen2.5-untied"
    model = models(name, be)
    for rows in (1, 2, 3, 4, 5, 7, 9, 12, 17, 23, 38):
        engine = Engine(model, cache_tokens=200, pass_tokens=rows, max_sequences=1)
        assert tokens_of(engine, MIXED, max_new_tokens=4) == [theirs(name, MIXED)[:4]], rows
        assert engine.scheduler.vision.held == 0


def test_a_second_sequence_moves_the_edges(be, models, theirs):
    """Two prompts share passes, so chunks end elsewhere in each."""
    name = "qwen2-tied"
    for rows in (3, 7, 11):
        engine = Engine(models(name, be), cache_tokens=300, pass_tokens=rows, max_sequences=3)
        found = tokens_of(engine, PROMPTS["two images"], MIXED, PROMPTS["video"])
        assert found == [theirs(name, prompt) for prompt in (PROMPTS["two images"], MIXED, PROMPTS["video"])]


def test_a_pool_so_small_that_sequences_give_way(be, models, theirs):
    """Preempted in the middle of their answers, and begun again with all of their tokens."""
    name = "qwen2.5-untied"
    prompts = [*SHORT, MIXED, LONG]
    for reuse in (True, False):
        engine = Engine(models(name, be), cache_tokens=88, pass_tokens=16, max_sequences=5, reuse=reuse)
        assert tokens_of(engine, *prompts) == [theirs(name, prompt) for prompt in prompts]
        assert engine.scheduler.preemptions > 0


# -- what is found again ----------------------------------------------------------------------------------------------


def cached(engine: Engine, prompt: Sample, **changes: Any) -> tuple[list[int], int]:
    """An answer, and how many tokens of the prompt were found."""
    id = engine.submit(ask(prompt, **changes))
    found = run(engine)[id, 0]
    assert found.error is None
    return found.token_ids, found.cached_tokens


def test_a_prompt_that_is_there_is_found_but_for_its_last_block(be, models, theirs):
    name = "qwen2.5-untied"
    engine = Engine(models(name, be), cache_tokens=400)
    wanted = theirs(name, LONG)  # 40 tokens are five blocks, and one token must be computed
    assert cached(engine, LONG) == (wanted, 0)
    assert cached(engine, LONG) == (wanted, 32)
    longer = replace(LONG, input_ids=np.append(LONG.input_ids, wanted), labels=None)
    assert cached(engine, longer)[1] == 48  # rows of the answer are found as well
    assert cached(engine, LONG, salt="another key") == (wanted, 0)


def test_a_prefix_of_a_sequence_that_runs(be, models, theirs):
    """A hit on blocks that are held: neither sequence disturbs the other, whichever ends first."""
    name = "qwen2.5-untied"
    engine = Engine(models(name, be), cache_tokens=400)
    first = engine.submit(ask(LONG, max_new_tokens=6))
    for _ in range(3):
        engine.step()
    second = engine.submit(ask(LONG))
    found = run(engine)
    assert found[second, 0].cached_tokens == 32
    assert found[first, 0].token_ids == theirs(name, LONG)[:6]
    assert found[second, 0].token_ids == theirs(name, LONG)


def test_equal_prompts_at_once_are_computed_once(be, models, theirs):
    engine = Engine(models("qwen2.5-untied", be), cache_tokens=600)
    ids = [engine.submit(ask(LONG)) for _ in range(4)]
    found = run(engine)
    assert [found[id, 0].cached_tokens for id in ids] == [0, 32, 32, 32]
    assert all(found[id, 0].token_ids == theirs("qwen2.5-untied", LONG) for id in ids)


def with_pixels(prompt: Sample, seed: int) -> Sample:
    pixels = np.random.default_rng(seed).standard_normal(prompt.pixel_values.shape, dtype=np.float32)
    return replace(prompt, pixel_values=pixels)


def test_pictures_are_known_by_their_pixels(be, models, theirs):
    name = "qwen2.5-untied"
    model = models(name, be)
    prompt = oracle.sample(3, oracle.Image((1, 10, 12)), 12, seed=41)
    other = with_pixels(prompt, 5)
    engine = Engine(model, cache_tokens=400)
    assert cached(engine, prompt) == (theirs(name, prompt), 0)
    assert cached(engine, other) == (theirs(name, other), 0)  # equal ids, equal grid, another picture
    assert theirs(name, prompt) != theirs(name, other)
    assert cached(engine, replace(prompt, pixel_values=prompt.pixel_values.copy())) == (theirs(name, prompt), 40)
    turned = replace(prompt, image_grid_thw=np.array([[1, 12, 10]]))
    assert cached(engine, turned) == (theirs(name, turned), 0)  # the same bytes in another shape


def test_videos_are_known_by_their_seconds(be, models):
    """Temporal positions stand in the keys."""
    engine = Engine(models("qwen2.5-untied", be), cache_tokens=400)
    prompt = oracle.sample(4, oracle.Video((4, 8, 4), seconds=1.0), 8, seed=42)
    assert cached(engine, prompt)[1] == 0
    assert cached(engine, prompt)[1] == 40
    assert cached(engine, replace(prompt, second_per_grid_ts=np.array([0.5])))[1] == 0


def test_features_are_computed_once(be, models, theirs):
    """Another question about a picture: the tower does not run again, even where no block is found."""
    model, passes = models("qwen2-tied", be), []
    engine = Engine(Counting(model, passes), cache_tokens=400)
    question = PROMPTS["image"]
    changed = replace(question, input_ids=np.concatenate([[7], question.input_ids[1:]]))
    for prompt in (question, changed, question):
        assert tokens_of(engine, prompt) == [theirs("qwen2-tied", prompt)]
    assert passes == [1]


class Counting:
    """A model that writes down how many media each pass of the tower has."""

    def __init__(self, model: Any, passes: list[int]):
        self._model, self._passes = model, passes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def features(self, batch: Any) -> Any:
        self._passes.append(len(batch.grids))
        return self._model.features(batch)


# -- neighbours -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """A model whose widths are multiples of 64, as those of every published one are."""
    config = load_config(tiny.directory("qwen2.5-real-heads"))
    text = replace(config.text, intermediate_size=128)
    target = tmp_path_factory.mktemp("wide") / "model"
    write_random_model(replace(config, text=text, initializer_range=0.2), target, seed=3)
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_depends_on_neighbours_or_chunks(be, wide, dtype):
    """Where the backend can do that: log-probabilities are the same numbers alone and in mixtures, in one piece and in
    chunks, after preemption and with rows that were found."""
    if not be.capabilities.steady_rows:
        pytest.skip("this backend's rows depend on their number")
    model = duetvl.load_model(wide, backend=in_small_blocks(be), dtype=dtype)
    prompts = [*PROMPTS.values(), MIXED, LONG]
    alone = [logprobs(Engine(model, cache_tokens=256), prompt)[0] for prompt in prompts]
    for count in (2, 3, len(prompts)):
        assert logprobs(Engine(model, cache_tokens=2048), *prompts[:count]) == alone[:count]
    turned = logprobs(Engine(model, cache_tokens=2048), *reversed(prompts))
    assert turned[::-1] == alone
    chunked = Engine(model, cache_tokens=2048, pass_tokens=11)
    assert logprobs(chunked, *prompts) == alone
    assert logprobs(chunked, *prompts) == alone
    some = [logprobs(Engine(model, cache_tokens=256), prompt)[0] for prompt in SHORT]
    narrow = Engine(model, cache_tokens=88, pass_tokens=16)
    assert logprobs(narrow, *prompts, *SHORT) == alone + some
    assert narrow.scheduler.preemptions > 0


def logprobs(engine: Engine, *prompts: Sample) -> list[Any]:
    ids = [engine.submit(ask(prompt, logprobs=20)) for prompt in prompts]
    found = run(engine)
    return [found[id, 0].logprobs for id in ids]


def test_seeds_and_choices(be, models):
    """Four choices are what four requests with those choices give, alone or in company, in any order."""
    model, sampling = models("qwen2-tied", be), Sampling(temperature=1.3, top_p=0.9, seed=5)
    engine = Engine(model, cache_tokens=800)
    alone = [
        run_one(Engine(model, cache_tokens=100), ask(PROMPTS["image"], sampling=sampling, choice=choice))
        for choice in range(4)
    ]
    assert len({tuple(tokens) for tokens in alone}) == 4
    others = [engine.submit(ask(PROMPTS[kind])) for kind in ("video", "text")]
    id = engine.submit(ask(PROMPTS["image"], sampling=sampling, n=4))
    found = run(engine)
    assert [found[id, choice].token_ids for choice in range(4)] == alone
    assert all(found[other, 0].finish_reason == "length" for other in others)


def run_one(engine: Engine, request: Request) -> list[int]:
    id = engine.submit(request)
    return run(engine)[id, request.choice].token_ids


def test_logprobs_are_those_of_a_whole_pass(be, models):
    model = models("qwen2.5-untied", be)
    prompt = PROMPTS["image"]
    engine = Engine(model, cache_tokens=100)
    id = engine.submit(ask(prompt, logprobs=3, sampling=Sampling(temperature=2.0, seed=1)))
    found = run(engine)[id, 0]
    for token, given in zip(found.token_ids, found.logprobs, strict=True):
        logits = np.array(model.backend.to_numpy(model.logits(model.pack([prompt]))), np.float64)[-1]
        wanted = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert given.token == token
        assert abs(given.logprob - wanted[token]) < 1e-4
        assert [one for one, _ in given.top] == np.argsort(-wanted)[:3].tolist()
        prompt = replace(prompt, input_ids=np.append(prompt.input_ids, token), labels=None)


# -- ends -------------------------------------------------------------------------------------------------------------


def test_where_answers_end(be, models, theirs):
    name = "qwen2-tied"
    model, whole = models(name, be), theirs(name, PROMPTS["text"])
    context = len(PROMPTS["text"]) + 1
    engine = Engine(model, cache_tokens=400)
    first = frozenset({whole[0]})
    cases = {
        engine.submit(ask(PROMPTS["text"], max_new_tokens=1)): (whole[:1], "length"),
        engine.submit(ask(PROMPTS["text"], stop_ids=first)): (whole[:1], "stop"),
        engine.submit(ask(PROMPTS["text"], stop_ids=frozenset({whole[-1]}))): (
            whole[: whole.index(whole[-1]) + 1], "stop"
        ),
    }  # fmt: skip
    later = engine.submit(ask(PROMPTS["text"], stop_ids=first, min_new_tokens=3))
    found = run(engine)
    for id, (tokens, reason) in cases.items():
        assert (found[id, 0].token_ids, found[id, 0].finish_reason) == (tokens, reason)
    assert len(found[later, 0].token_ids) >= 3
    assert whole[0] not in found[later, 0].token_ids[:3]
    short = Engine(model, cache_tokens=400, context=context)
    id = short.submit(ask(PROMPTS["text"]))
    assert run(short)[id, 0].token_ids == whole[:1]
    with pytest.raises(DataError, match=rf"request 1: the prompt has {context} tokens, the context is {context}"):
        short.submit(ask(oracle.sample(context, seed=3)))


def test_cancelled_anywhere(be, models, theirs):
    """In the queue, in the middle of a prompt with a picture, in an answer: blocks and features come back."""
    engine = Engine(models("qwen2-tied", be), cache_tokens=200, pass_tokens=12, max_sequences=2)
    staying = engine.submit(ask(PROMPTS["text"]))
    for wait in (0, 1, 4):
        leaving = engine.submit(ask(MIXED, n=2), tell := Told())
        for _ in range(wait):
            engine.step()
            engine.scheduler.check()
        engine.cancel(leaving)
        engine.cancel("nobody")
        engine.step()
        assert [delta.completion.finish_reason for delta in tell if delta.completion] == ["cancelled"] * 2
        assert engine.scheduler.vision.held == 0
        assert all(s.request.id == staying for s in (*engine.scheduler.running, *engine.scheduler.waiting))
    run(engine)
    assert engine.scheduler.pool.used == 0


class Told(list[Delta]):
    """Hears of deltas."""

    def __call__(self, delta: Delta) -> None:
        self.append(delta)


def test_deadlines(be, models, monkeypatch):
    """While it waits, and in the middle of an answer."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    engine = Engine(models("qwen2-tied", be), cache_tokens=200, max_sequences=1)
    running = engine.submit(ask(PROMPTS["text"], timeout=5))
    waiting = engine.submit(ask(PROMPTS["image"], timeout=3))
    for _ in range(3):
        engine.step()
    now[0] += 4
    late = {delta.id: delta.completion for delta in engine.step() if delta.completion}
    assert late[waiting].finish_reason == "deadline"
    assert late[waiting].token_ids == []
    assert late[waiting].timings.started is None
    now[0] += 4
    (delta,) = engine.step()
    assert (delta.id, delta.completion.finish_reason, len(delta.completion.token_ids)) == (running, "deadline", 4)
    assert not engine.busy
    assert engine.scheduler.pool.used == 0


def test_one_bad_request_does_not_end_the_others(be, models, theirs):
    """Its picture is of numbers that are none; the logits of its neighbours are fine."""
    name = "qwen2-tied"
    engine = Engine(models(name, be), cache_tokens=400)
    broken = with_pixels(PROMPTS["image"], 1)
    broken.pixel_values[3] = np.nan
    bad = engine.submit(ask(broken))
    good = [engine.submit(ask(prompt)) for prompt in (PROMPTS["text"], PROMPTS["image"])]
    found = run(engine)
    assert found[bad, 0].finish_reason == "error"
    with pytest.raises(DuetvlError, match="request 0: the logits after 0 new tokens are not finite"):
        raise found[bad, 0].error
    assert [found[id, 0].token_ids for id in good] == [theirs(name, PROMPTS[kind]) for kind in ("text", "image")]


def test_a_guide_that_fails_ends_its_request_alone(be, models, theirs):
    class Breaks:
        asked = 0

        def mask(self) -> None:
            self.asked += 1
            if self.asked == 3:
                raise ValueError("no token is left")

        def take(self, token: int) -> None:
            pass

    engine = Engine(models("qwen2-tied", be), cache_tokens=400)
    bad = engine.submit(ask(PROMPTS["text"], guide=Breaks))
    good = engine.submit(ask(PROMPTS["image"]))
    found = run(engine)
    assert (found[bad, 0].finish_reason, len(found[bad, 0].token_ids), str(found[bad, 0].error)) == (
        "error", 2, "no token is left"
    )  # fmt: skip
    assert found[good, 0].token_ids == theirs("qwen2-tied", PROMPTS["image"])


def test_a_pass_that_fails_ends_its_requests_alone(be, models, theirs):
    name = "qwen2-tied"
    model = Failing(models(name, be))
    engine = Engine(model, cache_tokens=400, max_sequences=2)
    ids = [engine.submit(ask(prompt)) for prompt in (LONG, PROMPTS["text"], PROMPTS["image"], LONG)]
    engine.step()
    model.fails = RuntimeError("out of memory")
    engine.step()
    model.fails = None
    found = run(engine)
    assert str(found[ids[2], 0].error or "") == ""
    kept = engine.generate([ask(LONG), ask(PROMPTS["text"])])
    assert [found[id, 0].token_ids for id in ids[2:]] == [theirs(name, prompt) for prompt in (PROMPTS["image"], LONG)]
    assert [one.token_ids for one in kept] == [theirs(name, prompt) for prompt in (LONG, PROMPTS["text"])]


def test_an_interrupted_pass_leaves_the_others_right(be, models, theirs):
    """Ctrl-C in `generate` while another request is under way: no features of that pass are there."""
    name = "qwen2-tied"
    model = Failing(models(name, be))
    engine = Engine(model, cache_tokens=400)
    kept = [engine.submit(ask(prompt)) for prompt in (PROMPTS["image"], LONG)]
    engine.step()
    kept.append(engine.submit(ask(PROMPTS["video"])))
    model.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask(PROMPTS["text"])])
    model.fails = None
    found = run(engine)
    assert {id for id, _ in found} == set(kept)
    expected = [theirs(name, prompt) for prompt in (PROMPTS["image"], LONG, PROMPTS["video"])]
    assert [found[id, 0].token_ids for id in kept] == expected


class Failing:
    """A model whose device fails where it is told to."""

    fails: BaseException | None = None

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def extend(self, *arguments: Any) -> Any:
        if isinstance(self.fails, Exception):
            raise self.fails
        return self._model.extend(*arguments)

    def features(self, *arguments: Any) -> Any:
        if self.fails:
            raise self.fails
        return self._model.features(*arguments)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_can_never_be_answered_is_refused(be, models):
    engine = Engine(models("qwen2-tied", be), cache_tokens=64, media_tokens=20)
    with pytest.raises(ConfigError, match=r"big: 40 tokens of the prompt and 30 new ones do not fit .* 8 blocks of 8"):
        engine.submit(ask(LONG, id="big", max_new_tokens=30))
    with pytest.raises(ConfigError, match=r"makes 30 tokens, and the engine keeps the features of 20"):
        engine.submit(ask(PROMPTS["image"]))
    with pytest.raises(DataError, match="has 1 image grids, but placeholder tokens for 0"):
        engine.submit(ask(replace(PROMPTS["image"], input_ids=np.arange(4), labels=None)))
    with pytest.raises(DataError, match="image pixels have shape"):
        engine.submit(ask(replace(PROMPTS["image"], pixel_values=np.zeros((3, 3), np.float32))))
    with pytest.raises(ConfigError, match="no adapter 'kiosk'"):
        engine.submit(ask(PROMPTS["text"], adapter="kiosk"))
    with pytest.raises(ConfigError, match="logit_bias: token 4000"):
        engine.submit(ask(PROMPTS["text"], sampling=Sampling(logit_bias={4000: 1.0})))
    engine.submit(ask(PROMPTS["text"], id="one"))
    with pytest.raises(ConfigError, match="one: a request with this id is running"):
        engine.submit(ask(PROMPTS["text"], id="one"))
    assert list(run(engine)) == [("one", 0)]
    for field, value in (("max_new_tokens", 0), ("n", 0), ("timeout", float("nan")), ("min_new_tokens", -1)):
        with pytest.raises(ConfigError, match=field):
            ask(PROMPTS["text"], **{field: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_tokens": 0}, "cache_tokens is 0, it must be at least 1"),
        ({"cache_tokens": 8, "cache_bytes": 8}, "both given"),
        ({"cache_bytes": 100}, "cache_bytes is 100, and the smallest takes"),
        ({"cache_tokens": 8, "pass_tokens": 0}, "pass_tokens is 0, it must be at least 1"),
    ],
)
def test_engines_that_make_no_sense(be, models, given, message):
    with pytest.raises(ConfigError, match=message):
        Engine(models("qwen2-tied", be), **given)


# -- room -------------------------------------------------------------------------------------------------------------


def test_the_cache_is_what_was_asked_for(be, models):
    model = models("qwen2-tied", be)
    block = model.cache_block_bytes
    for given in (15 * block, 16 * block - 1, 16 * block):
        engine = Engine(model, cache_bytes=given)
        tensors = (*engine.runner.cache.keys, *engine.runner.cache.values)
        taken = sum(int(np.prod(tensor.shape)) * 4 for tensor in tensors)
        assert taken == given // block * block
        spare = engine.padding.most if engine.padding else 0
        assert engine.scheduler.pool.size == given // block - spare
    assert Engine(model, cache_tokens=17).scheduler.pool.size == 3
    free = model.backend.device.free_memory()
    usual = Engine(model, max_sequences=2, context=100)
    assert 0 < free < model.backend.device.total_memory()
    assert usual.scheduler.pool.size == 2 * 13  # more than all that can run is never taken


def test_many_requests_leave_it_as_it_was(be, models):
    engine = Engine(models("qwen2-tied", be), cache_tokens=2000, max_sequences=100)
    prompts = [oracle.sample(5, oracle.Image((1, 4, 4)), 4, seed=seed) for seed in range(20)]
    for _ in range(3):
        found = engine.generate([ask(prompt, max_new_tokens=2) for prompt in prompts * 10])
        assert len(found) == 200
        assert engine.scheduler.pool.used == engine.scheduler.vision.held == 0
        assert not engine._jobs and not engine._known and not engine._kept


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_take_turns(be, tiny, tmp_path, theirs):
    """Base and adapters over one cache: each answers as it does alone, and shares no prefix with the others."""
    from duetvl.models.lora import Adapters, Size
    from duetvl.models.qwen_vl import adapters as laying

    name, small = "qwen2.5-untied", in_small_blocks(be)
    base = duetvl.load_model(tiny.directory(name), backend=small)
    sizes = {f"model.layers.{layer}.mlp.up_proj": Size(2, 40.0) for layer in range(2)}
    alone = {"": theirs(name, MIXED)}
    for seed in (1, 2):
        single = duetvl.load_model(tiny.directory(name), backend=small)
        laying.add_adapters(single, Adapters(sizes), seed)
        for path, parameter in single.parameters.items():
            if path.endswith("lora_B.weight"):
                values = np.random.default_rng(seed).standard_normal(parameter.shape).astype(np.float32)
                be.ops.assign(parameter.tensor, be.ops.from_numpy(values))
        single.save_adapter(tmp_path / str(seed))
        alone[str(seed)] = tokens_of(Engine(single, cache_tokens=100), MIXED)[0]
    assert len({tuple(tokens) for tokens in alone.values()}) == 3
    beside = {str(seed): base.with_adapter(tmp_path / str(seed)) for seed in (1, 2)}
    shared = base.parameters["model.norm.weight"].tensor
    assert all(each.parameters["model.norm.weight"].tensor is shared for each in beside.values())
    engine = Engine(base, adapters=beside, cache_tokens=600, pass_tokens=24)
    ids = {engine.submit(ask(MIXED, adapter=which)): which for which in ("1", "", "2", "1", "")}
    found = run(engine)
    assert [found[id, 0].token_ids for id in ids] == [alone[which] for which in ids.values()]


# -- streams ----------------------------------------------------------------------------------------------------------


def test_streams_over_one_thread(be, models, theirs):
    name = "qwen2.5-untied"
    prompts = [PROMPTS["text"], MIXED, PROMPTS["image"], LONG]

    async def follow(engine: Engine, prompt: Sample) -> tuple[list[int], str]:
        tokens, end = [], None
        async for delta in engine.stream(ask(prompt)):
            tokens += delta.token_ids
            end = delta.completion
        assert end.token_ids == tokens
        return tokens, end.finish_reason

    async def leave(engine: Engine) -> None:
        stream = engine.stream(ask(LONG, max_new_tokens=100))
        async for _ in stream:
            break
        await stream.aclose()

    async def read_late(engine: Engine) -> list[Delta]:
        """What comes to a reader who takes nothing while the model answers."""
        stream = engine.stream(ask(PROMPTS["text"], n=2), ask(PROMPTS["image"]))
        deltas = [await anext(stream)]
        while engine.busy:
            await asyncio.sleep(0.001)
        return [*deltas, *[delta async for delta in stream]]

    async def all_of_them(engine: Engine) -> list[tuple[list[int], str]]:
        found = await asyncio.gather(*(follow(engine, prompt) for prompt in prompts), leave(engine))
        with pytest.raises(ConfigError, match=r"request \d+: .*do not fit"):
            async for _ in engine.stream(ask(LONG, max_new_tokens=5000)):
                pass
        return found[:-1]

    with Engine(models(name, be), cache_tokens=800) as engine:
        found = asyncio.run(all_of_them(engine))
        assert found == [(theirs(name, prompt), "length") for prompt in prompts]
        deltas = asyncio.run(read_late(engine))
        ends = [delta.completion for delta in deltas if delta.completion]
        assert len(ends) == 3
        assert len(deltas) < 3 * NEW / 2, "a reader who is late gets much at a time"
        for end in ends:
            own = [delta for delta in deltas if (delta.id, delta.choice) == (end.id, end.choice)]
            assert [token for delta in own for token in delta.token_ids] == end.token_ids
        again = engine.generate([ask(prompt) for prompt in prompts])  # by the same thread
        assert [one.token_ids for one in again] == [theirs(name, prompt) for prompt in prompts]
        with pytest.raises(ConfigError, match="the engine's own thread runs it"):
            engine.step()
    assert engine.scheduler.pool.used == 0
    with pytest.raises(ConfigError, match="the engine is closed"):
        engine.submit(ask(LONG))
