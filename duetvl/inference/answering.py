"""Many prompts through an engine: pixels are made ahead, and what fails is one row and ends nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from duetvl.core.batch import Pair, Sample
from duetvl.core.errors import DataError, DuetvlError
from duetvl.data.conversation import Conversation
from duetvl.data.encode import Processor
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.engine import Engine
from duetvl.inference.output import spelt
from duetvl.inference.request import Completion, Request

AHEAD: Final = 4  # prompts whose pixels are made while others are answered
Row = Mapping[str, Any]
Prepared = Iterator[tuple[int, Sample | DuetvlError]]


def sample_of(processor: Processor, conversation: Conversation, id: str) -> Sample:
    """A prompt with its pixels. Raises DataError naming it."""
    try:
        sample = processor.load(processor.draft(conversation, id=id, add_generation_prompt=True), as_bytes=True)
    except DataError as error:
        raise DataError(str(error) if id in str(error) else f"{id}: {error}") from None
    assert not isinstance(sample, Pair)
    return sample


def ahead(numbers: Iterable[int], make: Callable[[int], Sample]) -> Prepared:
    """Samples that a thread makes before they are asked for; what is wrong with one is a value."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[int, Future[Sample]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(make, number)))
                if len(waiting) > AHEAD:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _taken(number: int, made: Future[Sample]) -> tuple[int, Sample | DuetvlError]:
    try:
        return number, made.result()
    except DuetvlError as error:
        return number, error


def answers(
    engine: Engine, prepared: Prepared, request: Callable[[Sample, str], Request], tokenizer: TextTokenizer
) -> Iterator[tuple[int, Row]]:
    """Number and row of every answer, as they are finished. As many wait as the engine has room for, and no more.

    `request` says of a sample and an id what the engine is asked.
    """
    most, waiting, more = 2 * engine.limits.max_sequences, 0, True
    while more or waiting:
        while more and waiting < most:
            following = next(prepared, None)
            if following is None:
                more = False
                break
            number, sample = following
            try:
                if isinstance(sample, DuetvlError):
                    raise sample
                engine.submit(request(sample, str(number)))
                waiting += 1
            except DuetvlError as error:
                yield number, failure(error)
        for delta in engine.step():
            if delta.completion is not None:
                waiting -= 1
                yield int(delta.id), row_of(delta.completion, tokenizer)


def failure(error: Exception) -> Row:
    """The row of what could not be answered."""
    return {"text": None, "finish_reason": "error", "error": str(error)}


def row_of(done: Completion, tokenizer: TextTokenizer) -> Row:
    """The row of an answer. Seconds: from its arrival in the engine."""
    if done.error is not None:
        return failure(done.error)
    times = done.timings
    seconds = {
        "queue": None if times.started is None else round(times.started - times.arrived, 6),
        "first_token": None if times.first_token is None else round(times.first_token - times.arrived, 6),
        "total": round(times.finished - times.arrived, 6),
    }
    row: dict[str, Any] = {
        "text": done.text,
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": done.cached_tokens,
        "completion_tokens": len(done.token_ids),
        "seconds": seconds,
    }
    if done.logprobs is not None:
        row["logprobs"] = [spelt(tokenizer, one) for one in done.logprobs]
    return row
