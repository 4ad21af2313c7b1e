"""Logs: one line for each event, as JSON or as text, that names the request and says nothing of what was asked.

Fields are of a fixed list, none of which holds what a user wrote. An exception is told by its class and where it was
raised, without its message, which may quote a prompt.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any, Final, Literal

from duetvl.core.errors import one_line
from duetvl.serving.errors import SERVER_KIND, ServerError
from duetvl.serving.guards import App, Message, Receive, Scope, Send, header, send_error
from duetvl.serving.metrics import OTHER, Metrics

LOGGER: Final = "duetvl.serving"
REQUEST_ID: Final = "x-request-id"
# What a line may say; none of it is what a user wrote.
FIELDS: Final = frozenset(
    {
        "request_id", "method", "route", "status", "seconds", "tenant", "model", "stream", "choices", "media",
        "prompt_tokens", "cached_tokens", "output_tokens", "finish_reason", "first_token_seconds", "code",
        "error", "at", "host", "port", "pid", "backend", "device", "version", "under_way", "signal",
    }
)  # fmt: skip
_GOOD_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PLAIN: Final = re.compile(r"[\w.:/{}<>+-]+")
_LEFT: Final = 499  # what nginx notes where a client left before its response had begun
_LONGEST: Final = 500
_FRAMES: Final = 12


def event(name: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log that something happened: `event("started", host=..., port=...)`. Fields are those of `FIELDS`."""
    unknown = fields.keys() - FIELDS
    assert not unknown, f"not a field of logs: {sorted(unknown)}"
    logging.getLogger(LOGGER).log(level, name, extra={"fields": fields})


def failure(error: BaseException) -> dict[str, str]:
    """An exception as fields: its class, and where it was raised, innermost frame first."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = (f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return {"error": type(error).__name__, "at": " < ".join(places)}


class Lines(logging.Formatter):
    """Formats records of this server, and of its libraries, as one line each."""

    def __init__(self, form: Literal["json", "text"] = "text") -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line: time in UTC, level, event, fields."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = dict(getattr(record, "fields", None) or {})
        if record.exc_info and record.exc_info[1] is not None:
            fields.update(failure(record.exc_info[1]))
        values = {name: _short(value) for name, value in fields.items() if value is not None}
        name = one_line(record.getMessage(), _LONGEST)
        if self.form == "json":
            head = {"time": moment.replace("+00:00", "Z"), "level": record.levelname.lower(), "event": name}
            return json.dumps(head | values, ensure_ascii=False)
        words = (
            f"{key}={value if _PLAIN.fullmatch(str(value)) else json.dumps(value)}" for key, value in values.items()
        )
        return " ".join((moment.replace("+00:00", "Z"), record.levelname, name, *words))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return value if isinstance(value, bool | int) else one_line(str(value), _LONGEST)


def log_config(form: Literal["json", "text"] = "text") -> dict[str, Any]:
    """For `logging.config.dictConfig`, and for uvicorn's `log_config`: this server's lines and uvicorn's, to stderr.

    uvicorn's own line for each request is left out: it has the query in it, and ours says more.
    """
    own = {"handlers": ["lines"], "level": "INFO", "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": f"{__name__}.Lines", "form": form}},
        "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}},
        "loggers": {LOGGER: own, "uvicorn": own, "uvicorn.access": {"handlers": [], "propagate": False}},
    }


def note(scope: Scope, **fields: Any) -> None:
    """Add fields to the line that the request's end will write: `note(request.scope, model=..., prompt_tokens=...)`."""
    unknown = fields.keys() - FIELDS
    assert not unknown, f"not a field of logs: {sorted(unknown)}"
    scope.setdefault("state", {}).setdefault("log_fields", {}).update(fields)


class RequestLog:
    """The outermost middleware: gives every request an id, and writes a line and counts it when its response has ended.

    A client's own `x-request-id` is kept if it is short and plain. What escapes the application is answered with 500
    in OpenAI's shape, which says nothing of the cause; the log says where it was raised.
    """

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        response = _Response(_request_id(scope), send)
        scope.setdefault("state", {})["request_id"] = response.request_id
        start, level, cause = time.monotonic(), logging.INFO, {}
        try:
            await self.app(scope, receive, response.send)
        except Exception as error:
            level, cause = logging.ERROR, failure(error)
            if not response.status:
                await send_error(response.send, _internal(response.request_id))
        finally:
            self._ended(scope, response, time.monotonic() - start, level, cause)

    def _ended(self, scope: Scope, response: _Response, seconds: float, level: int, cause: Mapping[str, str]) -> None:
        route = getattr(scope.get("route"), "path", OTHER)
        status = response.status or _LEFT
        self.metrics.responded(route, scope["method"], status, seconds)
        state = scope["state"]
        fields = {
            "request_id": response.request_id, "method": scope["method"], "route": route, "status": status,
            "seconds": seconds, "tenant": state.get("tenant") or None,
        }  # fmt: skip
        event("request", level, **(fields | state.get("log_fields", {}) | dict(cause)))


class _Response:
    """A response on its way out; `status` 0 before it has begun."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.request_id, self.status, self._send = request_id, 0, send

    async def send(self, message: Message) -> None:
        """What the application sends, with the request's id in its head."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            others = [
                (name, value) for name, value in message.get("headers", ()) if name.lower() != REQUEST_ID.encode()
            ]
            message = {**message, "headers": [*others, (REQUEST_ID.encode(), self.request_id.encode())]}
        await self._send(message)


def _request_id(scope: Scope) -> str:
    own = header(scope, REQUEST_ID.encode()) or ""
    return own if _GOOD_ID.fullmatch(own) else uuid.uuid4().hex


def _internal(request_id: str) -> ServerError:
    return ServerError(
        f"the server failed; its log has the cause under the request id {request_id}",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        kind=SERVER_KIND,
        code="internal_error",
    )
