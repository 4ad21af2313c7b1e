"""The routes of the server: each reads a request, asks `Answering`, and writes what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from http import HTTPStatus
from typing import Any, Final, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from duetvl.serving import logs
from duetvl.serving.answering import Answering, Caller
from duetvl.serving.errors import SERVER_KIND, ServerError
from duetvl.serving.guards import App, BodyLimit, KeyGuard, Receive, Scope, Send
from duetvl.serving.limits import Keys
from duetvl.serving.page import page_file
from duetvl.serving.protocol import (
    Asked,
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    read_request,
)
from duetvl.serving.streaming import DONE, event
from duetvl.version import __version__

OPEN_PATHS: Final = ("/health", "/ready", "/", "/page/")  # they say nothing of users; the page asks for the key itself
STALL: Final = 120.0  # seconds that a client may take to read what is sent
_JSON: Final = "application/json"
Handler = TypeVar("Handler", bound=Callable[..., Any])


def create_app(answering: Answering, keys: Keys, *, stall: float = STALL) -> App:
    """The whole server as an ASGI application, its guards included."""
    app = _Server(title="duetvl", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ServerError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unforeseen)
    _add_answers(app, answering, stall)
    _add_tokens(app, answering)
    _add_models(app, answering)
    _add_operation(app, answering)
    _add_page(app)
    return logs.RequestLog(KeyGuard(BodyLimit(app, answering.limits), keys, OPEN_PATHS), answering.metrics)


# -- answers ----------------------------------------------------------------------------------------------------------


def _add_answers(app: _Server, answering: Answering, stall: float) -> None:
    @app.post("/v1/chat/completions", openapi_extra=app.body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        return Reply(answering, ChatRequest, request, stall)

    @app.post("/v1/completions", openapi_extra=app.body(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Go on from texts or tokens as they are."""
        return Reply(answering, CompletionRequest, request, stall)


class Reply(Response):
    """An answer under way, from the reading of its request to its last byte.

    A client that leaves ends it, wherever it stands, and so does one that reads nothing for `stall` seconds.
    """

    def __init__(self, answering: Answering, kind: type[Asked], request: Request, stall: float) -> None:
        self.answering, self.kind, self.stall = answering, kind, stall
        state = request.scope["state"]
        self.caller = Caller(state["tenant"], time.monotonic())
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        with self.answering.admitted(self.caller):
            work = self._answer(await read_body(Request(scope, receive)), scope, receive, send)
            await until_gone(receive, work)

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        prepared = await self.answering.prepare(self.kind, body, self.caller)
        del body  # it may be large, and an answer long
        heading = prepared.answers.heading
        logs.note(scope, model=heading.model, stream=prepared.stream, choices=prepared.answers.count)
        if prepared.stream:
            async with aclosing(self.answering.chunks(prepared)) as chunks:
                await self._stream(chunks, scope, send)
        else:
            await JSONResponse(await self.answering.whole(prepared))(scope, receive, send)
        usage = prepared.answers.usage()
        logs.note(
            scope,
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            output_tokens=usage["completion_tokens"],
        )

    async def _stream(self, chunks: AsyncIterator[dict[str, Any]], scope: Scope, send: Send) -> None:
        """Write chunks as events. What goes wrong before the first is a response of its own, later it is an event."""
        first = await anext(chunks)
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        await self._write(send, event(first))
        try:
            async for chunk in chunks:
                await self._write(send, event(chunk))
        except ServerError as error:
            logs.note(scope, code=error.code or error.kind)
            await self._write(send, event(error.body()))
        except Exception as error:
            logs.note(scope, **logs.failure(error))
            await self._write(send, event(internal_error(scope).body()))
        await send({"type": "http.response.body", "body": DONE})

    async def _write(self, send: Send, content: bytes) -> None:
        """Send, and wait for a reader who is slow, but not for ever: then it is as if the client had left."""
        task = asyncio.current_task()
        assert task is not None
        stalled = asyncio.get_running_loop().call_later(self.stall, task.cancel)
        try:
            await send({"type": "http.response.body", "body": content, "more_body": True})
        finally:
            stalled.cancel()


