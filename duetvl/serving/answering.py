"""A request's way: read and prepared by threads of a pool, answered by the engine's thread, handed out on the loop.

The event loop itself only waits and writes. The framework is touched by the engine's thread alone.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any, Final, TypeVar

from duetvl.core.batch import Sample
from duetvl.core.errors import ConfigError, DataError, DuetvlError, did_you_mean
from duetvl.data.encode import Processor
from duetvl.inference.engine import Engine
from duetvl.inference.guided import Grammars, Guides
from duetvl.inference.request import Request
from duetvl.inference.sampling import Sampling
from duetvl.serving.calls import CLOSE
from duetvl.serving.errors import SERVER_KIND, ServerError
from duetvl.serving.grammars import Grammar, KnownGrammars, grammar_of
from duetvl.serving.limits import Admission, Limits
from duetvl.serving.media import Media
from duetvl.serving.metrics import Metrics
from duetvl.serving.prompts import Prompts
from duetvl.serving.protocol import (
    Asked,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_request,
)
from duetvl.serving.streaming import Answers, ChatAnswers, Heading, TextAnswers

THREADS: Final = 4  # that prepare requests
_RETRY: Final = 5.0  # seconds after which another server should be there
_SAMPLED: Final = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Caller:
    """Who asks, and since when (`time.monotonic`). Requests of different tenants share no cached prefix."""

    tenant: str
    arrived: float


@dataclass(frozen=True)
class Prepared:
    """A request that the engine can take, and what its answers become."""

    requests: tuple[Request, ...]
    answers: Answers
    stream: bool
    caller: Caller


class Answering:
    """What one server answers with: an engine, names for the model and its adapters, and bounds."""

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        names: Mapping[str, str],
        *,
        media: Media,
        limits: Limits,
        metrics: Metrics,
        threads: int = THREADS,
    ) -> None:
        """names: served name -> the engine's adapter, "" for the model without any; the first is the model's own."""
        self.engine, self.processor, self.names, self.limits = engine, processor, dict(names), limits
        self.metrics = metrics
        engine.ran_pass = metrics.ran_pass
        metrics.show_engine(engine.scheduler)
        longest = engine.longest - 1
        self.prompts = Prompts(processor, media, min(longest, limits.prompt_tokens or longest))
        self.admission = Admission(limits)
        self.draining = self.aborted = False
        self.created = int(time.time())
        self._under_way: set[str] = set()  # the engine's ids
        self._pool = ThreadPoolExecutor(threads, "duetvl prepare")
        self._compiling = ThreadPoolExecutor(1, "duetvl grammars")  # a slow grammar keeps nobody's prompt waiting
        ends = sorted(engine.defaults.stop_ids)
        self._grammars = KnownGrammars(partial(Grammars, processor.tokenizer, processor.family.vocabulary, ends))

    # -- from a body to what the engine takes -------------------------------------------------------------------------

    @contextmanager
    def admitted(self, caller: Caller) -> Iterator[None]:
        """A request is under way as long as this lasts. Raises ServerError where the server takes none."""
        self.check_ready()
        with self.admission.enter(caller.tenant):
            yield

    def check_alive(self) -> None:
        """Raise ServerError where the engine has ended."""
        if self.engine.stopped:
            raise ServerError("the engine has stopped", status=HTTPStatus.SERVICE_UNAVAILABLE, kind=SERVER_KIND)

    def check_ready(self) -> None:
        """Raise ServerError where no request is taken."""
        if self.draining:
            raise _shutting_down()
        self.check_alive()

    async def in_pool(self, work: Callable[[], Result]) -> Result:
        """Run what takes time beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def prepare(self, kind: type[Asked], body: bytes, caller: Caller) -> Prepared:
        """Make a body of this kind ready for the engine. Raises ServerError for what is wrong with it."""
        asked, samples = await self.in_pool(lambda: self._read(kind, body))
        grammar = grammar_of(asked)
        guide = None if grammar is None else await self._guides(grammar)
        heading, media_tokens = self._heading(asked, len(samples)), sum(map(self.prompts.media_tokens, samples))
        heading = replace(heading, media_tokens=media_tokens)
        request = self._way(asked, caller)
        requests = tuple(
            request(sample, id, max_new_tokens=self._most(asked, sample), guide=guide)
            for id, sample in zip(heading.prompts, samples, strict=True)
        )
        make = ChatAnswers if isinstance(asked, ChatRequest) else TextAnswers
        answers = make(heading, self.processor.tokenizer, calls=_reads_calls(asked))
        return Prepared(requests, answers, asked.stream, caller)

    def tokenize(self, asked: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text or of messages, in the shape that vLLM gives them."""
        if (asked.prompt is None) == (asked.messages is None):
            raise ServerError("tokenize takes a prompt or messages", param="prompt")
        if asked.model is not None:
            self.adapter_of(asked.model)
        if asked.messages is not None:
            ids = self.prompts.draft(asked.messages, asked.tools).input_ids.tolist()
        else:
            ids = self.prompts.ids(asked.prompt or "")
        spelling = self.processor.tokenizer.spelling
        strings = [spelling(number).decode("utf-8", "replace") for number in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": self.engine.longest, "tokens": ids, "token_strs": strings}

    def detokenize(self, asked: DetokenizeRequest) -> dict[str, Any]:
        """The text of tokens, control tokens spelt out."""
        if asked.model is not None:
            self.adapter_of(asked.model)
        self.prompts.check_ids(asked.tokens, "tokens")
        return {"prompt": self.processor.decode(asked.tokens, skip_special_tokens=False)}

    def adapter_of(self, name: str) -> str:
        """The engine's adapter of a served name. Raises ServerError (404)."""
        if name not in self.names:
            raise ServerError(
                f"there is no model {name[:200]!r}{did_you_mean(name, self.names)}",
                status=HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )
        return self.names[name]

    def _read(self, kind: type[Asked], body: bytes) -> tuple[Asked, list[Sample]]:
        """The request and its prompts, one thread's work."""
        asked = read_request(kind, body)
        self.adapter_of(asked.model)
        if isinstance(asked, ChatRequest):
            tools = asked.tools if asked.tool_choice != "none" else []
            return asked, [self.prompts.of_messages(asked.messages, tools, asked.mm_processor_kwargs)]
        assert isinstance(asked, CompletionRequest)
        return asked, [self.prompts.of_text(prompt) for prompt in asked.prompts]

    async def _guides(self, grammar: Grammar) -> Guides:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._compiling, self._grammars.guides, grammar)
        except ConfigError as error:
            raise ServerError(error, param=grammar.field, code="invalid_grammar") from None

    def _heading(self, asked: Asked, prompts: int) -> Heading:
        kind = "chatcmpl" if isinstance(asked, ChatRequest) else "cmpl"
        id = f"{kind}-{uuid.uuid4().hex}"
        ids = (id,) if prompts == 1 else tuple(f"{id}-{number}" for number in range(prompts))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Heading(id, int(time.time()), asked.model, ids, asked.n, usage_at_end=usage)

    def _way(self, asked: Asked, caller: Caller) -> Callable[..., Request]:
        """How all prompts of a request are answered."""
        left = self.limits.seconds - (time.monotonic() - caller.arrived)
        if left <= 0:
            raise ServerError(
                "the request could not be prepared in time",
                status=HTTPStatus.GATEWAY_TIMEOUT,
                kind=SERVER_KIND,
                code="deadline_exceeded",
            )
        self.prompts.check_ids(asked.stop_token_ids, "stop_token_ids")
        single = isinstance(asked, ChatRequest) and asked.tools and not asked.parallel_tool_calls
        ends = frozenset() if asked.ignore_eos else self.engine.defaults.stop_ids
        return partial(
            Request,
            sampling=self._sampling(asked),
            stop_ids=ends | frozenset(asked.stop_token_ids),
            stop=asked.stops + ((CLOSE,) if single else ()),
            logprobs=_logprobs(asked),
            n=asked.n,
            min_new_tokens=asked.min_tokens,
            timeout=left,
            adapter=self.adapter_of(asked.model),
            salt=caller.tenant,
        )

    def _sampling(self, asked: Asked) -> Sampling:
        """The request's wishes over the model's own defaults; without a seed every request has its own."""
        wishes: dict[str, Any] = {name: value for name in _SAMPLED if (value := getattr(asked, name)) is not None}
        if asked.top_k is not None:
            wishes["top_k"] = max(asked.top_k, 0)
        wishes["seed"] = secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
        try:
            bias = {int(token): value for token, value in asked.logit_bias.items()}
            sampling = replace(self.engine.defaults.sampling, logit_bias=bias, **wishes)
            sampling.check_tokens(self.processor.family.vocabulary)
        except ConfigError as error:
            raise ServerError(error) from None
        except ValueError:
            raise ServerError("logit_bias: its keys are token ids", param="logit_bias") from None
        return sampling

    def _most(self, asked: Asked, sample: Sample) -> int:
        """Tokens that an answer may have: those that are asked for, as far as the context goes."""
        name, wish = "max_tokens", asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            name, wish = "max_completion_tokens", asked.max_completion_tokens
        if wish is not None:
            self.limits.check_output(wish, name)
        room = self.engine.longest - len(sample)
        most = min(wish or self.limits.output_tokens or room, room)
        if asked.min_tokens > most:
            raise ServerError(f"min_tokens is {asked.min_tokens}, the answer has room for {most}", param="min_tokens")
        return most

    # -- answers ------------------------------------------------------------------------------------------------------

    async def chunks(self, prepared: Prepared) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of an answer as it grows. However this ends, the engine's requests end with it.

        Raises ServerError, and whatever has ended the answer.
        """
        if self.aborted:
            raise _shutting_down()
        answers, model = prepared.answers, prepared.answers.heading.model
        requests = {request.id: request for request in prepared.requests}
        self._under_way |= requests.keys()
        try:
            with ExitStack() as watching:
                watch = partial(self.metrics.watch, model, prepared.caller.arrived)
                watches = {id: watching.enter_context(watch(one.n)) for id, one in requests.items()}
                async with aclosing(self.engine.stream(*requests.values())) as deltas:
                    async for delta in deltas:
                        watches[delta.id].delta(delta)
                        for chunk in answers.add(delta):
                            yield chunk
            for chunk in answers.end():
                yield chunk
        except DuetvlError as error:
            raise as_server_error(error, requests) from None
        finally:
            self._under_way -= requests.keys()

    async def whole(self, prepared: Prepared) -> dict[str, Any]:
        """The answer at its end, as the body of a response. Raises as `chunks`."""
        async for _ in self.chunks(prepared):
            pass
        return prepared.answers.whole()

    # -- the end ------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return self.admission.under_way > 0

    def abort(self) -> None:
        """End all that is under way: each answer that is not finished ends with an error."""
        self.draining = self.aborted = True
        for id in self._under_way:
            self.engine.cancel(id)

    def close(self) -> None:
        """End the engine and the threads."""
        self.engine.close()
        for pool in (self._pool, self._compiling):
            pool.shutdown(wait=False, cancel_futures=True)


def as_server_error(error: DuetvlError, ids: Iterable[str]) -> ServerError:
    """An error of the engine as the client sees it: what was asked is at fault, or the server is."""
    if isinstance(error, ServerError):
        return error
    words = str(error)
    for id in ids:  # the engine names the request, the client knows which it is
        words = words.removeprefix(f"{id}: ")
    if isinstance(error, ConfigError | DataError):
        return ServerError(words)
    return ServerError(words, status=HTTPStatus.INTERNAL_SERVER_ERROR, kind=SERVER_KIND)


def _shutting_down() -> ServerError:
    return ServerError(
        "the server is shutting down",
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        kind=SERVER_KIND,
        code="shutting_down",
        retry_after=_RETRY,
    )


def _reads_calls(asked: Asked) -> bool:
    return isinstance(asked, ChatRequest) and bool(asked.tools) and asked.tool_choice != "none"


def _logprobs(asked: Asked) -> int | None:
    if isinstance(asked, ChatRequest):
        return asked.top_logprobs if asked.logprobs else None
    assert isinstance(asked, CompletionRequest)
    return asked.logprobs
