"""One line for each event, with the request's id and without prompts or keys."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import re
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_client import ask

from duetvl.serving.guards import BodyLimit, KeyGuard, Receive, Scope, Send
from duetvl.serving.limits import Keys, Limits
from duetvl.serving.logs import LOGGER, Lines, RequestLog, event, log_config, note
from duetvl.serving.metrics import Metrics

KEY, PROMPT = "sk-very-secret-key", "what the user wrote"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, or fails as its path says."""
    note(scope, model="base", prompt_tokens=12, finish_reason="stop")
    if scope["path"] == "/fails":
        raise ValueError(f"cannot encode {PROMPT}")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"of-the-application")]})
    if scope["path"] == "/breaks":
        raise ValueError(f"cannot go on with {PROMPT}")
    await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})


METRICS = Metrics(["base"])
APP = RequestLog(KeyGuard(BodyLimit(app, Limits(body_bytes=100)), Keys({"alice": KEY})), METRICS)
BEARER = f"Bearer {KEY}"


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What is logged, as JSON."""
    stream, logger = io.StringIO(), logging.getLogger(LOGGER)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines("json"))
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_request_is_one_line_with_what_the_application_notes(output: io.StringIO) -> None:
    reply = ask(APP, f"/v1/chat?key={KEY}", authorization=BEARER, x_request_id="mine-1.2_3")
    assert reply.headers["x-request-id"] == "mine-1.2_3" and reply.body == b"mine-1.2_3"
    (line,) = lines(output)
    assert line.pop("seconds") >= 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info", "event": "request", "request_id": "mine-1.2_3", "method": "POST", "route": "other",
        "status": 200, "tenant": "alice", "model": "base", "prompt_tokens": 12, "finish_reason": "stop",
    }  # fmt: skip


@pytest.mark.parametrize("own", ["", "a" * 65, "a b", "a\tb", "ä", 'a"b', "a;b", None])
def test_an_id_that_is_not_plain_is_replaced(own: str | None, output: io.StringIO) -> None:
    reply = ask(APP, authorization=BEARER, **({} if own is None else {"x_request_id": own}))
    assert re.fullmatch(r"[0-9a-f]{32}", reply.headers["x-request-id"])
    assert lines(output)[0]["request_id"] == reply.headers["x-request-id"]


def test_what_is_refused_before_the_application_is_logged_too(output: io.StringIO) -> None:
    replies = [
        ask(APP, authorization="Bearer wrong-key-wrong"),
        ask(APP, authorization=BEARER, content_encoding="gzip"),
        ask(APP, authorization=BEARER, content_length="101"),
    ]
    assert [reply.status for reply in replies] == [401, 415, 413] == [line["status"] for line in lines(output)]
    assert [reply.headers["x-request-id"] for reply in replies] == [line["request_id"] for line in lines(output)]


def test_a_failure_is_answered_without_its_cause_and_logged_without_its_message(output: io.StringIO) -> None:
    reply = ask(APP, "/fails", authorization=BEARER)
    assert (
        reply.status == 500
        and reply.error["type"] == "server_error"
        and reply.headers["x-request-id"] in reply.error["message"]
    )
    broken = ask(APP, "/breaks", authorization=BEARER)
    assert (broken.status, broken.body) == (200, b"")  # the response had begun: it ends without its end
    first, second = lines(output)
    assert (
        first["level"] == "error"
        and first["error"] == "ValueError"
        and re.match(r"test_logs.py:\d+ app < ", first["at"])
    )
    assert second["error"] == "ValueError" and second["status"] == 200
    for text in (output.getvalue(), reply.body.decode()):
        assert PROMPT not in text and KEY not in text


def test_fields_are_those_that_hold_nothing_of_users() -> None:
    with pytest.raises(AssertionError, match="prompt"):
        event("request", prompt=PROMPT)
    with pytest.raises(AssertionError, match="messages"):
        note({}, messages=PROMPT)


def test_other_libraries_lines_are_of_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.access", "uvicorn.error", LOGGER)]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    try:
        logging.config.dictConfig(log_config("text"))
        try:
            raise KeyError(PROMPT)
        except KeyError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n%s", "x" * 2000)
        logging.getLogger("uvicorn.access").info("GET /?key=%s", KEY)
        event("started", host="::1", port=8000, model="a b\u2028c", seconds=0.123456)
    finally:
        for logger, (handlers, logger.propagate, level) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.setLevel(level)
    first, second = capsys.readouterr().err.splitlines()
    assert " ERROR Exception in ASGI application\\n" in first and "error=KeyError" in first and len(first) < 1000
    assert 'INFO started host=::1 port=8000 model="a b\\\\u2028c" seconds=0.1235' in second
    assert PROMPT not in first and KEY not in first + second