_EVENT_STREAM: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do work for a client, whose request has been read; end it where the client leaves."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        working.cancel()
    with suppress(asyncio.CancelledError):
        await working


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ServerError for one that is not JSON by its header: no other site's page sends
    that without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != _JSON:
        raise ServerError(
            f"the body is of type {kind[:80]!r}; send JSON, with Content-Type: {_JSON}",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    return await request.body()


# -- tokens, models ---------------------------------------------------------------------------------------------------


def _add_tokens(app: _Server, answering: Answering) -> None:
    @app.post("/tokenize", openapi_extra=app.body(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text, or of messages up to where the assistant is to answer."""
        body = await read_body(request)
        with answering.admitted(Caller(request.state.tenant, time.monotonic())):
            return JSONResponse(
                await answering.in_pool(lambda: answering.tokenize(read_request(TokenizeRequest, body)))
            )

    @app.post("/detokenize", openapi_extra=app.body(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        body = await read_body(request)
        with answering.admitted(Caller(request.state.tenant, time.monotonic())):
            asked = read_request(DetokenizeRequest, body)
            return JSONResponse(await answering.in_pool(lambda: answering.detokenize(asked)))


def _add_models(app: _Server, answering: Answering) -> None:
    def described(name: str) -> dict[str, Any]:
        base = next(iter(answering.names))
        return {
            "id": name,
            "object": "model",
            "created": answering.created,
            "owned_by": "duetvl",
            "parent": base if answering.names[name] else None,
            "max_model_len": answering.engine.longest,
        }

    @app.read("/v1/models")
    async def models() -> Response:
        """The model and its adapters under the names that requests give."""
        return JSONResponse({"object": "list", "data": [described(name) for name in answering.names]})

    @app.read("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of them."""
        answering.adapter_of(name)
        return JSONResponse(described(name))


# -- operation --------------------------------------------------------------------------------------------------------


def _add_operation(app: _Server, answering: Answering) -> None:
    @app.read("/health")
    async def health() -> Response:
        """Whether the process can go on: 503 where the engine has ended."""
        answering.check_alive()
        return JSONResponse({"status": "ok"})

    @app.read("/ready")
    async def ready() -> Response:
        """Whether requests are taken: 503 while the server shuts down."""
        answering.check_ready()
        return JSONResponse({"status": "ready"})

    @app.read("/version")
    async def version() -> Response:
        """Of duetvl."""
        return JSONResponse({"version": __version__})

    @app.read("/metrics")
    async def metrics() -> Response:
        """For Prometheus, under vLLM's names."""
        content, kind = answering.metrics.text()
        return Response(content, media_type=kind)


def _add_page(app: _Server) -> None:
    async def page(request: Request) -> Response:
        """The chat page and its files."""
        file = page_file(request.url.path)
        if file is None:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return Response(file.content, media_type=file.content_type, headers=dict(file.headers))

    for path in ("/", "/page/{name}"):
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)


# -- errors -----------------------------------------------------------------------------------------------------------


def internal_error(scope: Scope) -> ServerError:
    """What a client is told of an error that nobody foresaw."""
    id = scope["state"].get("request_id", "")
    return ServerError(
        f"the server failed; its log has the cause under the request id {id}",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        kind=SERVER_KIND,
        code="internal_error",
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    logs.note(request.scope, code=error.code or error.kind)
    return JSONResponse(error.body(), error.status, error.headers())


async def _answer_http(request: Request, error: Exception) -> Response:
    """Of the router: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    words = f"{request.method} {request.url.path[:200]}: {phrase}"
    own = ServerError(words, status=error.status_code, code=phrase.replace(" ", "_"))
    return JSONResponse(own.body(), own.status, error.headers)


async def _answer_unforeseen(request: Request, error: Exception) -> Response:
    own = internal_error(request.scope)
    return JSONResponse(own.body(), own.status)


# -- the schema -------------------------------------------------------------------------------------------------------


class _Server(FastAPI):
    """FastAPI with bodies that are read by `read_request`; the schema tells of them all the same."""

    _parts: dict[str, Any]

    def body(self, kind: type[Body]) -> dict[str, Any]:
        """For `openapi_extra` of a route."""
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        self._parts = {**getattr(self, "_parts", {}), **schema.pop("$defs", {})}
        return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema}}}}

    def read(self, path: str) -> Callable[[Handler], Handler]:
        """A route of GET, and of HEAD, of which the schema need not tell."""

        def add(handler: Handler) -> Handler:
            self.add_api_route(path, handler, methods=["GET"])
            self.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
            return handler

        return add

    def openapi(self) -> dict[str, Any]:
        """The schema, with what the bodies are made of."""
        if self.openapi_schema is None:
            schema = super().openapi()
            components = schema.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **self._parts}
        return super().openapi()
