"""One request to an ASGI application, without a server, and what it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from duetvl.serving.guards import App, Message, Scope


@dataclass
class Reply:
    """What an application sent; `taken`: pieces of the body that it asked for."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    taken: int = 0

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def ask(app: App, path: str = "/", body: Iterable[bytes] = (b"",), method: str = "POST", **headers: str) -> Reply:
    """Send a request whose body comes in these pieces; `x_request_id="..."` is the header x-request-id."""
    return asyncio.run(asked(app, path, body, method, **headers))


async def asked(
    app: App, path: str = "/", body: Iterable[bytes] = (b"",), method: str = "POST", **headers: str
) -> Reply:
    """See `ask`."""
    reply, pieces = Reply(), iter(body)

    async def receive() -> Message:
        piece = next(pieces, None)
        if piece is None:
            await asyncio.Event().wait()  # the client neither sends nor leaves
        reply.taken += 1
        return {"type": "http.request", "body": piece, "more_body": piece != b""}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not reply.status, "a second response"
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    lines = [(name.replace("_", "-").lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope: Scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
    await app(scope, receive, send)
    return reply


async def read_body(receive: Callable[[], Awaitable[Message]]) -> bytes | None:
    """A request's whole body; None where the client leaves before its end."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)
