"""Answers to some prompts at once: the engine with room for exactly them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from duetvl.core.batch import Sample
from duetvl.core.errors import DataError
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.engine import Engine
from duetvl.inference.request import Delta, Request
from duetvl.inference.runner import Generator
from duetvl.inference.sampling import Sampling

OnDelta = Callable[[int, Delta], None]
PASS_TOKENS = 8192  # prompts that have more together are computed in chunks


def generate(
    model: Generator,
    prompts: Sequence[Sample],
    *,
    max_new_tokens: int,
    stop: Collection[int],
    sampling: Sampling | None = None,
    tokenizer: TextTokenizer | None = None,
    on_delta: OnDelta | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, the stop token included where one ended it.

    A sequence's tokens do not depend on its neighbours, but for the last bits of logits. `on_delta(prompt number,
    delta)` is called with each token, and with its text if there is a `tokenizer`. Raises DataError or ConfigError for
    a prompt that cannot be answered, before any is.
    """
    if not prompts:
        raise DataError("there is nothing to generate from: no prompts were given")
    requests = [
        Request(
            prompt=prompt,
            id=f"sample {number}" + (f" {prompt.id!r}" if prompt.id else ""),
            sampling=sampling or Sampling(),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset(stop),
            choice=number,
        )
        for number, prompt in enumerate(prompts)
    ]
    engine = _engine_for(model, requests, tokenizer)
    places = {engine.submit(request): number for number, request in enumerate(requests)}
    found: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        for delta in engine.step():
            if delta.completion is not None and delta.completion.error is not None:
                raise delta.completion.error
            found[places[delta.id]] += delta.token_ids
            if on_delta is not None:
                on_delta(places[delta.id], delta)
    return found


def _engine_for(model: Generator, requests: Sequence[Request], tokenizer: TextTokenizer | None) -> Engine:
    """An engine whose cache holds all of these at once."""
    size = model.backend.kv_cache.block_size
    rows = [len(request.prompt) + request.max_new_tokens for request in requests]
    merge = model.family.geometry.merge**2
    media = [
        int(grids.prod(axis=1).sum()) // merge
        for request in requests
        for grids in (request.prompt.image_grid_thw, request.prompt.video_grid_thw)
    ]
    return Engine(
        model,
        tokenizer=tokenizer,
        cache_tokens=sum(-(-most // size) * size for most in rows),
        media_tokens=max(sum(media), 1),
        context=max(rows) + 1,
        pass_tokens=max(PASS_TOKENS, len(requests)),
        max_sequences=len(requests),
        reuse=False,
        steady=False,  # a single prompt in float32 would take 1.6 times as long
    )
