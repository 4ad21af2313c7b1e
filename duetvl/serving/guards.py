"""ASGI middleware before the application: nothing is read of a request that is not to be answered.

From the outside in: `logs.RequestLog`, `KeyGuard`, `BodyLimit`, the application.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

from duetvl.core.errors import shown
from duetvl.serving.errors import ServerError
from duetvl.serving.limits import Keys, Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeyGuard:
    """Lets requests pass that have a key, to all paths but the open ones; `scope["state"]["tenant"]` names who asks."""

    def __init__(self, app: App, keys: Keys, open_paths: Collection[str] = ("/health",)) -> None:
        """open_paths: those that need no key; one that ends with / is open with all that lies below it."""
        self.app, self.keys = app, keys
        self._open = frozenset(open_paths)
        self._open_below = tuple(path for path in open_paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "websocket":  # there is none here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "http":
            path, tenant = scope["path"], ""
            if path not in self._open and not path.startswith(self._open_below):
                try:
                    tenant = self.keys.check(header(scope, b"authorization"))
                except ServerError as error:
                    await send_error(send, error, {"WWW-Authenticate": "Bearer"})
                    return
            scope.setdefault("state", {})["tenant"] = tenant
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, as soon as that is known; too slow; or compressed.

    It counts what comes, whatever `Content-Length` says, and answers itself (413, 408, 415): the application then
    sees a client that has left, and what it still sends is dropped.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
        except ServerError as error:
            await send_error(send, error)
            return
        body = _Body(self.limits, receive, send)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.refused:  # else it only says that the client has left
                raise

    def _check_headers(self, scope: Scope) -> None:
        coding = header(scope, b"content-encoding") or "identity"
        if coding.strip().lower() != "identity":
            raise ServerError(
                f"the body is sent as {shown(coding, 20)}; send it uncompressed, without Content-Encoding",
                status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        length = header(scope, b"content-length") or ""
        if length.isdecimal() and (len(length) > 18 or int(length) > self.limits.body_bytes):
            raise _too_large(self.limits.body_bytes)


class _Body:
    """The body of one request on its way to the application."""

    def __init__(self, limits: Limits, receive: Receive, send: Send) -> None:
        self.refused = False
        self._limits, self._receive, self._send = limits, receive, send
        self._end = time.monotonic() + limits.body_seconds
        self._bytes, self._complete, self._answering = 0, False, False

    async def receive(self) -> Message:
        """What the application receives."""
        if self.refused:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except asyncio.TimeoutError:
            late = f"the body did not come within {self._limits.body_seconds:g} seconds"
            return await self._refuse(ServerError(late, status=HTTPStatus.REQUEST_TIMEOUT))
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._bytes > self._limits.body_bytes:
                return await self._refuse(_too_large(self._limits.body_bytes))
        return message

    async def send(self, message: Message) -> None:
        """What the application sends."""
        if not self.refused:
            self._answering = True
            await self._send(message)

    async def _refuse(self, error: ServerError) -> Message:
        self.refused = True
        if not self._answering:
            await send_error(self._send, error, {"Connection": "close"})
        return {"type": "http.disconnect"}


def _too_large(most: int) -> ServerError:
    return ServerError(
        f"the body has more than the {most} bytes that this server takes; send smaller pictures or fewer",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        code="request_too_large",
    )


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name, which is in lower case; None where there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def send_error(send: Send, error: ServerError, headers: Mapping[str, str] | None = None) -> None:
    """Send an error as a whole response in OpenAI's shape."""
    body = json.dumps(error.body()).encode()
    own = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers(), **(headers or {})}
    lines = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in own.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
